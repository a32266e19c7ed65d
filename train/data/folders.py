"""Images in folders: which folders are parts of a data set, which are classes, and what is neither."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from timm.utils.misc import natural_key

from ...errors import UserError, first_line
from .decode import has_image_header, image_suffixes, open_image
from .splits import LeftOut, join, part_of_folder

HIDDEN = "hidden"
LINKED = "links to what is read anyway, or around in a circle"
NO_FILE = "neither file nor folder"
NO_IMAGE = "no images"
BESIDE = "images beside the class folders"
EMPTY = "folders without images"


class FolderImages:
    """A tree CLASS/**/*.jpg (or any other format that PIL reads); the first level of folders are the classes.

    Args:
        root: the folder that holds the class folders.
        class_to_idx: class indices by folder name; numbered in natural order of the names if not given.

    Attributes:
        left_out: a line for each reason why something in ``root`` is not read.
    """

    def __init__(self, root: Path, class_to_idx: dict[str, int] | None = None):
        left_out = LeftOut()
        found: dict[str, list[str]] = {}
        for _, entry in _entries(root, root, left_out):
            if entry.is_dir():
                found[entry.name] = [path for path, is_image in walk(entry.path, root, left_out) if is_image]
            elif _is_image(entry):
                left_out.add(BESIDE, entry.name)
            else:
                left_out.add(NO_IMAGE, entry.name)
        for name in (name for name, paths in found.items() if not paths):
            left_out.add(EMPTY, name)
        self.root, self.left_out = root, left_out.lines(root)
        names = sorted((name for name, paths in found.items() if paths), key=natural_key)
        if not names:
            reasons = "".join(f"; {line}" for line in self.left_out)
            raise UserError(f"--data {root}: no images found in folders below it, one per class{reasons}")
        self.class_to_idx = class_to_idx or {name: index for index, name in enumerate(names)}
        unknown = [name for name in names if name not in self.class_to_idx]
        if unknown:
            raise UserError(f"{root}: classes without training images: {join(unknown)}; remove or rename them")
        self.classes = sorted(self.class_to_idx, key=self.class_to_idx.get)
        self.paths = sorted((path for name in names for path in found[name]), key=natural_key)
        self.targets = [self.class_to_idx[path.partition(os.sep)[0]] for path in self.paths]

    def load(self, index: int) -> Image.Image:
        return open_image(self.root / self.paths[index])


def walk(folder: str | Path, root: Path, left_out: LeftOut, above: tuple[str, ...] = ()) -> Iterator[tuple[str, bool]]:
    """The regular files in a folder and in those below it, by their paths from ``root``, and whether they are images.

    Whatever else lies there, and files that are no images, are added to what is left out.

    Args:
        above: real paths of the folders that lead here, ``root`` among them.
    """
    above = (*(above or [os.path.realpath(root)]), os.path.realpath(folder))
    for path, entry in _entries(folder, root, left_out, above):
        if entry.is_dir():
            yield from walk(entry.path, root, left_out, above)
            continue
        is_image = _is_image(entry)
        if not is_image:
            left_out.add(NO_IMAGE, path)
        yield path, is_image


def _is_image(entry: os.DirEntry) -> bool:
    """Whether a regular file is called like an image, or begins like one where its name says nothing of it."""
    if os.path.splitext(entry.name)[1].lower() in image_suffixes():
        return True
    try:
        with open(entry.path, "rb") as file:
            return has_image_header(file.read(16))
    except OSError:
        return False


def _entries(
    folder: str | Path, root: Path, left_out: LeftOut, above: tuple[str, ...] = ()
) -> list[tuple[str, os.DirEntry]]:
    """The files and folders in a folder, by their paths from ``root``; see :func:`walk`.

    Those that are hidden or read by another way are left out.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"--data {root}: cannot read folder {folder}: {first_line(error)}") from error
    kept, start = [], os.path.relpath(folder, root)
    prefix = "" if start == os.curdir else start + os.sep
    for entry in found:
        path, is_folder = prefix + entry.name, _is(entry.is_dir)
        if entry.name.startswith("."):
            left_out.add(HIDDEN, path)
        elif is_folder and entry.is_symlink() and _is_circle(entry, above or (os.path.realpath(root),)):
            left_out.add(LINKED, path)
        elif is_folder or _is(entry.is_file):
            kept.append((path, entry))
        else:
            left_out.add(NO_FILE, path)
    return kept


