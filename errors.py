"""How a command fails: one line on stderr and an exit code, with the traceback kept for ``--debug``."""

import difflib
import errno
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module

USAGE_EXIT_CODE = 2
STOPPED_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130
# As of a program that SIGPIPE ends, which Python ignores.
UNREAD_EXIT_CODE = 141
# EX_TEMPFAIL of sysexits.h: try again later.
PAUSED_EXIT_CODE = 75

DEBUG = "--debug"
DEBUG_HELP = f"Beside any command's options, {DEBUG} shows the traceback of an error."


class UserError(ValueError):
    """Something that was given to a command or a function cannot be used; the message says what, and the fix."""


class RunStopped(RuntimeError):
    """A run that started well cannot go on, for example because its loss is no longer finite."""


class RunPaused(Exception):
    """A run was told by a signal to end, and has saved all that it needs to go on."""


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> str:
    """``did you mean a, b?`` for the names closest to a misspelt one, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=count, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else ""


_PACKAGES = {
    "sklearn": ("scikit-learn", "demo"),
    "mlxtend": ("mlxtend", "demo"),
    "matplotlib": ("matplotlib", "demo"),
    "datasets": ("datasets", "data"),
    "torch.utils.tensorboard": ("tensorboard", "log"),
    "wandb": ("wandb", "log"),
}
"""Packages that not everybody needs, as they are imported: their names, and the extras that bring them."""


def require_packages(needs: Mapping[str, str]) -> None:
    """Name all packages that are missing, and how to get them, before the first one fails to import.

    Args:
        needs: what is asked for -> the package that it imports, as ``{"--report": "matplotlib"}``.

    Raises:
        UserError: one is not installed.
    """
    missing = {asked: _PACKAGES[package] for asked, package in needs.items() if not _is_importable(package)}
    if missing:
        extras = ",".join(dict.fromkeys(extra for _, extra in missing.values()))
        wanted = ", ".join(f"{asked} needs {name}" for asked, (name, _) in missing.items())
        raise UserError(f"{wanted}: pip install 'vicinal[{extras}]'")


def _is_importable(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


_LONGEST_LINE, _LONGEST_MESSAGE = 200, 500


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: its first one, and all that follows where that only announces it by a colon.

    An error out of a loader process is its last line, below that process's traceback. What has no message, or only the
    key that was missing, is named by its type.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        lines[0] = f"KeyError: {lines[0]}"
    if any(line.startswith("Original Traceback") for line in lines):
        lines = lines[-1:]
    elif not lines[0].endswith(":"):
        lines = lines[:1]
    return cut(" ".join(cut(line, _LONGEST_LINE) for line in lines), _LONGEST_MESSAGE)


def cut(text: str, length: int) -> str:
    """The beginning of a text that is longer than so many characters."""
    return text if len(text) <= length else f"{text[: length - 4].rstrip()} ..."


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command and turn its expected failures into exit codes.

    Args:
        command: takes the arguments after the command's name and returns an exit code.
        argv: those arguments; ``--debug`` among them lets the exception through with its traceback, and is taken out.

    Returns:
        What the command returned; 2 for a :class:`UserError`, and for a file that cannot be read or written; 1 for a
        :class:`RunStopped`, and where memory or room on a disk ends; 75 for a :class:`RunPaused`; 130 for Ctrl-C; 141
        where the reader of the output is gone, as of ``| head``.
    """
    options = [argument for argument in argv if argument != DEBUG]
    try:
        _prepare_streams()
        try:
            return command(options)
        finally:
            sys.stdout.flush()
    except RunPaused as pause:
        _say("paused", _one_line(pause))
        return PAUSED_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        if not _is_unread():  # the pipe of a worker, which is a fault
            raise
        return UNREAD_EXIT_CODE
    except Exception as error:
        exit_code, message = _explain(error)
        if message is None or DEBUG in argv:
            raise
        _say("error", message)
        return exit_code


def _prepare_streams() -> None:
    """Have something to print to, whichever characters a name holds: it shall not fail at the end of the work.

    A stream that was closed before the start is None in Python; one of another encoding, as an ASCII terminal's,
    refuses what it cannot encode, which is then written as an escape.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _explain(error: Exception) -> tuple[int, str | None]:
    """The exit code of an error and its one line; no line for what nobody expects: a fault of this package."""
    if isinstance(error, UserError):
        return USAGE_EXIT_CODE, _one_line(error)
    if isinstance(error, RunStopped):
        return STOPPED_EXIT_CODE, _one_line(error)
    shortage = find_shortage(error)
    if shortage is not None:
        return STOPPED_EXIT_CODE, f"{shortage}: {first_line(error)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return USAGE_EXIT_CODE, f"{os.fsdecode(error.filename)}: {error.strerror}"
    return STOPPED_EXIT_CODE, None


_OUT_OF_MEMORY = "out of memory: take less at a time, by a smaller --batch-size or --img-size"
_OUT_OF_SHARED_MEMORY = "no room in shared memory (/dev/shm): make it larger, or lower --workers or --batch-size"
_OUT_OF_DISK = "no room on the disk"
_SHORTAGES = (
    (r"(shared memory|shm|</torch_).*(No space left|llocate memory)|Bus error.*shared memory", _OUT_OF_SHARED_MEMORY),
    (r"out of memory|llocate memory|CUBLAS_STATUS_ALLOC_FAILED|Storage size calculation overflowed", _OUT_OF_MEMORY),
    (r"No space left on device", _OUT_OF_DISK),
)
"""How torch's messages tell that something has run out, and what to say of it; the first that fits counts."""


def find_shortage(error: Exception) -> str | None:
    """What the machine has too little of, if that is the error's cause."""
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    if isinstance(error, OSError):
        meanings = {errno.ENOSPC: _OUT_OF_DISK, errno.EDQUOT: _OUT_OF_DISK, errno.ENOMEM: _OUT_OF_MEMORY}
        return meanings.get(error.errno)
    if not isinstance(error, RuntimeError):
        return None
    return next((meaning for sign, meaning in _SHORTAGES if re.search(sign, str(error), re.DOTALL)), None)


def _is_unread() -> bool:
    """Whether nobody reads what is printed any more; if so, what Python still holds of it is thrown away."""
    stdout = sys.stdout.fileno()
    watch = select.poll()
    watch.register(stdout, 0)
    if not watch.poll(0):  # else an error or a hang-up, which are reported unasked
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _say(kind: str, message: str) -> None:
    print(f"{_rank_prefix()}{kind}: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _rank_prefix() -> str:
    return f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
