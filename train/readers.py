"""Data sets that are not trees of image files: tar and WebDataset shards, Hugging Face and torchvision data sets.

Each gives random access, so that the order of a run, its resuming and the changes to each image are the same as for a
folder. Archives are read by position, which any number of threads and forked processes can do at a time.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from .decode import open_image
from .decoding import UnreadableImage
from .errors import UserError, first_line

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "test")}
"""What the parts of a data set are called."""
IMAGENET = (1281167, 50000, 1000)
"""Training images, held-out images and classes of ImageNet-1k."""


class Slice(NamedTuple):
    """Where an image lies in an archive, in bytes."""

    offset: int
    size: int


def _load_slice(path: Path, offset: int, size: int) -> Image.Image:
    name = f"at byte {offset} of {path}"
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise UnreadableImage(f"cannot read image {name}: {first_line(error)}") from error
    return open_image(content, name)


class TarImages:
    """Images in one tar file, or in several of a folder; the folder in the archive or else its name is the class.

    Only headers are read at the start. timm's reader reads whole archives, and keeps a pickled index beside them that
    the processes of a run would write at the same time.

    Args:
        root: a tar file, or a folder of them; tar files inside a tar file are looked into too.
        class_to_idx: class indices by name; numbered in natural order of the names if not given.
    """

    def __init__(self, root: Path, class_to_idx: dict[str, int] | None = None):
        self.archives = [root] if root.is_file() else sorted(root.glob("*.tar"))
        found = []
        for number, path in enumerate(self.archives):
            with _open_archive(path) as archive:
                found += [(label, name, number, *image) for label, name, image in _walk(archive, path.stem)]
        if not found:
            raise UserError(f"--data {root}: no images in its tar files")
        # As a folder of them would be read.
        found.sort(key=lambda entry: natural_key(f"{entry[0]}/{entry[1]}"))
        names = sorted({label for label, *_ in found}, key=natural_key)
        self.class_to_idx = class_to_idx or {name: index for index, name in enumerate(names)}
        unknown = [name for name in names if name not in self.class_to_idx]
        if unknown:
            raise UserError(f"{root}: classes without training images: {', '.join(unknown[:5])}")
        self.classes = sorted(self.class_to_idx, key=self.class_to_idx.get)
        self.samples = np.array([entry[2:] for entry in found], dtype=np.int64)
        self.targets = [self.class_to_idx[label] for label, *_ in found]

    def load(self, index: int) -> Image.Image:
        archive, offset, size = self.samples[index].tolist()
        return _load_slice(self.archives[archive], offset, size)


@contextmanager
def _open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"--data: cannot read shard {path}: {first_line(error)}") from error


def _walk(archive: tarfile.TarFile, label: str, start: int = 0) -> Iterator[tuple[str, str, Slice]]:
    """Class, name and place of each image.

    Args:
        label: class of images that lie in no folder.
        start: where the archive begins in its file.
    """
    extensions = get_img_extensions(as_set=True)
    for member in archive:
        path, place = PurePosixPath(member.name), start + member.offset_data
        if path.suffix == ".tar":
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                yield from _walk(inner, path.stem, place)
        elif member.isfile() and path.suffix.lower() in extensions:
            yield path.parent.name or label, path.name, Slice(place, member.size)


class WebDatasetImages:
    """Images in WebDataset shards: KEY.jpg (or another image format) beside KEY.cls, or KEY.json with a ``label``.

    Opening them reads the headers of all shards, once in each process.

    Args:
        shards: tar files.
        num_classes: if not given, one more than the highest class index.
    """

    def __init__(self, shards: Sequence[Path], num_classes: int | None = None):
        self.shards = sorted(shards, key=lambda path: natural_key(path.name))
        found = [(shard, *entry) for shard, path in enumerate(self.shards) for entry in _read_shard(path)]
        if not found:
            raise UserError(f"--data {shards[0].parent}: no images with classes in its shards")
        # Shard, offset and size of each image; an array, since millions of tuples are copied into every worker.
        self.samples = np.array([(shard, *image) for shard, image, _ in found], dtype=np.int64)
        self.targets = [target for *_, target in found]
        count = num_classes or max(self.targets) + 1
        if max(self.targets) >= count:
            raise UserError(f"{shards[0].parent}: class {max(self.targets)} has no training images")
        self.classes = [str(index) for index in range(count)]

    def load(self, index: int) -> Image.Image:
        shard, offset, size = self.samples[index].tolist()
        return _load_slice(self.shards[shard], offset, size)


def _read_shard(path: Path) -> Iterator[tuple[Slice, int]]:
    with _open_archive(path) as archive:
        yield from read_pairs(archive)


def read_pairs(archive: tarfile.TarFile) -> Iterator[tuple[Slice, int]]:
    """Place and class index of each image of a WebDataset shard, in its order."""
    extensions = get_img_extensions(as_set=True)
    image: tuple[str, Slice] | None = None
    target: tuple[str, int] | None = None
    for member in archive:
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key = f"{folder}/{stem}"
        if f".{ending.lower()}" in extensions:
            image = key, Slice(member.offset_data, member.size)
        elif ending in ("cls", "json"):
            label = _read_label(archive.extractfile(member).read(), ending)
            target = (key, label) if label is not None else target
        if image and target and image[0] == target[0]:
            yield image[1], target[1]
            image = target = None


def _read_label(content: bytes, ending: str) -> int | None:
    if ending == "cls":
        return int(content)
    label = json.loads(content)
    label = label.get("label") if isinstance(label, dict) else None
    return label if isinstance(label, int) else None


def find_shards(root: Path, names: Sequence[str]) -> list[Path]:
    """The tar files of a folder; of those that name a split, only the ones of a split in ``names``.

    Raises:
        UserError: ``_info.json`` of the folder lists a shard that is not there.
    """
    listed = root / "_info.json"
    if listed.is_file():
        splits = json.loads(listed.read_text(encoding="utf-8")).get("splits", {})
        for name in (name for split in splits.values() for name in split.get("filenames", ())):
            if not (root / name).is_file():
                raise UserError(f"--data {root}: shard {name} is missing, which _info.json lists")
    return [path for path in sorted(root.glob("*.tar")) if any(name in path.name for name in names)]


def is_webdataset(path: Path) -> bool:
    """Whether the first entries of a tar file are those of a WebDataset shard."""
    with _open_archive(path) as archive:
        return any(member.name.endswith((".cls", ".json")) for member, _ in zip(archive, range(16), strict=False))


class HuggingFaceImages:
    """A split of a data set of the package ``datasets``, with the columns ``image`` and ``label``.

    Args:
        split: a ``datasets.Dataset``.
        name: of the data set and the split, for messages.
    """

    def __init__(self, split: Any, name: str):
        from datasets import ClassLabel
        from datasets import Image as ImageColumn

        missing = [column for column in ("image", "label") if column not in split.column_names]
        if missing:
            raise UserError(f"--data {name}: no column {missing[0]}, but {', '.join(split.column_names)}")
        self.split, self.name = split.cast_column("image", ImageColumn(decode=False)), name
        self.targets = list(split["label"])
        if not all(isinstance(target, int) for target in self.targets):
            raise UserError(f"--data {name}: its column label holds {self.targets[0]!r}; class indices are wanted")
        label = split.features["label"]
        count = max(self.targets) + 1
        self.classes = list(label.names) if isinstance(label, ClassLabel) else [str(index) for index in range(count)]

    def load(self, index: int) -> Image.Image:
        entry, name = self.split[index]["image"], f"{index} of {self.name}"
        try:
            content = entry["bytes"] or Path(entry["path"]).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"cannot read image {name}: {first_line(error)}") from error
        return open_image(content, name)


def open_hugging_face(
    name: str, data_dir: str | None, files: dict[str, list[str]] | None = None
) -> list[HuggingFaceImages]:
    """The training split of a data set, and the held-out one if it has any.

    Args:
        name: on the hub, or a folder.
        data_dir: where ``datasets`` keeps its Arrow files; its own cache if not given.
        files: parquet files by split, where they lie in a folder.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"--data {name}: needs datasets; pip install 'vicinal[data]'") from error
    source, options = ("parquet", {"data_files": files}) if files else (name, {})
    try:
        splits = datasets.load_dataset(source, cache_dir=data_dir, **options)
    except Exception as error:
        # Of the hub, of the network, of the files: datasets has no common base for what it raises.
        raise UserError(f"--data {name}: {first_line(error)}") from error
    if "train" not in splits:
        raise UserError(f"--data {name}: has no split train, but {', '.join(splits)}")
    held_out = [split for split in ("validation", "val", "test") if split in splits][:1]
    return [HuggingFaceImages(splits[split], f"{name}, {split}") for split in ("train", *held_out)]


