"""Which images of a data set train, which choose the best model, and what their classes are, however it is stored."""

import os
import tarfile

import numpy as np
import pytest
from layouts import add_file, png
from PIL import Image

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.train.config import DataConfig
from vicinal.train.data import readers
from vicinal.train.data.folders import FolderImages
from vicinal.train.data.images import ArrayImages, Selection, open_images, split_by_class
from vicinal.train.data.splits import group_files, part_of_folder

PNG = png(Image.new("RGB", (4, 4), (9, 9, 9)))


def opened(name, **options):
    """The train split, the val split, and the notes."""
    notes = []
    train, val = open_images(DataConfig(name=str(name), **options), notes.append)
    return train, val, [note.replace(str(name), "ROOT") for note in notes]


def write_tree(root, folders):
    """So many images in each folder, called by their numbers; those of a folder are its own class by their size."""
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.png").write_bytes(PNG)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("train", "train"), ("Training", "train"), ("TRAIN", "train"), ("train2017", "train"), ("val", "val")),
        *(("Valid", "val"), ("validation", "val"), ("dev", "val"), ("test", "test"), ("Testing", "test")),
        *(("latest", None), ("trainer", None), ("steam_train", None), ("test tube", None), ("trainval", None)),
    ],
)
def test_folders_are_parts_by_whole_words_in_any_case(name, part):
    assert part_of_folder(name) == part


@pytest.mark.parametrize(
    ("path", "part"),
    [
        *(("train-00000-of-00002.parquet", "train"), ("digits-VAL-0.tar", "val"), ("x_valid.tar", "val")),
        *(("test-0.tar", "test"), ("latest/train-0.parquet", "train"), ("latest/0.parquet", None)),
        *(("x-train.tar.gz/val-0.parquet", "val"), ("val/x-train.tar.gz-0.tar", "val"), ("my-test/0.tar", "test")),
        *(("train/0.parquet", "train"), ("validation/0000.parquet", "val"), ("val-0-of-x-train.tar", "val")),
        *(("contrast-0.tar", None), ("trainval-0.tar", None), ("data/train/latest.tar", "train")),
    ],
)
def test_files_are_of_parts_by_whole_words(path, part):
    assert group_files([path]) == {part: [path]}


@pytest.mark.parametrize("paths", [["train/val-0.tar"], ["val-0.tar", "valid-0.tar"], ["dev/0.tar", "val/0.tar"]])
def test_files_of_parts_that_cannot_be_told_apart_are_refused(paths):
    with pytest.raises(UserError, match=r"names two parts|are both called a val part"):
        group_files(paths)


