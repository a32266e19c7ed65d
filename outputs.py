"""Whether a command will be able to write what it is asked for: found out before its work, not after."""

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

_PROBE_BYTES = 4096
"""Written and removed again: on a disk that is full an empty file can still be made."""


def check_output_file(option: str, path: str | os.PathLike, formats: Collection[str] = ()) -> Path:
    """Refuse a file that could not be written; missing folders above it are no obstacle, and nothing stays behind.

    Args:
        option: that the path was given by, for the message.
        formats: suffixes without their dot, of which the path's chooses one; none if any name will do.

    Raises:
        UserError: a suffix that means no format, a folder or a device in the file's place, a file where a folder
            should be, no permission, or no room.
    """
    path = Path(path)
    if formats and path.suffix.lower().removeprefix(".") not in formats:
        raise UserError(f"{option} {path}: the suffix chooses the format; use one of .{', .'.join(formats)}")
    with _refusing(option, path):
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; give a file")
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{option} {path}: is no regular file, and would be replaced by one; give a file")
        if path.is_file() and not os.access(path, os.W_OK):
            raise UserError(f"{option} {path}: is write-protected; give another file")
        _write_probe(option, path, path.parent, f".{path.name}.")
    return path


def check_output_folder(option: str, path: str | os.PathLike) -> Path:
    """Refuse a folder in which no file could be written; it need not exist, and nothing stays behind.

    Raises:
        UserError: a file in its place or above it, no permission, or no room.
    """
    path = Path(path)
    with _refusing(option, path):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{option} {path}: is a file; give a folder")
        _write_probe(option, path, path, ".")
    return path


@contextmanager
def _refusing(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise UserError(
            f"{option} {path}: no file can have this name in the encoding {error.encoding}; set PYTHONUTF8=1"
        ) from error
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}; give another place") from error


def _write_probe(option: str, path: Path, folder: Path, prefix: str) -> None:
    """Write a file under the name of a temporary one into the folder, or into the nearest one above that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: {folder} is a file, not a folder; give another place")
    handle, probe = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=".tmp")
    try:
        os.write(handle, bytes(_PROBE_BYTES))
    finally:
        os.close(handle)
        os.unlink(probe)
