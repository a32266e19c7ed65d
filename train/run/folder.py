"""The folder of a run: who may write into it, and its checkpoints, each whole or absent."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...checkpoints import write_atomically
from ...checkpoints.files import WEIGHTS_NAME
from ...errors import RunStopped, UserError, first_line
from .world import World, first_exception, is_restarted

TRAINER_STATE = "trainer.pt"
MANIFEST = "manifest.json"
BEST = "best"
_LOCK = ".lock"
# What JSON that is not the manifest's, or not even JSON, makes of the lines that read it.
MANIFEST_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class RunFolder:
    """The folder of one run.

    Holds ``config.yaml``, ``metrics.jsonl``, ``metrics.csv`` and checkpoints: ``last/``, the newest one, from which a
    run resumes; ``previous/``, the one before it; ``best/``, the model with the highest val accuracy; and
    ``epoch-0010/`` and so on where asked for. Each is written under a temporary name, listed with the digests of its
    files in ``manifest.json``, and renamed: a checkpoint is either whole or it is not there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.table, self.report = self.path / "metrics.csv", self.path / "report.png"
        self._lock: int | None = None

    def check(self, may_hold_files: bool) -> None:
        """Refuse a folder that another run writes, or that holds files unless it may."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path}: is a file; give a folder")
        if (self.path / _LOCK).is_file():
            self._take_lock()
            self.release()
        if self.path.is_dir() and not may_hold_files and any(item.name != _LOCK for item in self.path.iterdir()):
            raise UserError(
                f"--output {self.path}: is not empty; --resume auto goes on from its last checkpoint, "
                "or give another --output"
            )

    def claim(self, may_hold_files: bool) -> None:
        """Create the folder and lock it, unless :meth:`check` refuses it."""
        self.check(may_hold_files)
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()

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

    def replace(
        self, name: str, write: Callable[[Path], None], world: World, facts: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a checkpoint and put it in the place of the old one; all processes call this together.

        Args:
            name: of the folder; the old ``last`` becomes ``previous``.
            write: fills the folder that it is given, in every process.
            facts: kept in the manifest, see :func:`read_facts`.

        Raises:
            RunStopped: in all processes, if one could not write; the old checkpoint is untouched.
        """
        target, partial = self.path / name, self.path / f".{name}.partial"
        failure = _attempt(world, lambda: _make_empty(partial) if world.is_primary else None)
        failure = failure or _attempt(world, lambda: write(partial))
        failure = failure or self._list_files(partial, world, facts or {})
        failure = failure or _attempt(world, lambda: self._swap(partial, target) if world.is_primary else None)
        if failure:
            raise RunStopped(self._describe_failure(name, partial, failure, world))
        return target

    def _list_files(self, partial: Path, world: World, facts: Mapping[str, Any]) -> str | None:
        """Write the manifest; the processes share the work of reading the files again."""
        digests: dict[str, dict] = {}

        def digest() -> None:
            digests.update(digest_files(partial, list_files(partial)[world.rank :: world.size]))

        failure = _attempt(world, digest)
        merged = {name: entry for part in world.all_gather(digests) for name, entry in part.items()}
        if failure:
            return failure
        text = json.dumps({"facts": dict(facts), "files": merged}, indent=1, sort_keys=True)
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
        old = self.path / ("previous" if target.name == "last" else f".{target.name}.old")
        if target.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        if target.name != "last":
            shutil.rmtree(old, ignore_errors=True)
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

    def find_best_of(self, epoch: int) -> Path | None:
        """``best/``, if it is whole and the model of that epoch."""
        best = self.path / BEST
        return best if read_facts(best).get("epoch") == epoch and find_damage(best) is None else None

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


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint's files into a folder, but for the manifest."""
    for name in list_files(source):
        if name != MANIFEST:
            write_atomically(target / name, partial(shutil.copyfile, source / name))


def read_facts(folder: Path) -> dict[str, Any]:
    """How far the run had come when a checkpoint was written; empty where its manifest does not say."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["facts"]
    except MANIFEST_ERRORS:
        return {}
    return facts if isinstance(facts, dict) else {}


def find_best(run: Path) -> tuple[Path | None, str | None]:
    """The folder of a run's best model, or None, and what to say about the choice.

    A process that dies between writing ``last/`` and ``best/`` leaves the best model in ``last/`` alone.
    """
    best, last = run / BEST, run / "last"
    facts = read_facts(last)
    is_last_best = facts.get("position") == 0 and facts.get("epoch") is not None
    is_last_best = is_last_best and facts["epoch"] == facts.get("best_epoch")
    has_last = (last / WEIGHTS_NAME).is_file()
    if is_last_best and has_last and read_facts(best).get("epoch") != facts["epoch"]:
        return last, f"{best} is not of the best epoch, {facts['epoch']}: the run died before it was written; {last} is"
    if best.is_dir():
        return best, None
    return (last, f"{best} is not there: {last} is taken, the newest model") if has_last else (None, None)


def find_damage(folder: Path, needed: str = WEIGHTS_NAME) -> str | None:
    """What is wrong with a checkpoint's files, of which it must have one, or None."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except MANIFEST_ERRORS as error:
        return f"{MANIFEST} cannot be read: {first_line(error)}"
    if needed not in entries:
        return f"{MANIFEST} does not list {needed}"
    for name, entry in entries.items():
        try:
            if damage := _find_damage_of(folder, name, *entry):
                return damage
        except (OSError, ValueError) as error:  # such as a name that no file can have
            return f"{name} cannot be read: {first_line(error)}"
    return None


def _find_damage_of(folder: Path, name: str, size: Any, sha256: Any) -> str | None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{MANIFEST} lists {name}, which lies elsewhere"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} of {size} bytes"
    is_same = digest_files(folder, [name])[name]["sha256"] == sha256
    return None if is_same else f"the content of {name} has changed"


def find_resume_point(resume: str | None, output: RunFolder, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``--resume`` means, or None to start anew, and what to say about the choice.

    A run that torchrun started again goes on from its own checkpoint in any case.

    Raises:
        UserError: a path was given, and it holds no checkpoint, or there are only damaged ones.
    """
    found, notes, problem = world.broadcast(_search(resume, output) if world.is_primary else None)
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
        damage = find_damage(folder, needed=TRAINER_STATE)
        if damage is None:
            return folder, [*notes, f"going on from {folder}"] if notes else notes, None
        notes.append(f"{folder} is damaged: {damage}")
    problem = f"--resume {resume}: {'; '.join(notes)}; no whole checkpoint is left" if notes else None
    return None, notes, problem
