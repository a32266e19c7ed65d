"""How commands read their options: through tyro, whose refusals become one line.

Here too is what the fields of a dataclass of options or of a configuration are called and allow.
"""

import math
import os
import re
import sys
import typing
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

import tyro

from .errors import DEBUG_HELP, USAGE_EXIT_CODE, UserError, cut, nearest

T = TypeVar("T")
_WIDTH = 100_000
"""Columns of the terminal that tyro is told of, so that it does not break its messages into lines."""


def parse_options(kind: type[T], prog: str, argv: Sequence[str], **settings: Any) -> T:
    """The options of a command line as an instance of a dataclass; ``--help`` ends with ``SystemExit(0)``.

    Args:
        settings: of ``tyro.cli``.

    Raises:
        UserError: an unknown option (with the nearest one), a value of another type or outside what is allowed.
    """
    if {"-h", "--help"}.intersection(argv):
        try:
            return tyro.cli(kind, prog=prog, args=list(argv), **settings)
        finally:
            print(DEBUG_HELP)
    refusal = StringIO()
    try:
        with redirect_stderr(refusal), _wide_terminal():
            options = tyro.cli(kind, prog=prog, args=list(argv), **settings)
    except SystemExit as stopped:
        if stopped.code != USAGE_EXIT_CODE:
            raise
        # Out of a dataclass tyro catches ValueErrors, and our own among them: the message stays as it was meant.
        cause = stopped.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        reason = explain_refusal(refusal.getvalue())
        raise cause or UserError(f"{prog}: {reason} ({prog} --help lists the options)") from None
    sys.stderr.write(refusal.getvalue())  # such as a warning
    return options


def refuse_options(prog: str, argv: Sequence[str], purpose: str) -> None:
    """The command line of a command without options: ``--help`` says its purpose and ends with ``SystemExit(0)``.

    Raises:
        UserError: there are options.
    """
    if {"-h", "--help"}.intersection(argv):
        print(f"usage: {prog}     (no options)\n\n{purpose}\n{DEBUG_HELP}")
        raise SystemExit(0)
    if argv:
        raise UserError(f"{prog} takes no options, was given {' '.join(argv)}")


@contextmanager
def _wide_terminal():
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_WIDTH)
    try:
        yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def explain_refusal(box: str) -> str:
    """The message in the box that tyro draws, without what it repeats of the help text."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip().strip("│").strip() for line in plain.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰"]
    # On an ASCII terminal the title is a line of its own, above a rule, and not part of the frame.
    lines = lines if "╭" in plain else lines[2:]
    rules = [number for number, line in enumerate(lines) if _is_rule(line)] or [len(lines)]
    message = " ".join(lines[: rules[0]])
    for pattern, write in _REFUSALS:
        if found := re.search(pattern, message):
            return write(*found.groups())
    meant = [line.split()[0].rstrip(",") for line in lines[rules[0] :] if re.match("--[a-z]", line)]
    return f"{message}; did you mean {', '.join(meant[:3])}?" if meant else message.rstrip(".")


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-")


def _bad_choice(value: str, option: str, choices: str) -> str:
    return explain_choice(option, value, [choice for choice in re.findall(r"'([^']*)'", choices) if choice != "None"])


def _bad_optional(option: str, given: str, reasons: str) -> str:
    """A value that may be left out: why it is not of the type that it has otherwise."""
    value = " ".join(re.findall(r"'([^']*)'", given))
    choices = re.search(r"does not match choices \(('(?!None').*?)\)", reasons)
    if choices:
        return _bad_choice(value, option, choices.group(1))
    count = re.search(r"length (\d+) did not match expected argument count (\d+)", reasons)
    if count:
        return f"{option} {value}: takes {count.group(2)} values, was given {count.group(1)}"
    return f"{option} {value}: expected {'a whole number' if 'int()' in reasons else 'a number'}"


_REFUSALS = (
    (r"^invalid choice '(.*)' for argument '(.*)'\. Expected one of (.*)\.$", _bad_choice),
    (r"^Error parsing (\S+): .* could be instantiated from (\[.*?\])\. *Got errors: (.*)$", _bad_optional),
    (
        r"^Error parsing (\S+): invalid literal for int\(\) .*: '(.*)'$",
        lambda option, value: f"{option} {value}: expected a whole number",
    ),
    (
        r"^Error parsing (\S+): could not convert string to float: '(.*)'$",
        lambda option, value: f"{option} {value}: expected a number",
    ),
    (r"^Error parsing (-\S+): (.*)$", lambda option, reason: f"{option}: {reason}"),
    (r"^Missing from .*?: (?:STR )?(.*?)\.? \(required\)", lambda meaning: f"not given: {meaning}"),
)


def flag_of(section: type, name: str) -> str:
    """The command line's flag for a field: its name with dashes, unless tyro is told another one."""
    hint = typing.get_type_hints(section, include_extras=True)[name]
    names = [getattr(extra, "name", None) for extra in getattr(hint, "__metadata__", ())]
    return f"--{next((name for name in names if name), name).replace('_', '-')}"


