"""Data sets that are not trees of image files: tar and WebDataset shards, Hugging Face and torchvision data sets.

Each gives random access, so that the order of a run, its resuming and the changes to each image are the same as for a
folder. Archives are read by position, which any number of threads and forked processes can do at a time.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key

from ...errors import UserError, first_line
from .decode import UnreadableImage, has_image_header, image_suffixes, open_image
from .folders import find_files
from .splits import LeftOut, group_files, join, part_of_folder

IMAGENET = (1281167, 50000, 1000)
"""Training images, val images and classes of ImageNet-1k."""
INFO = "_info.json"
"""Lists the shards of a WebDataset, in timm's form."""
MAX_CLASSES = 100_000
"""A label beyond it is a mistake; the names and weights of its classes would fill the memory."""
MAX_LABEL_BYTES = 1 << 20
NO_LABEL = "images without a label (KEY.cls or KEY.json with a whole number)"


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


class Member(NamedTuple):
    """An image in an archive."""

    folders: tuple[str, ...]
    label: str
    """Of an image that lies in no folder: the name of its archive."""
    name: str
    archive: int
    place: Slice


class TarImages:
    """Images in one tar file, or in several; the first folder in the archive or else its name is the class.

    Only headers are read at the start. timm's reader reads whole archives, and keeps a pickled index beside them that
    the processes of a run would write at the same time.

    Args:
        archives: tar files; tar files inside a tar file are looked into too.
        class_to_idx: class indices by name; numbered in natural order of the names if not given.

    Attributes:
        left_out: a line for each reason why something in them is not read.
    """

    def __init__(self, archives: Sequence[Path], class_to_idx: dict[str, int] | None = None):
        self.archives, left_out = list(archives), LeftOut()
        where = join([str(path) for path in archives])
        members: list[Member] = []
        for number, path in enumerate(self.archives):
            with open_archive(path) as archive:
                members += _walk(archive, path.stem, number, left_out)
        self.left_out = left_out.lines(where)
        if not members:
            raise UserError(
                f"--data {where}: no images in its tar files{''.join('; ' + line for line in self.left_out)}"
            )
        found = _name_classes(members, where, self.left_out)
        # As a folder of them would be read.
        found.sort(key=lambda entry: natural_key(f"{entry[0]}/{entry[1].name}"))
        names = sorted({label for label, _ in found}, key=natural_key)
        self.class_to_idx = class_to_idx or {name: index for index, name in enumerate(names)}
        unknown = [name for name in names if name not in self.class_to_idx]
        if unknown:
            raise UserError(f"{where}: classes without training images: {join(unknown)}")
        self.classes = sorted(self.class_to_idx, key=self.class_to_idx.get)
        self.samples = np.array([(member.archive, *member.place) for _, member in found], dtype=np.int64)
        self.targets = [self.class_to_idx[label] for label, _ in found]

    def load(self, index: int) -> Image.Image:
        archive, offset, size = self.samples[index].tolist()
        return _load_slice(self.archives[archive], offset, size)


def _name_classes(members: list[Member], where: str, notes: list[str]) -> list[tuple[str, Member]]:
    """Each image with its class: the first folder it lies in, or one below where a single folder holds all of them.

    Raises:
        UserError: the folders are parts of a data set.
    """
    tops = {member.folders[:1] for member in members}
    if len(tops) == 1 and all(len(member.folders) > 1 for member in members):
        notes.append(f"{where}: all images lie in {members[0].folders[0]}/, whose folders are the classes")
        members = [member._replace(folders=member.folders[1:]) for member in members]
        tops = {member.folders[:1] for member in members}
    if len(tops) > 1 and all(top and part_of_folder(top[0]) for top in tops):
        names = sorted(name for (name,) in tops)
        raise UserError(f"--data {where}: holds the parts {join(names)}: unpack it, or make an archive of each")
    # An archive with images in no folder is a class, and so are the folders in it.
    flat = {(member.archive, member.label) for member in members if not member.folders}
    return [
        (member.label if (member.archive, member.label) in flat else member.folders[0], member) for member in members
    ]


@contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file, open for reading; what fails is a :class:`UserError` that names it."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"--data: cannot read shard {path}: {first_line(error)}") from error


