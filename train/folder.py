"""The folder of a run: who may write into it, and its checkpoints, each whole or absent."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..checkpoints import write_atomically
from .distributed import World, first_exception, is_restarted
from .errors import RunStopped, UserError, first_line

TRAINER_STATE = "trainer.pt"
MANIFEST = "manifest.json"
_LOCK = ".lock"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class RunFolder:
    """The folder of one run.

    Holds ``config.yaml``, ``metrics.jsonl``, ``metrics.csv`` and checkpoints: ``last/``, the newest one, from which a
    run resumes; ``previous/``, the one before it; ``best/``, the model with the highest held-out accuracy; and
    ``epoch-0010/`` and so on where asked for. Each is written under a temporary name, listed with the digests of its
    files in ``manifest.json``, and renamed: a checkpoint is either whole or it is not there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.table, self.report = self.path / "metrics.csv", self.path / "report.png"
        self._lock: int | None = None

    def claim(self, may_hold_files: bool) -> None:
        """Create the folder and lock it; refuse one that another run writes, or that holds files unless it may."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path}: is a file; give a folder")
        if self.path.is_dir() and not may_hold_files and any(item.name != _LOCK for item in self.path.iterdir()):
            self._refuse_if_locked()
            raise UserError(
                f"--output {self.path}: is not empty; --resume auto goes on from its last checkpoint, "
                "or give another --output"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()

    def _refuse_if_locked(self) -> None:
        if (self.path / _LOCK).is_file():
            self._take_lock()
            self.release()

    def _take_lock(self) -> None:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"--output {self.path}: another run writes here ({holder}); wait for it, stop it, "
                "or give another --output"
            ) from error
        # The kernel drops the lock with the process, however it ends; the text is for people.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = descriptor

    def release(self) -> None:
        """Let others write into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def checkpoints(self) -> list[Path]:
        """The checkpoints from which the run can go on, newest first."""
        return [path for path in (self.path / "last", self.path / "previous") if path.is_dir()]

    def replace(self, name: str, write: Callable[[Path], None], world: World) -> Path:
        """Write a checkpoint and put it in the place of the old one; all processes call this together.

        Args:
            name: of the folder; the old ``last`` becomes ``previous``.
            write: fills the folder that it is given, in every process.

        Raises:
            RunStopped: in all processes, if one could not write; the old checkpoint is untouched.
        """
        target, partial = self.path / name, self.path / f".{name}.partial"
        failure = _attempt(world, lambda: _make_empty(partial) if world.is_primary else None)
        failure = failure or _attempt(world, lambda: write(partial))
        failure = failure or self._list_files(partial, world)
        failure = failure or _attempt(world, lambda: self._swap(partial, target) if world.is_primary else None)
        if failure:
            raise RunStopped(self._describe_failure(name, partial, failure, world))
        return target

    def _list_files(self, partial: Path, world: World) -> str | None:
        """Write the manifest; the processes share the work of reading the files again."""
        digests: dict[str, dict] = {}

        def digest() -> None:
            digests.update(digest_files(partial, list_files(partial)[world.rank :: world.size]))

        failure = _attempt(world, digest)
        merged = {name: entry for share in world.collect(digests) for name, entry in share.items()}
        if failure:
            return failure
        text = json.dumps({"files": merged}, indent=1, sort_keys=True)
        path = partial / MANIFEST
        return _attempt(
            world,
            lambda: (
                write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
                if world.is_primary
                else None
            ),
        )

    def _swap(self, partial: Path, target: Path) -> None:
        if target.is_dir():
            old = self.path / ("previous" if target.name == "last" else f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            partial.rename(target)
            if target.name != "last":
                shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(target)
        _flush_folder(self.path)

    def _describe_failure(self, name: str, partial: Path, failure: str, world: World) -> str:
        free = shutil.disk_usage(self.path).free
        if world.is_primary:
            shutil.rmtree(partial, ignore_errors=True)
        intact = ", ".join(path.name + "/" for path in self.checkpoints()) or "no checkpoint"
        return (
            f"cannot write checkpoint {self.path / name}: {failure} ({free / 2**20:.1f} MiB were free); "
            f"{intact} of before is intact: make room, then --resume auto"
        )

    def keep_newest(self, count: int) -> None:
        """Remove the checkpoints of single epochs but the newest."""
        kept = [path for path in self.path.iterdir() if re.fullmatch(r"epoch-\d+", path.name)]
        for path in sorted(kept, key=lambda path: int(path.name[6:]))[:-count]:
            shutil.rmtree(path, ignore_errors=True)


def _attempt(world: World, work: Callable[[], object]) -> str | None:
    """Do it in every process; what went wrong in any of them, or None."""
    error: BaseException | None = None
    try:
        work()
    except WRITE_ERRORS as caught:
        error = caught
    return first_exception(world, error)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(folder: Path) -> list[str]:
    """Names of the files below a folder, relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """Length and SHA-256 of files."""
    digests = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**22):
                digest.update(chunk)
            digests[name] = {"bytes": file.tell(), "sha256": digest.hexdigest()}
    return digests


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {first_line(error)}"
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} of {entry['bytes']} bytes"
        try:
            if digest_files(folder, [name])[name] != entry:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read: {first_line(error)}"
    return None


def find_resume_point(resume: str | None, output: RunFolder, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``--resume`` means, or None to start anew, and what to say about the choice.

    A run that torchrun started again goes on from its own checkpoint in any case.

    Raises:
        UserError: a path was given, and it holds no checkpoint, or there are only damaged ones.
    """
    found, notes, problem = world.share(_search(resume, output) if world.is_primary else None)
    if problem:
        raise UserError(problem)
    return found, notes


def _search(resume: str | None, output: RunFolder) -> tuple[Path | None, list[str], str | None]:
    if is_restarted() and output.checkpoints():
        resume = "auto"
    if resume is None:
        return None, [], None
    source = output if resume == "auto" else RunFolder(resume)
    candidates = source.checkpoints()
    if not candidates and (source.path / TRAINER_STATE).is_file():
        candidates = [source.path]
    if not candidates and resume != "auto":
        return None, [], f"--resume {resume}: no last/ checkpoint there; give the folder of a run, or auto"
    notes = []
    for folder in candidates:
        damage = find_damage(folder)
        if damage is None:
            return folder, [*notes, f"going on from {folder}"] if notes else notes, None
        notes.append(f"{folder} is damaged: {damage}")
    problem = f"--resume {resume}: {'; '.join(notes)}; no whole checkpoint is left" if notes else None
    return None, notes, problem