def check_fields(section: Any, **intervals: str) -> None:
    """Refuse values of a dataclass that its fields do not allow.

    Fields that are None are passed over, and each number of a tuple is looked at by itself.

    Args:
        section: an instance; a field of a ``Literal`` type takes one of its values.
        intervals: allowed numbers by field, as ``"(0, 1]"``; a round bracket leaves the bound itself out.

    Raises:
        UserError: names the flag, what was given and what is allowed.
    """
    for name, choices in _choices_of(type(section)).items():
        value = getattr(section, name)
        if value not in choices:
            allowed = [choice for choice in choices if choice is not None]
            raise UserError(explain_choice(flag_of(type(section), name), value, allowed))
    for name, interval in intervals.items():
        value = getattr(section, name)
        for number in value if isinstance(value, (tuple, list)) else [value] * (value is not None):
            if problem := _explain_number(number, interval, is_whole=_is_whole(type(section), name)):
                raise UserError(f"{flag_of(type(section), name)} {cut(str(number), 40)}: {problem}")


def explain_choice(flag: str, value: Any, allowed: Sequence[str]) -> str:
    """What is wrong with a value that is none of those allowed."""
    hint = nearest(str(value), allowed, count=1)
    return f"{flag} {value}: must be one of {', '.join(allowed)}" + (f"; {hint}" if hint else "")


@cache
def _choices_of(section: type) -> dict[str, tuple]:
    """The values of each field of a ``Literal`` type, with None where that is allowed too."""
    found = {}
    for name, hint in typing.get_type_hints(section).items():
        parts = [hint, *typing.get_args(hint)]
        literals = [typing.get_args(part) for part in parts if typing.get_origin(part) is Literal]
        if literals:
            found[name] = (*literals[0], *([None] if type(None) in parts else []))
    return found


@cache
def _is_whole(section: type, name: str) -> bool:
    return typing.get_type_hints(section)[name] in (int, int | None)


_LARGEST_INTEGER = 2**63 - 1


def _explain_number(number: Any, interval: str, is_whole: bool) -> str | None:
    """What is wrong with a number, or None."""
    if isinstance(number, bool) or not isinstance(number, Integral if is_whole else Real):
        return f"expected a {'whole ' if is_whole else ''}number"
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    is_above = number > low if interval[0] == "(" else number >= low
    is_below = number < high if interval[-1] == ")" else number <= high
    if is_above and is_below and abs(number) <= (_LARGEST_INTEGER if is_whole else sys.float_info.max):
        return None
    if high < math.inf:
        return f"must lie in {interval}"
    least = "must be positive" if interval[0] == "(" else f"must be at least {low:g}"
    if is_above:
        return f"must be at most {_LARGEST_INTEGER}" if is_whole else f"{least} and finite"
    return least if number < math.inf else f"{least} and finite"
