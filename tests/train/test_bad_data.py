"""Data that is not what it should be: one line that says so, before any work is lost; never a wrong label or image."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from layouts import add_file, png
from PIL import Image
from pyarrow import parquet

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.train.config import AugmentationConfig, DataConfig
from vicinal.train.data.decode import UnreadableImage
from vicinal.train.data.images import open_images
from vicinal.train.data.loader import IGNORED_TARGET, NoReplacement, UnreadableCounter
from vicinal.train.data.order import SampleKey
from vicinal.train.data.readers import TarImages, WebDatasetImages, read_info
from vicinal.train.data.stream_files import TarShards
from vicinal.train.data.streams import StreamImages
from vicinal.train.data.transforms import EvalDataset, InputSpec, Preprocess, TrainDataset, train_batches
from vicinal.train.run.world import World

CPU = torch.device("cpu")
SPEC = InputSpec((4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
PNG = png(Image.new("RGB", (4, 4), (9, 9, 9)))


def opened(name, **options):
    notes = []
    return (*open_images(DataConfig(name=str(name), **options), notes.append), notes)


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                add_file(archive, name, content)
    return path


def entry(name, kind, target=""):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return name, found


def pairs(*labels):
    return [
        file
        for number, label in enumerate(labels)
        for file in ((f"{number}.png", PNG), (f"{number}.cls", str(label).encode()))
    ]


# What opens shards as they are indexed and as they are streamed.
READERS = {"indexed": lambda path: WebDatasetImages([path]), "streamed": lambda path: TarShards([str(path)])}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("1000000000", "class 1000000000; 0 to 99999 are allowed"),
        ("9" * 30, "0.cls holds b'99999999999999999999', not a class index"),
        ("1_0", "0.cls holds b'1_0', not a class index"),
        ("cat", "0.cls holds b'cat', not a class index"),
        ("", "0.cls holds b'', not a class index"),
    ],
)
def test_labels_that_are_none_are_named(reader, label, message, tmp_path):
    path = write_tar(tmp_path / "train.tar", pairs(label, 1))
    with pytest.raises(UserError, match=rf"train\.tar.*{message}"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "odd",
    [
        entry("0.cls", tarfile.DIRTYPE),
        entry("0.cls", tarfile.SYMTYPE, "/etc/hostname"),
        entry("0.cls", tarfile.LNKTYPE, "1.cls"),
    ],
)
def test_labels_that_are_no_files_are_named(reader, odd, tmp_path):
    path = write_tar(tmp_path / "train.tar", [("0.png", PNG), odd, *pairs(0, 1)[2:]])
    with pytest.raises(UserError, match=r"cannot read shard .*train\.tar: 0\.cls is no file"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_labels_in_json_are_whole_numbers(reader, tmp_path):
    labels = {"0": {"label": 1}, "1": {"label": True}, "2": {"label": 1.0}, "3": {}, "4": [1], "5": {"label": 0}}
    files = [
        file
        for key, label in labels.items()
        for file in ((f"{key}.png", PNG), (f"{key}.json", json.dumps(label).encode()))
    ]
    path = write_tar(
        tmp_path / "train.tar", [*files, ("6.png", PNG), ("7.a.png", PNG), ("8.jpg", PNG), ("8.cls", b"1")]
    )
    images = READERS[reader](path)
    assert list(getattr(images, "targets", None) or [example.target for example in images.read(0, 0)]) == [1, 0, 1]
    (line,) = images.left_out
    assert line.endswith("whole number): 1.png, 2.png, 3.png, 4.png, 7.a.png, and 1 more")
    unreadable = write_tar(tmp_path / "unreadable.tar", [("0.png", PNG), ("0.json", b"{" * 100_000)])
    with pytest.raises(UserError, match=r"unreadable\.tar: 0\.json is not JSON"):
        READERS[reader](unreadable)


def test_labels_outside_the_classes_are_refused_where_shards_are_indexed(tmp_path):
    write_tar(tmp_path / "train.tar", pairs(0, -1, 1))
    with pytest.raises(
        UserError, match=r"1 of 3 images are of no class of 0 to 1, the first: image at byte 2560 of .*class -1"
    ):
        opened(tmp_path / "train.tar")
    write_tar(tmp_path / "train.tar", pairs(0, 1))
    write_tar(tmp_path / "val.tar", pairs(0, 2))
    with pytest.raises(UserError, match="class 2 has no training images"):
        opened(tmp_path)


def test_labels_outside_the_classes_are_unreadable_in_a_stream(tmp_path, capsys):
    write_tar(tmp_path / "train.tar", pairs(0, -1, 1))
    write_tar(tmp_path / "val.tar", pairs(0, 1))
    train, *_ = opened(f"wds/{tmp_path}")
    with pytest.raises(UnreadableImage, match=r"image 1 of .*train\.tar is of class -1 of 2"):
        train.load(1)
    assert main(["data", "check", f"wds/{tmp_path}"]) == 1
    shown = capsys.readouterr().out
    assert "train: 3 images in 2 classes" in shown
    assert "train.tar is of class -1 of 2" in shown


@pytest.mark.parametrize("reader", [*READERS, "of classes"])
def test_an_archive_that_is_cut_is_refused_wherever_it_is_cut(reader, tmp_path):
    files = pairs(0, 1, 1) if reader in READERS else [(f"{label}/{n}.png", PNG) for label in "ab" for n in range(2)]
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    read = READERS.get(reader, lambda path: TarImages([path]))
    # The end marker is two blocks; one of them is enough to know that nothing is lost.
    last = whole.rstrip(b"\0").__len__() // 512 * 512 + 512
    for size in range(0, last + 512, 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cannot read shard .*cut\.tar"):
            read(path)
    (tmp_path / "cut.tar").write_bytes(whole[: last + 512])
    assert read(tmp_path / "cut.tar")


@pytest.mark.parametrize("reader", READERS)
def test_archives_that_were_joined_or_damaged_are_refused(reader, tmp_path):
    content = write_tar(tmp_path / "one.tar", pairs(0, 1)).read_bytes()
    joined = tmp_path / "joined.tar"
    joined.write_bytes(content + content)
    with pytest.raises(UserError, match=r"joined\.tar: data behind its end at byte \d+: archives were joined"):
        READERS[reader](joined)
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(content[:2048] + b"x" * 512 + content[2560:])
    with pytest.raises(UserError, match=r"damaged\.tar: no end marker at byte 2048"):
        READERS[reader](damaged)


def test_members_that_are_no_files_are_named(tmp_path):
    odd = [
        entry("a/link.png", tarfile.SYMTYPE, "/etc/hostname"),
        entry("a/pipe.png", tarfile.FIFOTYPE),
        entry("a", tarfile.DIRTYPE),
    ]
    images = TarImages([write_tar(tmp_path / "all.tar", [("a/0.png", PNG), ("b/0.png", PNG), *odd])])
    assert len(images.targets) == 2
    assert images.left_out == [
        f"{tmp_path}/all.tar: 2 left out, links, devices or sparse files: a/link.png, a/pipe.png"
    ]
    images = WebDatasetImages(
        [write_tar(tmp_path / "shard.tar", [*pairs(0, 1), entry("2.png", tarfile.SYMTYPE, "0.png")])]
    )
    assert images.left_out == [f"{tmp_path}: 1 left out, links, devices or sparse files: 2.png"]


def test_lengths_of_shards_must_be_true(tmp_path):
    path = write_tar(tmp_path / "train.tar", pairs(0, 1, 0))
    stream = StreamImages(TarShards([str(path)], [2]), ["0", "1"])
    assert stream.example(0).target == 0
    with pytest.raises(UnreadableImage, match=r"the shard holds more than the 2 images of _info\.json"):
        stream.example(1)
    stream = StreamImages(TarShards([str(path)], [4]), ["0", "1"])
    assert stream.example(2).target == 0
    with pytest.raises(UnreadableImage, match="the shard ends after 3 images"):
        stream.example(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has not the form"),
        ('{"splits": []}', "has not the form"),
        ('{"splits": {"train": ["a.tar"]}}', "has not the form"),
        ('{"splits": {"train": {"filenames": "a.tar"}}}', "train: filenames is no list of names"),
        ('{"splits": {"train": {"filenames": [3]}}}', "train: filenames is no list of names"),
        ('{"splits": {"train": {"filenames": ["../a.tar"]}}}', r"\.\./a\.tar lies elsewhere"),
        ('{"splits": {"train": {"filenames": ["/a.tar"]}}}', "/a.tar lies elsewhere"),
        (
            '{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": [-1]}}}',
            "shard_lengths is no list of numbers",
        ),
        ('{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": 3}}}', "shard_lengths is no list of numbers"),
        ("{" * 100_000, "cannot read its _info.json"),
        ("\x00", "cannot read its _info.json"),
    ],
)
def test_lists_of_shards_of_another_form_are_named(content, message, tmp_path):
    (tmp_path / "_info.json").write_text(content)
    for name in (tmp_path, f"wds/{tmp_path}"):
        with pytest.raises(UserError, match=message):
            opened(name)
    with pytest.raises(UserError, match=r"_info\.json"):
        read_info("memory://x", content.encode())


def test_pipes_called_like_data_are_not_waited_for(tmp_path):
    for name in ("_info.json", "train.tar", "train.parquet"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="no images found"):
        opened(tmp_path)
    with pytest.raises(UserError, match="no shards of a train split"):
        opened(f"wds/{tmp_path}")


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_table(path, images, labels, kind=STRUCT):
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels)})
    parquet.write_table(table, path)


GOOD = [{"bytes": PNG, "path": None}] * 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 1, 1], "1 of 4 images are of no class of 0 to 1, the first: image 1 of class -1; classes start at 0"),
        ([0, 10**12, 1, 1], r"image 1 is of class 1000000000000; 0 to 99999 are allowed"),
        ([0, None, 1, 1], "the label of image 1 is None; class indices are wanted"),
        ([0.0, 1.0, 1.0, 1.0], r"the label of image 0 is 0\.0; class indices are wanted"),
    ],
)
def test_labels_of_tables_are_checked(labels, message, tmp_path):
    write_table(tmp_path / "train-0.parquet", GOOD * 2, labels)
    with pytest.raises(UserError, match=message):
        opened(tmp_path, data_dir=str(tmp_path / "cache"))
    write_table(tmp_path / "val-0.parquet", GOOD, [0, 1])
    train, *_ = opened(f"hfids/{tmp_path}", num_classes=2)
    bad = next(index for index, label in enumerate(labels) if label not in (0, 1) or isinstance(label, float))
    with pytest.raises(UnreadableImage, match=rf"image {bad} of .*train-0\.parquet is of class {labels[bad]} of 2"):
        train.load(bad)
    with pytest.raises(UserError, match="--num-classes 1000000000000: at most 100000"):
        opened(f"hfids/{tmp_path}", num_classes=10**12)


def test_tables_open_no_other_files_and_may_hold_nothing(tmp_path):
    target = tmp_path / "elsewhere.png"
    target.write_bytes(PNG)
    images = [*GOOD[:1], None, {"bytes": None, "path": str(target)}, {"bytes": None, "path": None}]
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "train-0.parquet", images * 2, [0, 1] * 4)
    write_table(tmp_path / "data" / "val-0.parquet", GOOD, [0, 1])
    read, *_ = opened(tmp_path / "data", data_dir=str(tmp_path / "cache"))
    streamed, *_ = opened(f"hfids/{tmp_path / 'data'}", num_classes=2)
    for source in (read, streamed):
        assert source.load(0).size == (4, 4)
        for index in (1, 2, 3):
            with pytest.raises(
                UnreadableImage, match=f"cannot read image {index} of .*train.*holds nothing, not the bytes"
            ):
                source.load(index)
    write_table(tmp_path / "data" / "train-0.parquet", [str(target)] * 2, [0, 1], pa.string())
    streamed, *_ = opened(f"hfids/{tmp_path / 'data'}", num_classes=2)
    with pytest.raises(UnreadableImage, match="holds a str, not the bytes of an image"):
        streamed.load(0)
    write_table(tmp_path / "data" / "train-0.parquet", [3, 4], [0, 1], pa.int64())
    (tmp_path / "data" / "val-0.parquet").unlink()
    with pytest.raises(UserError, match="its column image holds no images"):
        opened(tmp_path / "data", data_dir=str(tmp_path / "cache"))


class Spoilt:
    """Ten images of as many classes, of which some cannot be read."""

    def __init__(self, unreadable):
        self.unreadable, self.targets, self.classes = unreadable, list(range(10)), list("0123456789")

    def load(self, index):
        if index in self.unreadable:
            raise UnreadableImage(f"cannot read image {index}")
        return Image.new("RGB", (4, 4), (20 * index,) * 3)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_replacement_has_its_own_class():
    dataset = TrainDataset(Spoilt({3, 4, 9}), to_tensor, 0)
    image, target, messages = dataset[SampleKey(0, 3, 0)]
    assert (target, int(image[0, 0, 0])) == (5, 100)
    assert messages == ("cannot read image 3", "cannot read image 4")
    image, target, messages = dataset[SampleKey(0, 9, 0)]
    assert (target, int(image[0, 0, 0]), messages) == (0, 0, ("cannot read image 9",))
    image, target, messages = EvalDataset(Spoilt({3}), to_tensor)[3]
    assert (target, int(image.max()), messages) == (IGNORED_TARGET, 0, ("cannot read image 3",))
    assert EvalDataset(Spoilt({3}), to_tensor)[4][1:] == (4, ())


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_that_takes_the_place_of_an_image_ends_the_run_in_one_line(workers):
    config = DataConfig(batch_size=2, workers=workers, max_unreadable=1000)
    batches = train_batches(Spoilt(set(range(10))), config, AugmentationConfig(), SPEC, 0, World(CPU))
    with pytest.raises(UnreadableImage, match="100 images in a row cannot be read, the last: cannot read image"):
        next(iter(batches))
    unreadable = UnreadableCounter(5)
    with pytest.raises(UserError, match="nothing; vicinal data check lists all of them"):
        unreadable.add(NoReplacement("nothing"))


def test_a_run_over_unreadable_images_ends_with_exit_code_2(tmp_path, train, capsys):
    for label in "ab":
        for number in range(4):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    assert (
        train("--data", tmp_path / "data", "--batch-size", 2, "--workers", 0, "--max-unreadable", 1000, "--epochs", 1)[
            0
        ]
        == 2
    )
    assert "images in a row cannot be read" in capsys.readouterr().err


def test_mixing_smooths_the_labels():
    images = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    mixing = Preprocess(SPEC, CPU, 4, 0.1, AugmentationConfig(mixup=0.8))
    _, soft = mixing(images, torch.zeros(4, dtype=torch.int64))
    # Of one class whatever is mixed: 1 - 0.1 + 0.1 / 4, and 0.1 / 4 for the others; a few roundings of float32.
    torch.testing.assert_close(soft, torch.tensor([[0.925, 0.025, 0.025, 0.025]] * 4), rtol=0, atol=4e-7)


def test_data_check_says_by_which_range_images_were_read(tmp_path, capsys):
    for folder, values in {"train/a": (0.25, 200), "train/b": (0.75, 0), "val/a": (0.5, 1), "val/b": (1, 0)}.items():
        (tmp_path / folder).mkdir(parents=True)
        for value in values:
            Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / folder / f"{value}.tif")
    assert main(["data", "check", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("scaled unevenly") == 1
    assert "32-bit images are scaled unevenly, by 0 to 1 (2), 0 to 255 (1): store all of them in one range" in shown


def test_data_check_names_a_decompression_bomb(tmp_path, capsys, monkeypatch):
    buffer = io.BytesIO()
    Image.new("L", (40, 40)).save(buffer, format="png")
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(2):
            (tmp_path / label / f"{number}.png").write_bytes(PNG)
    (tmp_path / "a" / "huge.png").write_bytes(buffer.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert main(["data", "check", str(tmp_path)]) == 1
    assert f"cannot read image {tmp_path}/a/huge.png: " in capsys.readouterr().out
