"""COCO files of any origin: checked, completed where the format has a default, and their categories matched by name."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line, nearest
from .images import SAMPLED, THREADS, check_size, spread

OVERSHOOT = 1.0
"""Pixels that a box may reach over the image's edge without being cut; rounding does that in good files too."""
SHOWN = 3


@dataclass
class CocoFile:
    """What a COCO file holds after it was checked.

    Attributes:
        path: of the file.
        classes: names of the categories; category ``i + 1`` is class ``i``.
        images: entries with ``id``, ``file_name``, ``width`` and ``height``.
        annotations: entries with ``id``, ``image_id``, ``category_id``, ``bbox``, ``area``, ``iscrowd`` and, where it
            is wanted and there is one, ``segmentation``.
        notes: what was completed, changed or left out, in sentences.
    """

    path: str
    classes: tuple[str, ...]
    images: list[dict]
    annotations: list[dict]
    notes: list[str] = field(default_factory=list)

    @property
    def content(self) -> dict[str, list[dict]]:
        """The same as a COCO file has it."""
        categories = [{"id": label, "name": name} for label, name in enumerate(self.classes, 1)]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}

    def usable_images(self) -> int:
        """Images with at least one object that can be learned."""
        return len({entry["image_id"] for entry in self.annotations if not entry["iscrowd"]})


def read_categories(path: str | Path) -> tuple[str, ...]:
    """Names of the categories of a COCO file, in its order.

    Raises:
        UserError: no such file, or one that is not in COCO's form.
    """
    return tuple(_names(_load(path), path).values())


def read_coco(path: str | Path, classes: Sequence[str] | None = None, masks: bool = True) -> CocoFile:
    """Read and check a COCO file.

    Args:
        path: of the file.
        classes: of the model, in its order; the file's own if not given. Categories are matched by name.
        masks: whether segmentations are wanted; without, none is looked at or kept.

    Raises:
        UserError: not JSON, entries of a wrong form, ids that repeat or are missing, categories that ``classes`` lacks.
    """
    content = _load(path)
    names = _names(content, path)
    classes = tuple(names.values()) if classes is None else tuple(classes)
    surplus = [name for name in names.values() if name not in classes]
    if surplus:
        raise UserError(
            f"{path} has categories that the classes lack: {_few(surplus)}; "
            f"{nearest(surplus[0], classes) or 'the classes are: ' + _few(classes, 10)}"
        )
    notes = _Notes(str(path))
    images = [_image(entry, path) for entry in _entries(content, "images", path)]
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in images}
    _refuse_repeats("image id", (entry["id"] for entry in images), path)
    twice = [name for name, count in Counter(entry["file_name"] for entry in images).items() if count > 1]
    if twice:
        notes.say(f"images that are listed more than once: {_few(twice)}")
    labels = {number: classes.index(name) + 1 for number, name in names.items()}
    annotations = [
        checked
        for place, entry in enumerate(_entries(content, "annotations", path))
        if (checked := _annotation(entry, place, _Known(path, sizes, labels, masks), notes)) is not None
    ]
    _refuse_repeats("annotation id", (entry["id"] for entry in annotations), path)
    absent = [name for name in classes if name not in names.values()]
    if absent:
        notes.say(f"has no category {_few(absent)}")
    numbers = [name for name in _raw_names(content) if not isinstance(name, str)]
    if numbers:
        notes.say(f"category names that are numbers are read as text: {_few(numbers)}")
    return CocoFile(str(path), classes, images, annotations, notes.sentences())


def check_coco_images(coco: CocoFile, folder: Path, sampled: int = SAMPLED) -> list[str]:
    """Compare a COCO file with the images; returns what is to be said.

    Raises:
        UserError: images that are missing or have another size.
    """
    if not coco.images:
        raise UserError(f"{coco.path}: it lists no images")
    paths = [folder / entry["file_name"] for entry in coco.images]
    with ThreadPoolExecutor(THREADS) as pool:
        missing = [path for path, exists in zip(paths, pool.map(os.path.isfile, paths), strict=True) if not exists]
    if missing:
        raise UserError(
            f"{coco.path}: {len(missing)} of {len(paths)} images are not in {folder}, such as {missing[0]}: "
            "the file's names start from the images' folder"
        )
    places = spread(len(paths), sampled)
    sizes = [(coco.images[place]["width"], coco.images[place]["height"]) for place in places]
    with ThreadPoolExecutor(THREADS) as pool:
        stored = list(pool.map(check_size, [paths[place] for place in places], sizes))
    notes = []
    if any(stored):
        name = paths[places[stored.index(True)]].name
        notes.append(
            f"{coco.path}: {sum(stored)} images are turned by their EXIF orientation, such as {name}, and annotated as "
            "they are stored: they stay as stored"
        )
    return notes


