"""How a command fails: one line on stderr and an exit code, with the traceback kept for ``--debug``."""

import difflib
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence

USAGE_EXIT_CODE = 2
STOPPED_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130
# As of a program that SIGPIPE ends, which Python ignores.
UNREAD_EXIT_CODE = 141
# EX_TEMPFAIL of sysexits.h: try again later.
PAUSED_EXIT_CODE = 75


class UserError(Exception):
    """Something that was given to a command cannot be used; the message says what, and the nearest fix.

    Not a ValueError: tyro would catch that one out of a dataclass and print it its own way.
    """


class RunStopped(RuntimeError):
    """A run that started well cannot go on, for example because its loss is no longer finite."""


class RunPaused(Exception):
    """A run was told by a signal to end, and has saved all that it needs to go on."""


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> str:
    """``did you mean a, b?`` for the names closest to a misspelt one, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=count, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command and turn its expected failures into exit codes.

    Args:
        command: takes the arguments after the command's name and returns an exit code.
        argv: those arguments; ``--debug`` among them lets the exception through with its traceback.

    Returns:
        What the command returned; 2 for a :class:`UserError`; 1 for a :class:`RunStopped`; 75 for a
        :class:`RunPaused`; 130 for Ctrl-C; 141 where the reader of the output is gone, as of ``| head``.
    """
    try:
        exit_code = command(argv)
        sys.stdout.flush()
        return exit_code
    except (UserError, RunStopped) as error:
        if "--debug" in argv:
            raise
        print(f"{_rank_prefix()}error: {_one_line(error)}", file=sys.stderr)
        return USAGE_EXIT_CODE if isinstance(error, UserError) else STOPPED_EXIT_CODE
    except RunPaused as pause:
        print(f"{_rank_prefix()}paused: {_one_line(pause)}", file=sys.stderr)
        return PAUSED_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        if not _is_unread():  # the pipe of a worker, which is a fault
            raise
        return UNREAD_EXIT_CODE


def _is_unread() -> bool:
    """Whether nobody reads what is printed any more; if so, what Python still holds of it is thrown away."""
    stdout = sys.stdout.fileno()
    watch = select.poll()
    watch.register(stdout, 0)
    if not watch.poll(0):  # else an error or a hang-up, which are reported unasked
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _rank_prefix() -> str:
    return f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
