"""``vicinal data check`` for COCO files and for folders of images with label maps."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ...checkpoints import write_atomically
from ...command import parse_options
from ...errors import UserError
from ...outputs import check_output_file
from ..data.decode import UnreadableImage
from .coco import CocoFile, check_coco_images, read_coco
from .images import THREADS, read_image
from .labels import IGNORED, check_label_maps, pair_files, read_class_names

SPLITS = ("training", "validation")
SHOWN = 20


@dataclass(frozen=True)
class InspectArguments:
    """Check COCO files, or images with label maps; exit code 1 if something is left out or cannot be read."""

    data: Annotated[list[str], tyro.conf.Positional]
    """COCO files, those to train on first; or a folder in COCO's layout, or in ADE20K's with a classes.txt."""
    images: str | None = None
    """Folder that the COCO files' image names start from."""
    json: str | None = None
    """Also write the result to this file."""


@dataclass
class Split:
    """What was found in one file or folder.

    Attributes:
        images: how many.
        classes: name -> objects, or pixels of label maps.
        notes: what is completed, changed or left out, in sentences.
        unreadable: messages.
    """

    images: int
    classes: dict[str, int]
    notes: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def is_dense(argv: Sequence[str]) -> bool:
    """Whether the arguments of ``vicinal data check`` are for this module: a COCO file, or a folder of such data."""
    # the value of an option is no data, such as the file of --json
    given = [Path(word) for before, word in zip(["", *argv], argv, strict=False) if not before.startswith("--")]
    paths = [path for path in given if not path.name.startswith("-")]
    if not paths:
        return False
    return paths[0].suffix.lower() == ".json" or bool(_coco_files(paths[0]) or _label_folders(paths[0]))


def main(argv: Sequence[str]) -> int:
    """Run the check; returns the exit code."""
    arguments = parse_options(InspectArguments, "vicinal data check", argv)
    if arguments.json:
        check_output_file("--json", arguments.json)
    result = dict(inspect(arguments))
    for name, split in result.items():
        print("\n".join(describe(name, split)))
    if arguments.json:
        text = json.dumps({name: vars(split) for name, split in result.items()}, indent=1)
        write_atomically(arguments.json, lambda temporary: Path(temporary).write_text(text + "\n", encoding="utf-8"))
    return int(any(split.notes or split.unreadable for split in result.values()))


def inspect(arguments: InspectArguments) -> Iterator[tuple[str, Split]]:
    """Each file or folder with what was found.

    Raises:
        UserError: data that cannot be used.
    """
    root = Path(arguments.data[0])
    files = {Path(name): arguments.images for name in arguments.data} if root.suffix == ".json" else _coco_files(root)
    if not files:
        yield from _inspect_labels(root)
        return
    classes = None
    for file, images in files.items():
        if images is None:
            raise UserError(f"{file}: give --images, the folder that the file's image names start from")
        coco = read_coco(file, classes)
        classes = classes or coco.classes
        yield str(file), inspect_coco(coco, Path(images))


def inspect_coco(coco: CocoFile, folder: Path) -> Split:
    """Compare a COCO file with all of its images, and decode them.

    Raises:
        UserError: images that are missing or of another size, or no object in any.
    """
    notes = coco.notes + check_coco_images(coco, folder, len(coco.images))
    if not coco.usable_images():
        raise UserError(f"{coco.path}: no image has an object: {'; '.join(coco.notes) or 'there are no annotations'}")
    without = sum("segmentation" not in entry for entry in coco.annotations)
    if without:
        notes.append(f"{coco.path}: {without} annotations have no segmentation: for configs of boxes alone")
    counts = Counter(entry["category_id"] for entry in coco.annotations)
    paths = [folder / entry["file_name"] for entry in coco.images]
    classes = {name: counts[label] for label, name in enumerate(coco.classes, 1)}
    return Split(len(paths), classes, notes, list(_unreadable(paths)))


def _inspect_labels(root: Path) -> Iterator[tuple[str, Split]]:
    listing = root / "classes.txt"
    if not listing.is_file():
        raise UserError(f"{root} has no classes.txt: the classes of the labels 0, 1... one a line")
    classes = read_class_names(listing)
    for split, (images, maps) in _label_folders(root).items():
        labelled = pair_files(images, maps)
        count = len(labelled.pairs)
        counts, notes = check_label_maps(labelled.pairs, classes, False, maps, split == SPLITS[0], count)
        unreadable = list(_unreadable([image for image, _ in labelled.pairs]))
        yield (
            str(images),
            Split(count, dict(zip(classes, counts.tolist(), strict=True)), labelled.notes + notes, unreadable),
        )


def _coco_files(root: Path) -> dict[Path, str]:
    """Files in COCO's layout with the folders of their images, those to train on first."""
    files = {file: root / file.stem.removeprefix("instances_") for file in root.glob("annotations/instances_*.json")}
    return {file: str(files[file]) for file in sorted(files, key=lambda file: ("train" not in file.stem, file.stem))}


def _label_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    folders = {split: (root / "images" / split, root / "annotations" / split) for split in SPLITS}
    return {split: pair for split, pair in folders.items() if all(folder.is_dir() for folder in pair)}


def _unreadable(paths: Sequence[Path]) -> Iterator[str]:
    def read(path: Path) -> str | None:
        try:
            read_image(path)
        except UnreadableImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        yield from (message for message in pool.map(read, paths) if message)


def describe(name: str, split: Split) -> Iterator[str]:
    """Lines for people."""
    yield f"{name}: {split.images:,} images, {len(split.classes)} classes ({IGNORED} of label maps is ignored)"
    yield "  " + ", ".join(f"{label} {count:,}" for label, count in list(split.classes.items())[:SHOWN])
    for note in split.notes:
        yield f"  {note}"
    yield f"  unreadable: {len(split.unreadable)}"
    for message in split.unreadable[:SHOWN]:
        yield f"    {message}"