@dataclass(frozen=True)
class _Known:
    """What annotations are checked against."""

    path: str | Path
    sizes: dict[Any, tuple[int, int]]
    labels: dict[Any, int]
    masks: bool


class _Notes:
    """Counts what happens to annotations, with the first id of each kind."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: dict[str, Any] = {}
        self.others: list[str] = []

    def count(self, kind: str, number: Any) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, number)

    def say(self, sentence: str) -> None:
        self.others.append(sentence)

    def sentences(self) -> list[str]:
        counted = [
            f"{count:,} annotation{'s' if count > 1 else ''} {kind} (the first is {self.first[kind]})"
            for kind, count in self.counts.items()
        ]
        return [f"{self.path}: {sentence}" for sentence in (*self.others, *counted)]


def _load(path: str | Path) -> dict:
    if not Path(path).is_file():
        raise UserError(f"COCO file: no file {path}")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a COCO file: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a COCO file: it holds a {type(content).__name__}, not images and annotations")
    return content


def _entries(content: dict, key: str, path: str | Path) -> list[dict]:
    entries = content.get(key)
    if not isinstance(entries, list) or any(not isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: not a COCO file with {key}: {key!r} must be a list of entries")
    return entries


def _raw_names(content: dict) -> list[Any]:
    return [entry.get("name") for entry in content["categories"]]


def _names(content: dict, path: str | Path) -> dict[Any, str]:
    """Category id -> name, in the file's order."""
    names = {}
    for entry in _entries(content, "categories", path):
        number, name = entry.get("id"), entry.get("name")
        if not _is_id(number):
            raise UserError(f"{path}: category {name!r} has the id {number!r}: it must be a number or a text")
        if not isinstance(name, (str, int, float)) or isinstance(name, bool) or not str(name).strip():
            raise UserError(f"{path}: category {number} has the name {name!r}: it must be a text")
        if number in names:
            raise UserError(f"{path}: two categories have the id {number}: {names[number]}, {name}")
        names[number] = str(name)
    if not names:
        raise UserError(f"{path}: not a COCO file with categories: the list is empty")
    _refuse_repeats("category name", names.values(), path)
    return names


def _image(entry: dict, path: str | Path) -> dict:
    number, name = entry.get("id"), entry.get("file_name")
    if not _is_id(number):
        raise UserError(f"{path}: image {name!r} has the id {number!r}: it must be a number or a text")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: image {number} has the file_name {name!r}: it must be a text")
    for side in ("width", "height"):
        length = entry.get(side)
        if not _is_number(length) or length < 1 or length != int(length):
            raise UserError(f"{path}: image {number} ({name}) has the {side} {length!r}: it must be pixels, at least 1")
    return {**entry, "width": int(entry["width"]), "height": int(entry["height"])}


def _annotation(entry: dict, place: int, known: _Known, notes: _Notes) -> dict | None:
    """A checked copy of an annotation, or None where it cannot be used."""
    number = entry.get("id", place)
    where = f"{known.path}: annotation {number}"
    if not _is_id(number):
        raise UserError(f"{known.path}: an annotation has the id {number!r}: it must be a number or a text")
    image, category = entry.get("image_id"), entry.get("category_id")
    if not _is_id(image) or image not in known.sizes:
        raise UserError(f"{where} has the image_id {image!r}, which no image has")
    if not _is_id(category) or category not in known.labels:
        raise UserError(f"{where} has the category_id {category!r}, which no category has")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise UserError(f"{where} has iscrowd {crowd!r}: it must be 0 or 1")
    size = known.sizes[image]
    box = _box(entry.get("bbox"), size, where, notes, number)
    if box is None:
        return None
    checked = {key: value for key, value in entry.items() if key != "segmentation"}
    checked |= {"id": number, "category_id": known.labels[category], "bbox": box, "iscrowd": int(crowd)}
    if known.masks:
        segmentation = _segmentation(entry.get("segmentation"), size)
        if segmentation is None and entry.get("segmentation"):
            notes.count("left out: the polygon or RLE is broken", number)
            return None
        if segmentation is not None:
            checked["segmentation"] = segmentation
    if "iscrowd" not in entry:
        notes.count("without iscrowd: taken as 0", number)
    checked["area"] = _area(entry, checked, where, notes, number)
    return checked


