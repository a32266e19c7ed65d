"""``vicinal data check``: walks a data set and says what is in it, and what in it cannot be read."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from ...checkpoints import write_atomically
from ...command import check_fields, parse_options
from ...errors import UserError
from ...outputs import check_output_file
from ..config import DataConfig
from ..dense import survey
from .decode import WHITE, UnreadableImage
from .images import Images, open_images
from .streams import StreamImages

USAGE = """usage: vicinal data check FOLDER [options]     (--help lists them)"""
SHOWN = 20


@dataclass(frozen=True)
class CheckArguments:
    """Decode every image of a data set; exit code 1 if one cannot be read, or is read otherwise than the others."""

    data: Annotated[str, tyro.conf.Positional]
    """digits, or a folder as --data of vicinal train takes it."""
    data_dir: str | None = None
    """Where torch/NAME lies, and where hfds/NAME is kept."""
    num_classes: int | None = None
    """Number of classes, of a stream whose shards do not say it."""
    threads: int = 8
    """Images that are decoded at a time."""
    json: str | None = None
    """Also write the result to this file."""

    def __post_init__(self):
        check_fields(self, threads="[1, 4096]")


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal data``; returns its exit code."""
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command != "check":
        raise UserError(f"unknown action {command!r}: vicinal data check FOLDER")
    if survey.is_dense(rest):
        return survey.main(rest)
    arguments = parse_options(CheckArguments, "vicinal data check", rest)
    if arguments.json:
        check_output_file("--json", arguments.json)
    notes: list[str] = []
    config = DataConfig(name=arguments.data, data_dir=arguments.data_dir, num_classes=arguments.num_classes)
    parts = dict(zip(("train", "val"), open_images(config, notes.append), strict=True))
    print("\n".join(f"note: {note}" for note in notes), end="\n" if notes else "")
    result = {name: {**check_images(images, arguments.threads), "notes": notes} for name, images in parts.items()}
    for name, split in result.items():
        print("\n".join(describe(name, split)))
    if arguments.json:
        text = json.dumps(result, indent=1)
        write_atomically(arguments.json, lambda temporary: Path(temporary).write_text(text + "\n", encoding="utf-8"))
    return int(any(split["unreadable"] or len(split["ranges"]) > 1 for split in result.values()))


class Seen(NamedTuple):
    """An image that was decoded: its size, and the value that became white where the values decided on it."""

    size: tuple[int, int]
    white: float | None


def check_images(images: Images, threads: int) -> dict:
    """Counts by class, image sizes, and the messages of what cannot be read.

    Returns:
        ``images``; ``classes``: name -> images; ``sizes``: least and largest (width, height), each by itself;
        ``ranges``: largest value -> images, of 32-bit images that are scaled by it; ``unreadable``: messages in the
        order of the images.
    """
    counts = dict.fromkeys(images.classes, 0)
    results = []
    for target, result in _look_at_all(images, threads):
        results.append(result)
        if target is not None:
            counts[images.classes[target]] += 1
    seen = [result for result in results if isinstance(result, Seen)]
    widths, heights = zip(*[image.size for image in seen] or [(0, 0)], strict=True)
    return {
        "images": len(images.targets),
        "classes": counts,
        "sizes": [[min(widths), min(heights)], [max(widths), max(heights)]],
        "ranges": Counter(f"{image.white:g}" for image in seen if image.white is not None),
        "unreadable": [result for result in results if isinstance(result, str)],
    }


def _look_at_all(images: Images, threads: int) -> Iterator[tuple[int | None, Seen | str]]:
    """Class index of each image, and its size or why it cannot be read; Pillow decodes outside Python's lock.

    An image of a stream that cannot be read has no class index: both come together.
    """

    def look(index: int) -> tuple[int | None, Seen | str]:
        target = None if isinstance(images, StreamImages) else images.targets[index]
        try:
            if target is None:
                image, target = images.load_example(index)
            else:
                image = images.load(index)
        except UnreadableImage as error:
            return target, str(error)
        return target, Seen(image.size, image.info.get(WHITE))

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(look, range(len(images.targets)))


def describe(name: str, split: dict) -> Iterator[str]:
    """Lines for people."""
    counts = split["classes"]
    if not split["images"]:
        yield f"{name}: no images"
        return
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    (narrow, low), (wide, high) = split["sizes"]
    yield f"{name}: {split['images']:,} images in {len(counts)} classes, {narrow} to {wide} x {low} to {high} pixels"
    yield f"  images per class: {counts[least]:,} ({least}) to {counts[most]:,} ({most})"
    empty = [name for name, count in counts.items() if not count]
    if empty:
        yield f"  classes without images: {', '.join(empty[:SHOWN])}"
    if len(split["ranges"]) > 1:
        ranges = ", ".join(f"0 to {white} ({count})" for white, count in split["ranges"].items())
        yield f"  32-bit images are scaled unevenly, by {ranges}: store all of them in one range"
    yield f"  unreadable: {len(split['unreadable'])}"
    for message in split["unreadable"][:SHOWN]:
        yield f"    {message}"
    if len(split["unreadable"]) > SHOWN:
        yield f"    and {len(split['unreadable']) - SHOWN} more; --json FILE lists all"
