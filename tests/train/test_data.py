import random

import numpy as np
import pytest
import torch
from PIL import Image

from vicinal.errors import UserError
from vicinal.train.config import AugmentationConfig, DataConfig
from vicinal.train.data.images import FolderImages, UnreadableImage, open_images
from vicinal.train.data.loader import resolve_workers
from vicinal.train.data.order import EvalSampler, TrainSampler
from vicinal.train.data.transforms import InputSpec, Preprocess, eval_batches, train_batches, train_transform
from vicinal.train.run.randomness import seed_host, stream_seed
from vicinal.train.run.world import World

CPU = torch.device("cpu")
SPEC = InputSpec((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)


def epoch_of(world_size, epoch=0, repeats=1, batch_size=4, num_images=50, seed=0):
    samplers = [
        TrainSampler(num_images, batch_size, seed, repeats, World(CPU, rank=rank, size=world_size))
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.begin(epoch)
    return [list(sampler) for sampler in samplers]


def test_global_order_is_the_same_on_any_number_of_processes():
    (alone,) = epoch_of(1, batch_size=8)
    pair = epoch_of(2, batch_size=4)
    merged = [[key for keys in zip(*batches, strict=True) for key in keys] for batches in zip(*pair, strict=True)]
    assert merged == alone


def test_order_depends_on_seed_and_epoch_only():
    assert epoch_of(1) == epoch_of(1)
    assert epoch_of(1, epoch=1) != epoch_of(1)
    assert epoch_of(1, seed=1) != epoch_of(1)
    (batches,) = epoch_of(1)
    indices = [key.index for batch in batches for key in batch]
    assert len(set(indices)) == len(indices) == 48


def test_repeats_of_an_image_fall_to_different_processes_and_get_different_keys():
    ranks = epoch_of(3, repeats=3, batch_size=2, num_images=54)
    for batches in zip(*ranks, strict=True):
        for keys in zip(*batches, strict=True):
            assert len({key.index for key in keys}) == 1
            assert sorted(key.repeat for key in keys) == [0, 1, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_images", [1, 7, 16, 17])
def test_every_val_image_counts_once_and_processes_stay_in_step(world_size, num_images):
    samplers = [EvalSampler(num_images, 4, World(CPU, rank=rank, size=world_size)) for rank in range(world_size)]
    shares = [[index for batch in sampler for index in batch] for sampler in samplers]
    counted = [index for share, sampler in zip(shares, samplers, strict=True) for index in share[: sampler.num_valid]]
    assert sorted(counted) == list(range(num_images))
    assert len({tuple(map(len, sampler)) for sampler in samplers}) == 1


def test_too_large_a_batch_is_refused():
    with pytest.raises(UserError, match="--batch-size 64 on 1 processes exceeds the 50 training images"):
        epoch_of(1, batch_size=64)


def test_stream_seeds_depend_on_purpose_and_on_every_counter():
    seeds = {stream_seed(*key) for key in [("a", 0, 1), ("a", 1, 0), ("a", 0), ("a", 0, 1, 0), ("b", 0, 1)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_digits_split_is_stratified_disjoint_and_fixed():
    train, val = open_images(DataConfig())
    again = open_images(DataConfig())[1]
    assert len(train.targets) + len(val.targets) == 1797
    assert not set(train.indices) & set(val.indices)
    assert val.indices == again.indices
    assert open_images(DataConfig(split_seed=1))[1].indices != val.indices
    share = np.bincount(val.targets) / np.bincount(train.targets + val.targets)
    # A class has at least 174 images, so that rounding to whole images shifts its share by at most 0.5 / 174.
    np.testing.assert_allclose(share, 0.2, atol=0.5 / 174)


def test_memory_data_starts_no_workers():
    assert resolve_workers(DataConfig()) == 0
    assert resolve_workers(DataConfig(name="somewhere")) >= 1
    assert resolve_workers(DataConfig(workers=3)) == 3


AUGMENTED = AugmentationConfig(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)


def first_batch(jpeg_tree, workers, augmentation=AUGMENTED, epoch=0, seed=0):
    config = DataConfig(name=str(jpeg_tree), batch_size=8, workers=workers)
    images, _ = open_images(config)
    batches = train_batches(images, config, augmentation, SPEC, seed, World(CPU))
    batches.sampler.begin(epoch)
    return next(iter(batches))


def test_changes_to_an_image_do_not_depend_on_workers_or_on_what_ran_before(jpeg_tree):
    images, targets = first_batch(jpeg_tree, workers=0)
    random.random()
    torch.rand(5)
    np.random.rand(3)
    same_images, same_targets = first_batch(jpeg_tree, workers=2)
    assert torch.equal(images, same_images)
    assert torch.equal(targets, same_targets)
    assert images.dtype == torch.uint8
    assert images.shape == (8, 3, 32, 32)
    assert not torch.equal(images, first_batch(jpeg_tree, workers=0, epoch=1)[0])
    assert not torch.equal(images, first_batch(jpeg_tree, workers=0, seed=1)[0])


@pytest.mark.parametrize("crop", ["rrc", "rkrr", "rkrc", "shift", "none"])
def test_every_crop_gives_the_input_size(jpeg_tree, crop):
    images, _ = first_batch(jpeg_tree, workers=0, augmentation=AugmentationConfig(crop=crop))
    assert images.shape == (8, 3, 32, 32)


def test_shift_translates_by_whole_pixels_within_its_range():
    config = DataConfig(batch_size=16)
    images, _ = open_images(config)
    augmentation = AugmentationConfig(crop="shift", shift=0.125, hflip=0.0)
    batches = train_batches(images, config, augmentation, SPEC, 0, World(CPU))
    keys = next(iter(batches.sampler))
    still = train_batches(images, config, AugmentationConfig(crop="none", hflip=0.0), SPEC, 0, World(CPU))
    shifts = set()
    for key in keys:
        moved, original = batches.dataset[key][0], still.dataset[key][0]
        padded = torch.nn.functional.pad(original, (4, 4, 4, 4))
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(padded[:, top : top + 32, left : left + 32], moved)
        ]
        assert found
        shifts.add(found[0])
    assert len(shifts) > 1


def test_folder_without_val_is_split_by_seed(jpeg_tree):
    config = DataConfig(name=str(jpeg_tree / "train"), val_fraction=0.25)
    train, val = open_images(config)
    assert np.bincount(train.targets).tolist() == [6, 6, 6]
    assert np.bincount(val.targets).tolist() == [2, 2, 2]
    assert train.classes == ["blue", "green", "red"]


def test_folders_agree_with_torchvision(jpeg_tree):
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(str(jpeg_tree / "val"))
    ours = FolderImages(jpeg_tree / "val")
    assert ours.classes == theirs.classes
    assert ours.targets == theirs.targets
    assert np.array_equal(np.asarray(ours.load(3)), np.asarray(theirs[3][0]))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(tmp_path, workers):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / "0.jpg")
    unreadable = tmp_path / "val" / "b" / "1.jpg"
    unreadable.write_bytes((tmp_path / "val" / "b" / "0.jpg").read_bytes()[:200])
    images = FolderImages(tmp_path / "val")
    batches = eval_batches(images, DataConfig(name=str(tmp_path), workers=workers), SPEC, World(CPU))
    with pytest.raises(UnreadableImage, match=r"cannot read image .*b/1\.jpg"):
        list(batches)


def test_val_class_without_training_images_is_refused(tmp_path):
    for path in ("train/cat", "train/dog", "val/cat", "val/fox"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path / "0.jpg")
    with pytest.raises(UserError, match="fox"):
        open_images(DataConfig(name=str(tmp_path)))


def test_preprocess_normalises_mixes_and_erases():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    targets = torch.arange(4)
    plain, labels = Preprocess(SPEC, CPU, 4)(images, targets)
    # (x - 127.5) / 127.5: one subtraction and one division, of half an ulp each.
    torch.testing.assert_close(plain, images.double().div(127.5).sub(1).float(), rtol=0, atol=2e-7)
    assert torch.equal(labels, targets)
    mixing = Preprocess(SPEC, CPU, 4, 0.1, AugmentationConfig(mixup=0.8, cutmix=1.0, random_erasing=1.0))
    mixed, soft = mixing(images, targets)
    assert soft.shape == (4, 4)
    # Each row is a distribution; a sum of four float32 numbers below 1.
    torch.testing.assert_close(soft.sum(1), torch.ones(4), rtol=0, atol=4 * 1.2e-7)
    assert not torch.equal(mixed, plain)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "augmix-m5-w2", "3a"])
def test_timm_policies_run_at_every_magnitude(policy):
    transform = train_transform(AugmentationConfig(auto_augment=policy, hflip=0.0), SPEC)
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    for seed in range(60):
        seed_host(seed)
        assert transform(image).shape == (3, 32, 32)