def _box(box: Any, size: tuple[int, int], where: str, notes: _Notes, number: Any) -> list[float] | None:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise UserError(f"{where} has the bbox {box!r}: it must be four numbers, x, y, width, height")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        notes.count("left out: the box has no area", number)
        return None
    right, bottom = min(x + width, size[0]), min(y + height, size[1])
    left, top = max(x, 0), max(y, 0)
    if right <= left or bottom <= top:
        notes.count("left out: the box lies outside its image", number)
        return None
    if width < 1 or height < 1:
        notes.count("left out: the box is less than a pixel wide or high", number)
        return None
    if max(left - x, top - y, x + width - right, y + height - bottom) <= OVERSHOOT:
        return list(box)
    notes.count("cut: the box reaches out of its image", number)
    return [left, top, right - left, bottom - top]


def _area(entry: dict, checked: dict, where: str, notes: _Notes, number: Any) -> float:
    area = entry.get("area")
    if area is not None and not _is_number(area):
        raise UserError(f"{where} has the area {area!r}: it must be a number")
    if area is not None and area > 0:
        return area
    notes.count("without area: taken from the polygons, or else from the box", number)
    polygons = checked.get("segmentation")
    if isinstance(polygons, list):
        measured = sum(_polygon_area(polygon) for polygon in polygons)
        if measured > 0:
            return measured
    return checked["bbox"][2] * checked["bbox"][3]


def _polygon_area(polygon: Sequence[float]) -> float:
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    pairs = zip(points, points[1:] + points[:1], strict=True)
    return abs(sum(x * other_y - other_x * y for (x, y), (other_x, other_y) in pairs)) / 2


def _segmentation(segmentation: Any, size: tuple[int, int]) -> list | dict | None:
    """Polygons or an RLE that pycocotools can take; None where nothing of it can be used."""
    if isinstance(segmentation, dict):
        return segmentation if _is_rle(segmentation, size) else None
    if not isinstance(segmentation, list):
        return None
    return [polygon for polygon in segmentation if _is_polygon(polygon, size)] or None


def _is_polygon(polygon: Any, size: tuple[int, int]) -> bool:
    """At least three points, none further outside than the image is large, which would take memory without end."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    if not all(_is_number(value) for value in polygon):
        return False
    return all(
        -side <= value <= 2 * side
        for values, side in ((polygon[::2], size[0]), (polygon[1::2], size[1]))
        for value in values
    )


def _is_rle(rle: dict, size: tuple[int, int]) -> bool:
    """Whether the runs cover exactly the image; pycocotools writes past its memory where they do not."""
    if rle.get("size") != [size[1], size[0]]:
        return False
    counts = rle.get("counts")
    try:
        runs = list(_decode_runs(counts)) if isinstance(counts, str) else counts
    except ValueError:
        return False
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        return False
    return sum(runs) == size[0] * size[1]


def _decode_runs(text: str) -> Iterator[int]:
    """Lengths of the runs of COCO's compressed RLE: 5 bits a character, differences from the run before the last."""
    runs: list[int] = []
    place = 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[place]) - 48 if place < len(text) else -1
            if not 0 <= code < 64 or shift > 30:
                raise ValueError("broken RLE")
            value |= (code & 31) << shift
            more, shift, place = bool(code & 32), shift + 5, place + 1
            if not more and code & 16:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    yield from runs


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _refuse_repeats(what: str, values: Iterable[Any], path: str | Path) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: {what} {_few(repeated)} stands there more than once; it must be unique")


def _few(values: Iterable[Any], count: int = SHOWN) -> str:
    values = [str(value) for value in values]
    return ", ".join(values[:count]) + (f" and {len(values) - count} more" if len(values) > count else "")