TREES = {
    "Roboflow's": ({"train": 4, "valid": 2, "test": 3}, (8, 4), ["ROOT: not read: test"]),
    "capitals": ({"Train": 4, "Val": 2}, (8, 4), []),
    "dev": ({"training": 4, "dev": 2, "extra": 1}, (8, 4), ["ROOT: not read: extra"]),
    "years": ({"train2017": 4, "val2017": 2}, (8, 4), []),
    "test never chooses": ({"train": 5, "test": 4}, (8, 2), ["ROOT: not read: test"]),
    "test only": ({"test": 4}, (0, 8), ["ROOT: nothing to train on, the part test only"]),
    "val and test": (
        {"test": 4, "val": 3},
        (0, 6),
        ["ROOT: not read: test", "ROOT: nothing to train on, the part val only"],
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_parts_of_folders(name, tmp_path):
    parts, (train_count, val_count), expected = TREES[name]
    write_tree(tmp_path, {f"{part}/{label}": count for part, count in parts.items() for label in ("cat", "dog")})
    train, val, notes = opened(tmp_path)
    assert (len(train.targets), len(val.targets)) == (train_count, val_count)
    assert list(train.classes) == list(val.classes) == ["cat", "dog"]
    assert np.bincount(val.targets).tolist() == [val_count // 2] * 2
    assert notes == expected
    folder = next(
        part
        for part in parts
        if part_of_folder(part) == ("train" if train_count else "val" if "val" in parts else "test")
    )
    source = train.images if isinstance(train, Selection) else train
    assert source.root == tmp_path / folder


def test_a_class_may_be_called_like_a_part(tmp_path):
    write_tree(tmp_path, {"train": 5, "plane": 5, "test": 5})
    train, val, notes = opened(tmp_path)
    assert train.classes == ["plane", "test", "train"]
    assert np.bincount(train.targets).tolist() == [4, 4, 4]
    assert np.bincount(val.targets).tolist() == [1, 1, 1]
    assert notes == []


def test_unlabelled_test_images_are_not_read(tmp_path):
    write_tree(tmp_path, {"train/cat": 5, "train/dog": 5, "test": 4})
    train, val, notes = opened(tmp_path)
    assert (len(train.targets), len(val.targets)) == (8, 2)
    assert notes == ["ROOT: not read: test (images in no class folders)"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"train/s1": 2, "plane/s1": 2}, "is train a part of the data, or a class like plane"),
        ({"train": 2, "val": 2}, "the images in train, val lie in no class folders"),
        ({"train/a": 2, "val/a": 2, "dev/a": 2}, "dev and val are the same part"),
        ({"Train/a": 2, "train/a": 2}, "are the same part"),
        ({"train/a": 2, "val/b": 2}, "classes without training images: b"),
    ],
)
def test_folders_that_cannot_be_told_apart_are_refused(folders, message, tmp_path):
    write_tree(tmp_path, folders)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_the_first_level_of_folders_is_the_class(tmp_path):
    write_tree(tmp_path, {"cat/s1": 2, "cat/s2/deep": 1, "dog/s1": 2})
    images = FolderImages(tmp_path)
    assert images.classes == ["cat", "dog"]
    assert images.paths == [
        *(f"cat/s1/{n}.png" for n in (0, 1)),
        "cat/s2/deep/0.png",
        *(f"dog/s1/{n}.png" for n in (0, 1)),
    ]
    assert images.targets == [0, 0, 0, 1, 1]
    assert images.left_out == []


