"""Which part of a data set a name means: train, val (for choosing the best model), or test (for measuring)."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from ...errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What the parts are called, in any case: the words that the package ``datasets`` knows."""
_PART_OF = {word: part for part, words in SPLITS.items() for word in words}
SHOWN = 5
"""Names that a message shows of what it counts."""


class LeftOut:
    """What a reader leaves out of a data set, by the reason."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count a file or a folder."""
        self.names.setdefault(reason, []).append(name)

    def lines(self, where: object) -> list[str]:
        """For people: each reason, how many there are, and the first of them."""
        return [f"{where}: {len(names)} left out, {reason}: {join(names)}" for reason, names in self.names.items()]


def join(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*map(str, names[:SHOWN]), *more])


def part_of_folder(name: str) -> str | None:
    """The part that a folder is: one that is called like it, numbers and punctuation aside (``Train``, ``val2017``)."""
    words = _words(name)
    return _PART_OF.get(words[0]) if len(words) == 1 else None


def name_parts(names: Iterable[str]) -> dict[str, str]:
    """What a data set calls its parts, by part; under their own names what is none.

    Raises:
        UserError: a part that has two names.
    """
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(part_of_folder(name) or name, name)) != name:
            raise UserError(f"--data: {other} and {name} are the same part: rename or remove one")
    return found


def group_files(paths: Iterable[str]) -> dict[str | None, list[str]]:
    """Files by part; None for those that name none.

    A folder that is called like a part decides; else the first such word in the name of the file, and else in that of
    a folder around it.

    Args:
        paths: relative to the data set, with slashes.

    Raises:
        UserError: a file that names two parts, or a part that has two names.
    """
    found: dict[str | None, dict[str | None, list[str]]] = {}
    for path in paths:
        word = _deciding_word(path)
        found.setdefault(_PART_OF.get(word), {}).setdefault(word, []).append(path)
    for part, words in found.items():
        if len(words) > 1:
            examples = " and ".join(own[0] for own in words.values())
            raise UserError(f"--data: {examples} are both called a {part} part: rename or remove one kind")
    return {part: own for part, words in found.items() for own in words.values()}


def _deciding_word(path: str) -> str | None:
    *folders, file = PurePosixPath(path).parts
    of_folder = next((_words(name)[0] for name in folders if part_of_folder(name)), None)
    of_file = [word for word in _words(file) if word in _PART_OF]
    if of_folder is None:
        around = (word for name in reversed(folders) for word in _words(name) if word in _PART_OF)
        return of_file[0] if of_file else next(around, None)
    if _PART_OF.get(_words(file)[0] if _words(file) else "", _PART_OF[of_folder]) != _PART_OF[of_folder]:
        raise UserError(f"--data: {path} names two parts, {of_folder} and {of_file[0]}: rename the file or its folder")
    return of_folder


def _words(name: str) -> list[str]:
    """Whole words, so that ``latest`` does not hold ``test``."""
    return re.findall(r"[^\W\d_]+", name.lower())