def _is(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except OSError:  # a link in a circle
        return False


def _is_circle(link: os.DirEntry, above: tuple[str, ...]) -> bool:
    """Whether a link leads into the data set (the first of ``above``), or to a folder that leads to the link."""
    target = Path(os.path.realpath(link.path))
    leading = {folder for path in map(Path, above) for folder in (path, *path.parents)}
    return target in leading or Path(above[0]) in target.parents


def find_part_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders that are the parts of a data set, and lines on what of it is not read.

    A folder that is called like a part is one if it holds folders with images, or archives; one that holds images
    itself is a class, where there are other classes.

    Returns:
        By part, empty where the folders in ``root`` are classes.

    Raises:
        UserError: it cannot be told which they are.
    """
    folders = [root / name for name, entry in _entries(root, root, LeftOut()) if entry.is_dir()]
    called = [folder for folder in folders if part_of_folder(folder.name)]
    parts = [folder for folder in called if _holds_classes(folder)]
    flat = [folder for folder in called if folder not in parts and _holds_images(folder)]
    others = [folder for folder in folders if folder not in called and _holds_images(folder)] if called else []
    if not parts:
        if flat and not others:
            raise UserError(
                f"--data {root}: the images in {join([folder.name for folder in flat])} lie in no class folders"
            )
        return {}, []
    if len(parts) == 1 and others:
        raise UserError(
            f"--data {root}: is {parts[0].name} a part of the data, or a class like {others[0].name}? "
            f"Give --data {parts[0]}, or rename one of them"
        )
    found: dict[str, Path] = {}
    for folder in parts:
        if (other := found.setdefault(part_of_folder(folder.name), folder)) != folder:
            raise UserError(f"--data {root}: {other.name} and {folder.name} are the same part: rename or remove one")
    unread = [f"{folder.name} (images in no class folders)" for folder in flat] + [folder.name for folder in others]
    return found, [f"{root}: not read: {join(unread)}"] if unread else []


def _holds_classes(folder: Path) -> bool:
    entries = _entries(folder, folder, LeftOut())
    is_archived = any(name.lower().endswith(".tar") for name, entry in entries if not entry.is_dir())
    return is_archived or has_class_folders(folder)


def _holds_images(folder: str | Path) -> bool:
    return any(is_image for _, is_image in walk(folder, Path(folder), LeftOut()))


def has_class_folders(root: Path) -> bool:
    """Whether a folder in this one holds images, at any depth."""
    return any(entry.is_dir() and _holds_images(entry.path) for _, entry in _entries(root, root, LeftOut()))


def find_others(root: Path, suffix: str) -> list[str]:
    """What lies in a folder whose files of one ending are read: other files, and folders with images."""
    return [
        name
        for name, entry in _entries(root, root, LeftOut())
        if (_holds_images(entry.path) if entry.is_dir() else not name.lower().endswith(suffix))
    ]


def find_files(root: Path, suffix: str, depth: int) -> list[str]:
    """Paths from ``root`` of the regular files with an ending, in any case, in natural order; none that are hidden.

    Args:
        suffix: in lower case, with its dot.
        depth: levels of folders that are looked into; 1 is ``root`` itself.
    """
    found = []
    for name, entry in _entries(root, root, LeftOut()):
        if entry.is_dir() and depth > 1:
            found += [f"{name}/{path}" for path in find_files(Path(entry.path), suffix, depth - 1)]
        elif not entry.is_dir() and name.lower().endswith(suffix):
            found.append(name)
    return sorted(found, key=natural_key)
