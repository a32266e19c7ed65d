"""What happens to an image on its way to the network, by the values that the options give."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from vicinal.train.config import AugmentationConfig, DataConfig
from vicinal.train.data.images import ArrayImages, load_digits
from vicinal.train.data.loader import resolve_workers
from vicinal.train.data.order import SampleKey
from vicinal.train.data.transforms import InputSpec, Preprocess, TrainDataset, eval_transform, train_transform

CPU = torch.device("cpu")
WIDE = InputSpec((16, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.5)


def steps_of(transform):
    """All steps, those of nested lists among them."""
    for step in transform.transforms:
        yield from steps_of(step) if isinstance(step, transforms.Compose) else (step,)


def find(transform, name):
    (found,) = (step for step in steps_of(transform) if type(step).__name__ == name)
    return found


@pytest.mark.parametrize("crop", ["rrc", "rkrr", "rkrc", "shift", "none"])
@pytest.mark.parametrize("hflip", [0.0, 0.25, 1.0])
def test_images_are_flipped_once_at_most_and_as_often_as_asked(crop, hflip):
    transform = train_transform(AugmentationConfig(crop=crop, hflip=hflip), WIDE)
    flips = [step.p for step in steps_of(transform) if isinstance(step, transforms.RandomHorizontalFlip)]
    assert flips in ([hflip], [] if hflip == 0 else [hflip])


def test_crops_take_the_scale_and_the_shift_that_are_given():
    crop = find(train_transform(AugmentationConfig(scale=(0.3, 0.6)), WIDE), "RandomResizedCropAndInterpolation")
    assert tuple(crop.scale) == (0.3, 0.6)
    shift = find(train_transform(AugmentationConfig(crop="shift", shift=0.25), WIDE), "RandomCrop")
    # Left and right, then top and bottom, of 32 x 16 pixels.
    assert list(shift.padding) == [8, 4]
    assert tuple(shift.size) == (16, 32)


def test_evaluation_crops_the_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    spec = InputSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.5)
    shown = eval_transform(spec)(Image.fromarray(pixels))
    # 16 pixels are half of what the image is resized to: its own 32.
    assert np.array_equal(np.asarray(shown), pixels[8:24, 8:24].transpose(2, 0, 1))


def test_changes_to_an_image_depend_on_epoch_image_and_repeat():
    images = ArrayImages(np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8), [0, 1, 2], list("abc"))
    dataset = TrainDataset(images, train_transform(AugmentationConfig(), WIDE), 0)
    first = dataset[SampleKey(0, 1, 0)][0]
    assert torch.equal(first, dataset[SampleKey(0, 1, 0)][0])
    for key in (SampleKey(1, 1, 0), SampleKey(0, 1, 1)):
        assert not torch.equal(first, dataset[key][0])


def test_erased_pixels_are_filled_as_asked():
    images = torch.full((8, 3, 16, 32), 255, dtype=torch.uint8)
    for mode, is_zero in (("const", True), ("pixel", False)):
        config = AugmentationConfig(random_erasing=1.0, erasing_mode=mode)
        erased, _ = Preprocess(WIDE, CPU, 2, augmentation=config)(images, torch.zeros(8, dtype=torch.int64))
        filling = erased[erased != 1.0]
        assert len(filling)
        assert bool((filling == 0).all()) is is_zero
    config = AugmentationConfig(random_erasing=1.0, erasing_mode="rand")
    erased, _ = Preprocess(WIDE, CPU, 2, augmentation=config)(images, torch.zeros(8, dtype=torch.int64))
    # One colour for a rectangle: so many values for an image as it has channels, and white.
    assert all(len(channel.unique()) <= 2 for image in erased for channel in image)


def test_mixing_takes_its_options():
    config = AugmentationConfig(mixup=0.3, cutmix=0.7, mixup_prob=0.9, mixup_switch_prob=0.4)
    mix = Preprocess(WIDE, CPU, 2, augmentation=config).mix
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob) == (0.3, 0.7, 0.9, 0.4)


@pytest.mark.parametrize(("cores", "workers"), [(3, 3), (64, 8), (None, 1)])
def test_files_are_read_by_a_worker_for_each_core_up_to_eight(cores, workers, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert resolve_workers(DataConfig(name="somewhere")) == workers
    assert resolve_workers(DataConfig(name="digits")) == 0


def test_digits_have_17_greys_from_black_to_white():
    digits = load_digits()
    greys = np.unique(np.stack([np.asarray(image) for image in digits.images[:200]]))
    # 255 / 16 = 15.9375 each, rounded.
    assert greys.tolist() == [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
