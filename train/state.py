"""What a run is at one moment, and the folder it is kept in.

Random generators are not part of it (see :mod:`.randomness`), and neither is the schedule, a function of ``step``.
"""

import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.task import TrainingTask
from timm.utils import NativeScaler, unwrap_model
from torch import Tensor

from ..checkpoints import load, save, save_model, write_atomically
from .errors import UserError, first_line

TRAINING_WEIGHTS = "training_weights.safetensors"
TRAINER_STATE = "trainer.pt"
_FORMAT = 1
_PROGRESS = ("epoch", "step", "top1", "best_top1", "best_epoch")


@dataclass
class TrainState:
    """Weights, their average, the optimizer, the loss scaler, and how far the run has come."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scaler: NativeScaler | None = None
    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Updates done."""
    top1: float = math.nan
    """Held-out accuracy after the last finished epoch, percent."""
    best_top1: float = -math.inf
    best_epoch: int = 0

    def weights(self, average: bool) -> dict[str, Tensor]:
        """The network's state dict: the moving average's, or the weights under training."""
        return unwrap_model(self.task.get_trainable_module(ema=average)).state_dict()

    def save_weights(self, folder: Path) -> None:
        """Write the weights that evaluation sees (the average, if there is one) as a timm model folder."""
        model = unwrap_model(self.task.get_trainable_module())
        save_model(folder, model, self.weights(average=self.task.has_ema()))

    def save(self, folder: Path) -> None:
        """Write the model folder and, beside it, what only the trainer needs."""
        self.save_weights(folder)
        if self.task.has_ema():
            save(folder / TRAINING_WEIGHTS, self.weights(average=False))
        progress = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in _PROGRESS},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        write_atomically(folder / TRAINER_STATE, lambda temporary: torch.save(progress, temporary))

    def restore(self, folder: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: a file is missing or damaged, or belongs to another model or other settings.
        """
        progress = _read_progress(folder / TRAINER_STATE)
        has_average = (folder / TRAINING_WEIGHTS).is_file()
        if has_average != self.task.has_ema():
            fix = "give the same --ema-decay" if has_average else "leave out --ema-decay"
            raise UserError(f"--resume {folder}: saved {'with' if has_average else 'without'} an average; {fix}")
        try:
            if has_average:
                self.task.load_checkpoint_state(load(folder), ema=True)
            self.task.load_checkpoint_state(load(folder / TRAINING_WEIGHTS if has_average else folder))
            self.optimizer.load_state_dict(progress["optimizer"])
            if self.scaler and progress["scaler"]:
                self.scaler.load_state_dict(progress["scaler"])
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"--resume {folder}: does not fit this model and optimizer: {first_line(error)}") from error
        for name in _PROGRESS:
            setattr(self, name, progress[name])


def _read_progress(path: Path) -> dict:
    try:
        progress = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"--resume: cannot read {path}: {first_line(error)}") from error
    if not isinstance(progress, dict) or progress.get("format") != _FORMAT:
        raise UserError(f"--resume: {path} is not a trainer state of this version")
    return progress


class RunFolder:
    """The folder of one run.

    Holds ``config.yaml``, ``metrics.jsonl``, ``metrics.csv``, ``last/`` (the newest checkpoint, from which a run
    resumes) and ``best/`` (the model with the highest held-out accuracy). A checkpoint folder is replaced as a whole:
    at every moment a complete one exists, under its name or, between two renames, under ``NAME.previous``.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.table, self.report = self.path / "metrics.csv", self.path / "report.png"

    def claim(self, may_hold_files: bool) -> None:
        """Create the folder; refuse one that holds anything, unless it is this run's own."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path}: is a file; give a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not may_hold_files:
            raise UserError(
                f"--output {self.path}: is not empty; --resume auto goes on from its last checkpoint, "
                "or give another --output"
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, name: str) -> Path | None:
        """The complete checkpoint folder ``last`` or ``best``, or None."""
        candidates = (self.path / name, self._previous(name))
        return next((folder for folder in candidates if folder.is_dir()), None)

    def replace(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint folder under a temporary name, then put it in the place of the old one."""
        target, partial, previous = self.path / name, self.path / f".{name}.partial", self._previous(name)
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        if target.is_dir():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        partial.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
        return target

    def _previous(self, name: str) -> Path:
        return self.path / f"{name}.previous"


def find_resume_point(resume: str | None, output: RunFolder) -> Path | None:
    """The checkpoint folder that ``--resume`` means, or None to start anew.

    Raises:
        UserError: a path was given, and it holds no checkpoint.
    """
    if resume is None:
        return None
    source = output if resume == "auto" else RunFolder(resume)
    found = source.checkpoint("last")
    if found is None and (source.path / TRAINER_STATE).is_file():
        found = source.path
    if found is None and resume != "auto":
        raise UserError(f"--resume {resume}: no last/ checkpoint there; give the folder of a run, or auto")
    return found