def find_parquet(root: Path, splits: dict[str, Sequence[str]]) -> dict[str, list[str]]:
    """The parquet files of a folder and of those in it, by split; all are of the training split if none names one.

    Args:
        splits: parts of the names of files or of folders below ``root``, by split.
    """
    found = sorted(root.glob("*.parquet")) + sorted(root.glob("*/*.parquet"))
    names = {path: path.relative_to(root).as_posix() for path in found}
    files = {
        split: [str(path) for path, name in names.items() if any(part in name for part in parts)]
        for split, parts in splits.items()
    }
    files = files if files["train"] else {"train": [str(path) for path in found]}
    return {split: paths for split, paths in files.items() if paths}


class TorchvisionImages:
    """A split of a data set of torchvision, by its name in ``timm.data.create_dataset``.

    Args:
        name: such as torch/cifar10.
        split: train or validation.
        data_dir: where its files are.
        download: fetch them if they are not there.
    """

    def __init__(self, name: str, split: str, data_dir: str | None, download: bool):
        options = {"download": True} if download else {}
        try:
            self.dataset = create_dataset(name, root=data_dir or "data", split=split, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError, OSError) as error:
            raise UserError(f"--data {name}, --data-dir {data_dir or 'data'}: {first_line(error)}") from error
        if not hasattr(self.dataset, "targets"):
            raise UserError(f"--data {name}: torchvision's {type(self.dataset).__name__} does not list its classes")
        self.targets = [int(target) for target in self.dataset.targets]
        self.classes = [name if isinstance(name, str) else name[0] for name in self.dataset.classes]

    def load(self, index: int) -> Image.Image:
        try:
            return self.dataset[index][0].convert("RGB")
        except OSError as error:
            raise UnreadableImage(f"cannot read image {index}: {first_line(error)}") from error


