"""Label maps of semantic segmentation: found beside their images, read as the integers they hold, and checked."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import UserError, first_line
from ..data.decode import image_suffixes, open_stored
from .images import SAMPLED, THREADS, check_size, image_sizes, spread, turn_upright

IGNORED = 255
"""The label of pixels that are neither learned nor measured."""
SHOWN = 3


@dataclass
class LabelledImages:
    """Images with their label maps.

    Attributes:
        pairs: (image, label map).
        notes: what was left out, in sentences.
    """

    pairs: list[tuple[Path, Path]]
    notes: list[str] = field(default_factory=list)


def pair_files(images: str | Path, maps: str | Path, prefix: str = "") -> LabelledImages:
    """Images of a folder, any format and deeper folders too, each with the map of the same name in another folder.

    Args:
        images: folder.
        maps: folder.
        prefix: of the messages.

    Raises:
        UserError: no image, an image without a map, or two images of one name.
    """
    images, maps = Path(images), Path(maps)
    found, others = _image_files(images)
    if not found:
        raise UserError(f"{prefix}no images in {images}; expected ADE20K's folders")
    labelled, _ = _image_files(maps)
    by_name = {path.relative_to(maps).with_suffix(""): path for path in labelled}
    names = {path: path.relative_to(images).with_suffix("") for path in found}
    missing = [path for path in found if names[path] not in by_name]
    if missing:
        raise UserError(
            f"{prefix}{len(missing)} of {len(found)} images in {images} have no label map in {maps}, such as "
            f"{missing[0].name}: expected {names[missing[0]]}.png"
        )
    twice = [str(name) for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise UserError(f"{prefix}{images}: two images are called {twice[0]}, and there is one label map: rename one")
    notes = []
    if others:
        notes.append(f"{images}: left out, no images: {_few(others)}")
    surplus = sorted(str(name) for name in by_name.keys() - names.values())
    if surplus:
        notes.append(f"{maps}: left out, label maps without an image: {_few(surplus)}")
    return LabelledImages([(path, by_name[names[path]]) for path in found], notes)


def read_labels(path: str | Path) -> np.ndarray:
    """A label map (H, W) as the integers that the file holds: gray values or places in a palette.

    Raises:
        UnreadableImage: a file that cannot be decoded.
        UserError: several channels, or fractions.
    """
    with open_stored(path) as image:
        labels, mode = np.asarray(turn_upright(image)), image.mode
    if labels.ndim != 2 or labels.dtype.kind not in "uib":
        raise UserError(f"label map {path} has the mode {mode}: labels are integers in one channel (L, P, I;16)")
    return labels.astype(np.int64)


def check_labels(labels: np.ndarray, path: str | Path, num_classes: int, reduce_zero_label: bool = False) -> np.ndarray:
    """The labels as training takes them: classes from 0, and :data:`IGNORED`.

    Args:
        labels: (H, W), integers.
        path: for the message.
        num_classes: of the model; at most 255.
        reduce_zero_label: 0 is to be ignored and class 0 has the label 1, as in ADE20K.

    Returns:
        uint8 (H, W).

    Raises:
        UserError: a label that no class has.
    """
    first = int(reduce_zero_label)
    allowed = (labels == IGNORED) | ((labels >= 0) & (labels < num_classes + first))
    if not allowed.all():
        wrong = np.unique(labels[~allowed])
        raise UserError(
            f"label map {path} holds {_few(wrong)}, and the labels of {num_classes} classes are {first} to "
            f"{num_classes - 1 + first}, beside {IGNORED} for what is ignored"
        )
    if reduce_zero_label:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    return labels.astype(np.uint8)


def count_labels(pairs: Sequence[tuple[Path, Path]], num_classes: int, reduce_zero_label: bool = False) -> np.ndarray:
    """Check all label maps; returns pixels by class, (num_classes,)."""

    def count(pair: tuple[Path, Path]) -> np.ndarray:
        labels = check_labels(read_labels(pair[1]), pair[1], num_classes, reduce_zero_label)
        return np.bincount(labels.ravel(), minlength=IGNORED + 1)

    with ThreadPoolExecutor(THREADS) as pool:
        counts = sum(pool.map(count, pairs), np.zeros(IGNORED + 1, np.int64))
    return counts[:num_classes]


def check_label_maps(
    pairs: Sequence[tuple[Path, Path]],
    classes: Sequence[str],
    reduce: bool,
    folder: Path,
    is_learned: bool,
    sampled: int = SAMPLED,
) -> tuple[np.ndarray, list[str]]:
    """Compare sizes of images and label maps, and their labels with the classes.

    Returns:
        Pixels by class, and what is to be said.

    Raises:
        UserError: another size, a label that no class has, nothing to learn or to measure.
    """
    chosen = [pairs[place] for place in spread(len(pairs), sampled)]
    stored = [image.name for image, labels in chosen if check_size(image, image_sizes(labels)[1])]
    notes = []
    if stored:
        notes.append(f"{folder}: {len(stored)} images stay as they are stored, as their maps, such as {stored[0]}")
    counts = count_labels(chosen, len(classes), reduce)
    present = [name for name, count in zip(classes, counts, strict=True) if count]
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not present or (is_learned and len(present) == 1 < len(classes)):
        raise UserError(
            f"{folder}: of {len(classes)} classes, {len(chosen)} label maps show {present[0] if present else 'none'} "
            f"alone; {IGNORED} stands for pixels that are ignored: write masks of 0 and {IGNORED} as 0 and 1"
        )
    if len(classes) == 1:
        notes.append(f"{folder}: one class, so that every pixel is {classes[0]} and there is nothing to learn")
    elif absent:
        notes.append(f"{folder}: no pixel of {', '.join(absent)} in {len(chosen):,} label maps")
    return counts, notes


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names in the lines of a classes.txt; the first is label 0.

    Raises:
        UserError: a file that is no text, names none, or one of them twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} names {twice[0]} twice: each class stands there once")
    if not names:
        raise UserError(f"{path} is empty: a class in each line, the first for label 0")
    if len(names) > IGNORED:
        raise UserError(f"{path} names {len(names)} classes: label maps tell at most {IGNORED} apart")
    return tuple(names)


def _image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Files that may be images, and the names of the other ones; hidden files and folders are passed over."""
    suffixes = image_suffixes()
    found, others = [], []
    for path in sorted(_visible_files(folder)):
        (found if path.suffix.lower() in suffixes else others).append(path)
    return found, [path.name for path in others]


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _visible_files(path)
        elif path.is_file():
            yield path


def _few(values: Sequence) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")
