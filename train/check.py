"""``vicinal data check``: walks a data set and says what is in it, and what in it cannot be read."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..checkpoints import write_atomically
from .command import parse_options
from .config import DataConfig, check_fields
from .errors import UserError
from .images import Images, UnreadableImage, open_images
from .outputs import check_output_file

USAGE = """usage: vicinal data check FOLDER [options]     (--help lists them)"""
SHOWN = 20


@dataclass(frozen=True)
class CheckArguments:
    """Decode every image of a data set; exit code 1 if one cannot be read."""

    data: Annotated[str, tyro.conf.Positional]
    """digits, or a folder as --data of vicinal train takes it."""
    threads: int = 8
    """Images that are decoded at a time."""
    json: str | None = None
    """Also write the result to this file."""
    debug: bool = False
    """Show the traceback of an error."""

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
    arguments = parse_options(CheckArguments, "vicinal data check", rest)
    if arguments.json:
        check_output_file("--json", arguments.json)
    train, held_out = open_images(DataConfig(name=arguments.data))
    result = {
        name: check_images(images, arguments.threads) for name, images in (("train", train), ("held out", held_out))
    }
    for name, split in result.items():
        print("\n".join(describe(name, split)))
    if arguments.json:
        text = json.dumps(result, indent=1)
        write_atomically(arguments.json, lambda temporary: Path(temporary).write_text(text + "\n", encoding="utf-8"))
    return int(any(split["unreadable"] for split in result.values()))


def check_images(images: Images, threads: int) -> dict:
    """Counts by class, image sizes, and the messages of what cannot be read.

    Returns:
        ``images``; ``classes``: name -> images; ``sizes``: least and largest (width, height), each by itself;
        ``unreadable``: messages in the order of the images.
    """
    counts = dict.fromkeys(images.classes, 0)
    for target in images.targets:
        counts[images.classes[target]] += 1
    results = list(_decode_all(images, threads))
    widths, heights = zip(*[size for size in results if not isinstance(size, str)] or [(0, 0)], strict=True)
    return {
        "images": len(images.targets),
        "classes": counts,
        "sizes": [[min(widths), min(heights)], [max(widths), max(heights)]],
        "unreadable": [result for result in results if isinstance(result, str)],
    }


def _decode_all(images: Images, threads: int) -> Iterator[tuple[int, int] | str]:
    """Size of each image, or why it cannot be read; in threads, since Pillow decodes outside Python's lock."""

    def decode(index: int) -> tuple[int, int] | str:
        try:
            return images.load(index).size
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(decode, range(len(images.targets)))


def describe(name: str, split: dict) -> Iterator[str]:
    """Lines for people."""
    counts = split["classes"]
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    (narrow, low), (wide, high) = split["sizes"]
    yield f"{name}: {split['images']:,} images in {len(counts)} classes, {narrow} to {wide} x {low} to {high} pixels"
    yield f"  images per class: {counts[least]:,} ({least}) to {counts[most]:,} ({most})"
    empty = [name for name, count in counts.items() if not count]
    if empty:
        yield f"  classes without images: {', '.join(empty[:SHOWN])}"
    yield f"  unreadable: {len(split['unreadable'])}"
    for message in split["unreadable"][:SHOWN]:
        yield f"    {message}"
    if len(split["unreadable"]) > SHOWN:
        yield f"    and {len(split['unreadable']) - SHOWN} more; --json FILE lists all"
