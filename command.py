"""How commands read their options: through tyro, whose refusals become one line."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, TypeVar

import tyro

from .errors import USAGE_EXIT_CODE, UserError, nearest

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
        return tyro.cli(kind, prog=prog, args=list(argv), **settings)
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
        print(f"usage: {prog}     (no options)\n\n{purpose}")
        raise SystemExit(0)
    surplus = [argument for argument in argv if argument != "--debug"]
    if surplus:
        raise UserError(f"{prog} takes no options, was given {' '.join(surplus)}")


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
    allowed = [choice for choice in re.findall(r"'([^']*)'", choices) if choice != "None"]
    hint = nearest(value, allowed, count=1)
    return f"{option} {value}: must be one of {', '.join(allowed)}" + (f"; {hint}" if hint else "")


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