@pytest.fixture
def untidy(tmp_path):
    """Two classes, and all that may lie in and beside their folders."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    write_tree(root, {"cat": 2, "dog/x/y": 2, ".ipynb_checkpoints": 1, "empty": 0})
    write_tree(tmp_path, {"outside": 1, "other": 1})
    (root / "stray.png").write_bytes(PNG)
    (root / "notes.txt").write_text("nothing to see here")
    (root / "cat" / ".hidden.png").write_bytes(PNG)
    (root / "cat" / "no_ending").write_bytes(PNG)
    (root / "cat" / "short").write_bytes(b"x")
    for suffix, kind in {".WEBP": "webp", ".bmp": "bmp", ".Tif": "tiff", ".gif": "gif", ".avif": "avif"}.items():
        Image.new("RGB", (8, 8)).save(root / "cat" / f"it{suffix}", format=kind)
    os.mkfifo(root / "cat" / "pipe.jpg")
    links = {
        "back": root,
        "alias": root / "dog",
        "cat/up": root / "cat",
        "cat/gone.png": tmp_path / "gone",
        "linked": outside,
    }
    for name, target in {**links, "cat/loop.png": root / "cat/loop.png"}.items():
        (root / name).symlink_to(target)
    # Two folders outside that lead to each other.
    (outside / "next").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "next").symlink_to(outside)
    return root


LEFT_OUT = [
    "ROOT: 2 left out, hidden: .ipynb_checkpoints, cat/.hidden.png",
    "ROOT: 4 left out, links to what is read anyway, or around in a circle: alias, back, cat/up, linked/next/next",
    "ROOT: 3 left out, neither file nor folder: cat/gone.png, cat/loop.png, cat/pipe.jpg",
    "ROOT: 2 left out, no images: cat/short, notes.txt",
    "ROOT: 1 left out, images beside the class folders: stray.png",
    "ROOT: 1 left out, folders without images: empty",
]


def test_what_lies_beside_the_images_is_named_and_no_class(untidy):
    images = FolderImages(untidy)
    assert images.classes == ["cat", "dog", "linked"]
    assert [os.path.basename(path) for path in images.paths if path.startswith("cat")] == [
        *("0.png", "1.png", "it.avif", "it.bmp", "it.gif", "it.Tif", "it.WEBP", "no_ending")
    ]
    assert np.bincount(images.targets).tolist() == [8, 2, 2]
    assert all(images.load(index).mode == "RGB" for index in range(12))
    assert sorted(line.replace(str(untidy), "ROOT") for line in images.left_out) == sorted(LEFT_OUT)


def test_commands_name_what_is_not_read(untidy, train, capsys):
    assert main(["data", "check", str(untidy)]) == 0
    shown = capsys.readouterr().out.replace(str(untidy), "ROOT")
    assert all(line in shown for line in LEFT_OUT)
    assert "val: 4 images in 3 classes" in shown
    assert train("--data", untidy, "--batch-size", 2, "--workers", 0, "--dry-run")[0] == 0
    shown = capsys.readouterr().err.replace(str(untidy), "ROOT")
    assert all(line in shown for line in LEFT_OUT)


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            add_file(archive, name, content)


def write_shard(path, labels):
    """A WebDataset shard with an image of each label."""
    pairs = {
        f"{number}.{kind}": (PNG, str(label).encode()) for number, label in enumerate(labels) for kind in ("png", "cls")
    }
    write_tar(path, {name: content[name.endswith("cls")] for name, content in pairs.items()})


def write_table(path, labels, names=("a", "b")):
    import pyarrow as pa
    from datasets import ClassLabel, Features
    from datasets import Image as ImageColumn
    from pyarrow import parquet

    features = Features({"image": ImageColumn(), "label": ClassLabel(names=list(names))})
    rows = {"image": [{"bytes": PNG, "path": None}] * len(labels), "label": list(labels)}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(rows, schema=features.arrow_schema), path)


SHARDS = {
    "three parts": ({"train-0": 4, "valid-0": 2, "test-0": 3}, (8, 4), "test-0"),
    "a word inside another": ({"latest/train-0": 4, "latest/val-0": 2}, (8, 4), None),
    "folders": ({"train/0": 4, "val/x-train.gz-0": 2, "test/0": 1}, (8, 4), "0"),
    "no part": ({"train-0": 4, "dev-0": 2, "extra": 3}, (8, 4), "extra"),
}


@pytest.mark.parametrize("kind", ["wds", "hfids"])
@pytest.mark.parametrize("name", SHARDS)
def test_parts_of_streamed_shards(kind, name, tmp_path):
    files, counts, unread = SHARDS[name]
    write, suffix = (write_shard, "tar") if kind == "wds" else (write_table, "parquet")
    for file, per_class in files.items():
        write(tmp_path / f"{file}.{suffix}", [0, 1] * per_class)
    train, val, notes = opened(f"{kind}/{tmp_path}")
    assert (len(train), len(val)) == counts
    assert len(notes) == (unread is not None)
    if unread is not None:
        # A stream's part goes by its name, whatever its files are called.
        assert notes == [f"ROOT: not read: {'shards that name no part' if unread == 'extra' else 'test'}"]


@pytest.mark.parametrize("name", ["three parts", "no part"])
def test_parts_of_shards_in_a_folder(name, tmp_path):
    files, counts, unread = SHARDS[name]
    for file, per_class in files.items():
        write_shard(tmp_path / f"{file}.tar", [0, 1] * per_class)
    (tmp_path / "old.tar.gz").write_bytes(b"x")
    train, val, notes = opened(tmp_path)
    assert (len(train.targets), len(val.targets)) == counts
    assert notes == ["ROOT: not read: old.tar.gz", f"ROOT: not read: {unread}.tar"]


def test_parts_of_tables_in_a_folder(tmp_path):
    for file, per_class in {"latest/train-0": 4, "valid-0": 2, "test-0": 3}.items():
        # The test part is not even looked at: its label is none.
        write_table(tmp_path / f"{file}.PARQUET", [-1] if file == "test-0" else [0, 1] * per_class)
    train, val, notes = opened(tmp_path, data_dir=str(tmp_path / "cache"))
    assert (len(train.targets), len(val.targets)) == (8, 4)
    assert notes == ["ROOT: not read: test-0.PARQUET"]


@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_a_stream_is_not_chosen_by_its_test_part(kind, tmp_path):
    write, suffix = (write_shard, "tar") if kind == "wds" else (write_table, "parquet")
    write(tmp_path / f"test-0.{suffix}", [0, 1, 1])
    train, val, notes = opened(f"{kind}/{tmp_path}")
    assert (len(train.targets), len(val.targets)) == (0, 3)
    assert list(val.targets) == [0, 1, 1]
    assert notes == ["ROOT: nothing to train on, the part test only"]
    write(tmp_path / f"train-0.{suffix}", [0, 1, 1])
    with pytest.raises(
        UserError, match="no shards of a val split, which a stream needs; the test part is not for choosing"
    ):
        opened(f"{kind}/{tmp_path}")


def test_data_sets_by_name_are_not_chosen_by_their_test_part(monkeypatch):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    splits = {
        name: datasets.Dataset.from_dict({"image": [{"bytes": PNG}] * count, "label": [0, 1] * (count // 2)}, features)
        for name, count in {"train": 10, "test": 6, "unsupervised": 2}.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, cache_dir: splits)
    train, val, notes = opened("hfds/someone/set")
    assert (len(train.targets), len(val.targets)) == (8, 2)
    assert notes == ["ROOT: not read: test, unsupervised"]
    train, val, notes = opened("hfds/someone/set:test")
    assert (len(train.targets), list(val.targets)) == (0, [0, 1] * 3)
    with pytest.raises(UserError, match="has no part val, but train, test, unsupervised"):
        opened("hfds/someone/set:val")


def test_torchvision_data_sets_without_validation_are_not_chosen_by_their_test_images(monkeypatch):
    asked = []

    class Dataset:
        targets, classes = [0, 1] * 5, ["a", "b"]

        def __getitem__(self, index):
            return Image.new("L", (2, 2)), 0

    monkeypatch.setattr(readers, "create_dataset", lambda name, split, **_: asked.append((name, split)) or Dataset())
    train, val, notes = opened("torch/cifar10")
    assert (len(train.targets), len(val.targets), asked) == (8, 2, [("torch/cifar10", "train")])
    assert "not read: test" in notes[0]
    train, val, _ = opened("torch/cifar10:test")
    assert (len(train.targets), len(val.targets), asked[1:]) == (0, 10, [("torch/cifar10", "validation")])
    train, val, _ = opened("torch/imagenet")
    assert (len(train.targets), len(val.targets)) == (10, 10)


def test_a_part_for_measuring_alone_is_not_trained_on(tmp_path, train, capsys):
    write_tree(tmp_path, {"test/cat": 2, "test/dog": 2})
    assert train("--data", tmp_path, "--batch-size", 2)[0] == 2
    assert "error: --data: no training images; a val or test split alone" in capsys.readouterr().err


def classes_of(images):
    return {name: list(map(int, images.targets)).count(index) for index, name in enumerate(images.classes)}


def tar_images(*paths):
    return readers.TarImages(paths)


def test_the_first_folder_in_an_archive_is_the_class(tmp_path):
    write_tar(
        tmp_path / "all.tar", {"./cat/s1/0.webp": PNG, "cat/s2/0.png": PNG, "dog/s1/0.png": PNG, "dog/a.txt": b"x" * 20}
    )
    images = tar_images(tmp_path / "all.tar")
    assert classes_of(images) == {"cat": 2, "dog": 1}
    assert [line.partition("all.tar: ")[2] for line in images.left_out] == ["1 left out, no images: dog/a.txt"]
    write_tar(tmp_path / "wrapped.tar", {"data/cat/0.png": PNG, "data/dog/0.png": PNG, "data/dog/s/0.png": PNG})
    images = tar_images(tmp_path / "wrapped.tar")
    assert classes_of(images) == {"cat": 1, "dog": 2}
    assert "all images lie in data/, whose folders are the classes" in images.left_out[0]


def test_an_archive_of_a_class_holds_nothing_else(tmp_path):
    write_tar(tmp_path / "cat.tar", {"0.png": PNG, "s1/0.png": PNG, ".x/0.png": PNG, "._0.png": PNG})
    write_tar(tmp_path / "train.tar", {"0.png": PNG})
    train, _, notes = opened(tmp_path, val_fraction=0.5)
    assert classes_of(train.images) == {"cat": 2, "train": 1}
    assert any("2 left out, hidden: .x/0.png, ._0.png" in note for note in notes)


def test_parts_inside_an_archive_are_refused(tmp_path):
    write_tar(tmp_path / "data.tar", {"train/cat/0.png": PNG, "val/cat/0.png": PNG})
    with pytest.raises(UserError, match="holds the parts train, val: unpack it"):
        opened(tmp_path / "data.tar")


def test_archives_of_parts(tmp_path):
    for part, count in {"train": 4, "val": 2, "test": 1}.items():
        write_tar(tmp_path / f"{part}.tar", {f"{label}/{n}.png": PNG for label in "ab" for n in range(count)})
    train, val, notes = opened(tmp_path)
    assert (classes_of(train), classes_of(val)) == ({"a": 4, "b": 4}, {"a": 2, "b": 2})
    assert notes == ["ROOT: not read: test.tar"]


def test_a_class_keeps_an_image_to_train_on():
    images = ArrayImages(np.zeros((8, 2, 2), np.uint8), [0, 0, 0, 0, 0, 1, 2, 2], ["many", "one", "two"])
    notes = []
    train, val = split_by_class(images, 0.9, 0, notes.append)
    assert np.bincount(train.targets).tolist() == [1, 1, 1]
    assert np.bincount(val.targets, minlength=3).tolist() == [4, 0, 1]
    assert notes == ["1 classes with a single image train on it, and val has none of them: one"]
    with pytest.raises(UserError, match="no class has two images, so that val would have none: a, b"):
        split_by_class(ArrayImages(np.zeros((2, 2, 2), np.uint8), [0, 1], ["a", "b"]), 0.2, 0)


def test_what_a_part_lacks_is_said(tmp_path):
    write_tree(tmp_path, {"train/cat": 4, "train/dog": 4, "val/cat": 2})
    _, val, notes = opened(tmp_path)
    assert list(val.classes) == ["cat", "dog"]
    assert notes == ["ROOT: no val images of 1 classes: dog"]
    write_tree(tmp_path / "more", {"images/cat": 2, "images/dog": 2})
    assert opened(tmp_path / "more")[2] == ["ROOT: a single class, images; a folder for each class is wanted below it"]


def test_tables_must_name_their_classes_alike(tmp_path):
    write_table(tmp_path / "train-0.parquet", [0, 1])
    write_table(tmp_path / "val-0.parquet", [0, 1], names=("b", "a"))
    for name in (tmp_path, f"hfids/{tmp_path}"):
        with pytest.raises(
            UserError, match=r"name their classes differently|the val split b, a|has no training images"
        ):
            opened(name)