def iterate_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, to its end.

    Raises:
        tarfile.ReadError: it ends before its end marker, or goes on behind it: part of it would be lost without a word.
    """
    yield from archive
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end marker at byte {archive.offset}: the archive is cut or damaged")
    while rest := archive.fileobj.read(1 << 20):
        if rest.count(0) != len(rest):
            raise tarfile.ReadError(f"data behind its end at byte {archive.offset}: archives were joined; unpack them")


def _find_fault(member: tarfile.TarInfo) -> str | None:
    """Why a member cannot be an image, if so."""
    if any(part.startswith(".") and part != "." for part in PurePosixPath(member.name).parts):
        return "hidden"
    if not member.isfile() or member.issparse():
        return "links, devices or sparse files"
    return None


def _is_image(member: tarfile.TarInfo, archive: tarfile.TarFile) -> bool:
    if PurePosixPath(member.name).suffix.lower() in image_suffixes():
        return True
    return has_image_header(archive.extractfile(member).read(16))


def _walk(archive: tarfile.TarFile, label: str, number: int, left_out: LeftOut, start: int = 0) -> Iterator[Member]:
    """The images of an archive.

    Args:
        label: class of images that lie in no folder.
        number: of the archive.
        start: where the archive begins in its file.
    """
    for member in iterate_members(archive):
        path, place = PurePosixPath(member.name), start + member.offset_data
        if member.isdir():
            continue
        if fault := _find_fault(member):
            left_out.add(fault, member.name)
        elif path.suffix.lower() == ".tar":
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                yield from _walk(inner, path.stem, number, left_out, place)
        elif _is_image(member, archive):
            folders = tuple(part for part in path.parts[:-1] if part != "/")
            yield Member(folders, label, path.name, number, Slice(place, member.size))
        else:
            left_out.add("no images", member.name)


class WebDatasetImages:
    """Images in WebDataset shards: KEY.jpg (or another image format) beside KEY.cls, or KEY.json with a ``label``.

    Opening them reads the headers of all shards, once in each process.

    Args:
        shards: tar files.
        num_classes: if not given, one more than the highest class index.

    Attributes:
        left_out: a line for each reason why something in them is not read.
    """

    def __init__(self, shards: Sequence[Path], num_classes: int | None = None):
        self.shards, left_out = sorted(shards, key=lambda path: natural_key(path.name)), LeftOut()
        found: list[tuple[int, Slice, int]] = []
        for shard, path in enumerate(self.shards):
            with open_archive(path) as archive:
                found += [(shard, *entry) for entry in read_pairs(archive, left_out)]
        self.left_out = left_out.lines(shards[0].parent)
        if not found:
            reasons = "".join(f"; {line}" for line in self.left_out)
            raise UserError(f"--data {shards[0].parent}: no images with classes in its shards{reasons}")
        # Shard, offset and size of each image; an array, since millions of tuples are copied into every worker.
        self.samples = np.array([(shard, *image) for shard, image, _ in found], dtype=np.int64)
        self.targets = [target for *_, target in found]
        count = count_classes(self.targets, num_classes, shards[0].parent, self._name)
        self.classes = [str(index) for index in range(count)]

    def _name(self, index: int) -> str:
        shard, offset, _ = self.samples[index].tolist()
        return f"at byte {offset} of {self.shards[shard]}"

    def load(self, index: int) -> Image.Image:
        shard, offset, size = self.samples[index].tolist()
        return _load_slice(self.shards[shard], offset, size)


def count_classes(
    targets: Sequence[int], num_classes: int | None, where: object, name: Callable[[int], str] = str
) -> int:
    """The number of classes, after a look at every label.

    Args:
        num_classes: one more than the highest class index, if not given.
        where: the data, for messages.
        name: of an image by its index.

    Raises:
        UserError: a label below 0, or beyond the classes.
    """
    count = max(targets, default=0) + 1 if num_classes is None else num_classes
    if count > MAX_CLASSES:
        largest = max(range(len(targets)), key=targets.__getitem__)
        raise UserError(
            f"--data {where}: image {name(largest)} is of class {targets[largest]}; 0 to {MAX_CLASSES - 1} are allowed"
        )
    outside = [index for index, target in enumerate(targets) if not 0 <= target < count]
    if outside:
        target = targets[outside[0]]
        reason = "classes start at 0" if target < 0 else f"class {target} has no training images"
        raise UserError(
            f"--data {where}: {len(outside)} of {len(targets)} images are of no class of 0 to {count - 1}, the first: "
            f"image {name(outside[0])} of class {target}; {reason}"
        )
    return count


def read_pairs(archive: tarfile.TarFile, left_out: LeftOut | None = None) -> Iterator[tuple[Slice, int]]:
    """Place and class index of each image of a WebDataset shard, in its order.

    Args:
        left_out: told of what belongs to no such pair.

    Raises:
        tarfile.ReadError, ValueError: a label that is none, or a shard that is damaged.
    """
    left_out, suffixes = left_out or LeftOut(), image_suffixes()
    image: tuple[str, str, Slice] | None = None
    target: tuple[str, int] | None = None
    for member in iterate_members(archive):
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, fault = f"{folder}/{stem}", _find_fault(member)
        if member.isdir() and ending not in ("cls", "json"):
            continue
        if ending in ("cls", "json") and fault != "hidden":
            label = _read_label(member, archive, ending)
            target = (key, label) if label is not None else target
        elif fault is None and f".{ending.lower()}" in suffixes:
            if image is not None:
                left_out.add(NO_LABEL, image[1])
            image = key, member.name, Slice(member.offset_data, member.size)
        elif fault is not None or PurePosixPath(base).suffix.lower() in suffixes:
            # The name of an image ends at its first dot.
            left_out.add(fault or NO_LABEL, member.name)
        if image and target and image[0] == target[0]:
            yield image[2], target[1]
            image = target = None
    if image is not None:
        left_out.add(NO_LABEL, image[1])


def _read_label(member: tarfile.TarInfo, archive: tarfile.TarFile, ending: str) -> int | None:
    if not member.isfile():
        raise tarfile.ReadError(f"{member.name} is no file")
    if member.size > MAX_LABEL_BYTES:
        raise tarfile.ReadError(f"{member.name} has {member.size} bytes, more than a label can have")
    content = archive.extractfile(member).read()
    if ending == "cls":
        if not re.fullmatch(rb"\s*[+-]?[0-9]{1,18}\s*", content):
            raise tarfile.ReadError(f"{member.name} holds {content[:20]!r}, not a class index")
        return int(content)
    try:
        label = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise tarfile.ReadError(f"{member.name} is not JSON: {first_line(error)}") from error
    label = label.get("label") if isinstance(label, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def find_tars(root: Path, depth: int) -> dict[str | None, list[Path]]:
    """The tar files in a folder, by the part that they name; None for those that name none.

    Args:
        depth: levels of folders that are looked into; 1 is ``root`` itself.

    Raises:
        UserError: ``_info.json`` of the folder lists a shard that is not there.
    """
    listed = read_info(str(root)) if (root / INFO).is_file() else {}
    for name in (name for filenames, _ in listed.values() for name in filenames):
        if not (root / name).is_file():
            raise UserError(f"--data {root}: shard {name} is missing, which {INFO} lists")
    found = group_files(find_files(root, ".tar", depth))
    return {part: [root / name for name in names] for part, names in found.items()}


def read_info(root: str, content: bytes | None = None) -> dict[str, tuple[list[str], list[int] | None]]:
    """File names and numbers of images of the shards of each split, as ``_info.json`` lists them.

    Args:
        root: the folder or the URL of the shards.
        content: of the file; read from the folder if not given.

    Raises:
        UserError: it is not of that form, or names files outside ``root``.
    """
    try:
        listed = json.loads((Path(root) / INFO).read_bytes() if content is None else content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--data {root}: cannot read its {INFO}: {first_line(error)}") from error
    splits = listed.get("splits") if isinstance(listed, dict) else None
    if not isinstance(splits, dict) or not all(isinstance(entry, dict) for entry in splits.values()):
        raise UserError(f'--data {root}: {INFO} has not the form {{"splits": {{"train": {{"filenames": [...]}}}}}}')
    return {
        name: _check_listed(f"--data {root}: {INFO}, {name}:", entry.get("filenames", []), entry.get("shard_lengths"))
        for name, entry in splits.items()
    }


def _check_listed(where: str, names: Any, lengths: Any) -> tuple[list[str], list[int] | None]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where} filenames is no list of names")
    for path in map(PurePosixPath, names):
        if path.is_absolute() or ".." in path.parts or "://" in str(path):
            raise UserError(f"{where} {path} lies elsewhere")
    if lengths is None:
        return names, None
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise UserError(f"{where} shard_lengths is no list of numbers of images")
    return names, lengths


def is_webdataset(path: Path) -> bool:
    """Whether the first entries of a tar file are those of a WebDataset shard."""
    with open_archive(path) as archive:
        return any(member.name.endswith((".cls", ".json")) for member, _ in zip(archive, range(16), strict=False))


class HuggingFaceImages:
    """A split of a data set of the package ``datasets``, with the columns ``image`` and ``label``.

    Args:
        split: a ``datasets.Dataset``.
        name: of the data set and the split, for messages.
        num_classes: where the labels have no names; if not given, one more than the highest class index.
    """

    def __init__(self, split: Any, name: str, num_classes: int | None = None):
        from datasets import ClassLabel
        from datasets import Image as ImageColumn

        missing = [column for column in ("image", "label") if column not in split.column_names]
        if missing:
            raise UserError(f"--data {name}: no column {missing[0]}, but {', '.join(split.column_names)}")
        try:
            self.split, self.name = split.cast_column("image", ImageColumn(decode=False)), name
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"--data {name}: its column image holds no images: {first_line(error)}") from error
        # Files of images are found by datasets itself; a path in a table could name any file of this machine.
        self.opens_paths = split.info.builder_name == "imagefolder"
        self.targets = list(split["label"])
        if odd := [index for index, target in enumerate(self.targets) if not isinstance(target, int)]:
            found = self.targets[odd[0]]
            raise UserError(f"--data {name}: the label of image {odd[0]} is {found!r}; class indices are wanted")
        label = split.features["label"]
        names = list(label.names) if isinstance(label, ClassLabel) else None
        count = count_classes(self.targets, num_classes if names is None else len(names), name)
        self.classes = names or [str(index) for index in range(count)]

    def load(self, index: int) -> Image.Image:
        entry, name = self.split[index]["image"] or {}, f"{index} of {self.name}"
        if entry.get("bytes") is None and entry.get("path") and self.opens_paths:
            return open_image(entry["path"])
        return open_image(check_content(entry.get("bytes"), name), name)


def check_content(content: Any, name: object) -> bytes:
    """What a table holds for an image.

    Raises:
        UnreadableImage: it is not the content of a file.
    """
    if not isinstance(content, bytes):
        held = "nothing" if content is None else f"a {type(content).__name__}"
        raise UnreadableImage(f"cannot read image {name}: it holds {held}, not the bytes of an image")
    return content


def open_hugging_face(
    name: str, data_dir: str | None, files: dict[str, list[str]] | None = None
) -> dict[str, Callable[..., HuggingFaceImages]]:
    """What opens each split of a data set, by its own name.

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
        raise UserError(f"--data {name}: {first_line(error.__cause__ or error)}") from error
    return {split: partial(HuggingFaceImages, found, f"{name}, {split}") for split, found in splits.items()}