class SyntheticImages:
    """Noise in the colour of its class, made when asked for: for tests of speed, and of recipes without their data.

    Args:
        count: images.
        num_classes: which follow each other.
        seed: images of different seeds differ.
        side: height and width in pixels.
    """

    def __init__(self, count: int, num_classes: int, seed: int, side: int = 256):
        self.seed, self.side = seed, side
        self.targets = np.arange(count) % num_classes
        self.classes = [str(index) for index in range(num_classes)]

    def load(self, index: int) -> Image.Image:
        color = np.random.default_rng(int(self.targets[index])).integers(0, 192, 3)
        noise = np.random.default_rng((self.seed, index)).integers(0, 64, (self.side, self.side, 3), dtype=np.uint8)
        return Image.fromarray(noise + color.astype(np.uint8))


def open_synthetic(name: str) -> tuple[SyntheticImages, SyntheticImages]:
    """``synthetic``, as many images as ImageNet-1k has; or ``synthetic/IMAGES/CLASSES``, a fifth more held out."""
    parts = name.split("/")[1:]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) not in (0, 2):
        raise UserError(f"--data {name}: give synthetic, or synthetic/IMAGES/CLASSES such as synthetic/5000/10")
    train, held_out, classes = IMAGENET
    if parts:
        train, classes = map(int, parts)
        held_out = max(classes, train // 5)
    return SyntheticImages(train, classes, seed=0), SyntheticImages(held_out, classes, seed=1)