def find_parquet(root: Path) -> dict[str | None, list[str]]:
    """The parquet files of a folder and of those in it, by the part that they name; None for those that name none."""
    found = group_files(find_files(root, ".parquet", depth=2))
    return {part: [str(root / name) for name in names] for part, names in found.items()}


def check_class_names(schemas: dict[str, Any]) -> None:
    """Refuse parquet files that name their classes in different ways: their labels are indices into these names.

    Args:
        schemas: of pyarrow, by file.
    """
    from datasets import ClassLabel, Features

    known: dict[str, list[str] | None] = {}
    for path, schema in schemas.items():
        label = Features.from_arrow_schema(schema).get("label")
        known[path] = list(label.names) if isinstance(label, ClassLabel) else None
    first, *rest = known
    other = next((path for path in rest if known[path] != known[first]), None)
    if other is not None:
        raise UserError(f"--data: {first} and {other} name their classes differently: {known[first]}, {known[other]}")


class TorchvisionImages:
    """A split of a data set of torchvision, by its name in ``timm.data.create_dataset``.

    Args:
        name: such as torch/cifar10.
        split: train, validation or test.
        data_dir: where its files are.
        download: fetch them if they are not there.
    """

    WITHOUT_VALIDATION = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
    """Data sets of which timm takes the test images for validation."""

    def __init__(self, name: str, split: str, data_dir: str | None, download: bool):
        options = {"download": True} if download else {}
        try:
            self.dataset = create_dataset(name, root=data_dir or "data", split=split, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError, OSError) as error:
            raise UserError(f"--data {name}, --data-dir {data_dir or 'data'}: {first_line(error)}") from error
        if not hasattr(self.dataset, "targets"):
            raise UserError(f"--data {name}: torchvision's {type(self.dataset).__name__} does not list its classes")
        if hasattr(self.dataset, "loader"):
            self.dataset.loader = open_image
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
    """``synthetic``, as many images as ImageNet-1k has; or ``synthetic/IMAGES/CLASSES``, a fifth more for val."""
    parts = name.split("/")[1:]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) not in (0, 2):
        raise UserError(f"--data {name}: give synthetic, or synthetic/IMAGES/CLASSES such as synthetic/5000/10")
    train, val, classes = IMAGENET
    if parts:
        train, classes = map(int, parts)
        val = max(classes, train // 5)
    return SyntheticImages(train, classes, seed=0), SyntheticImages(val, classes, seed=1)
