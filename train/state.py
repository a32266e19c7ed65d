"""What a run is at one moment: what a checkpoint holds.

Random generators are not part of it (see :mod:`.randomness`), and neither is the schedule, a function of ``epoch`` and
``position``.
"""

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints import load, save, save_model, write_atomically
from .distributed import World
from .errors import UserError, first_line
from .folder import TRAINER_STATE
from .sharding import (
    as_wholes,
    empty_shares,
    load_shares,
    load_wholes,
    mesh_of,
    optimizer_shares,
    save_shares,
    take_out_shares,
)

TRAINING_WEIGHTS = "training_weights.safetensors"
SHARES = "shares"
_FORMAT = 2
_PROGRESS = (
    *("epoch", "position", "step", "loss_sum", "loss_batches", "skips", "broken"),
    *("top1", "best_top1", "best_epoch"),
)


@dataclass
class TrainState:
    """Weights, their average, the optimizer, the loss scaler, and how far the run has come."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    epoch: int = 0
    """Epochs finished."""
    position: int = 0
    """Images of the unfinished epoch's order that all processes have trained on."""
    step: int = 0
    """Updates done or skipped."""
    loss_sum: float = 0.0
    """Sum over the batches of the unfinished epoch of their loss."""
    loss_batches: int = 0
    skips: int = 0
    """Updates skipped in a row, up to now."""
    broken: list[str] = field(default_factory=list)
    """Messages of the images that could not be read."""
    top1: float = math.nan
    """Held-out accuracy after the last finished epoch, percent."""
    best_top1: float = -math.inf
    best_epoch: int = 0

    @property
    def model(self) -> nn.Module:
        """The network under training, without wrappers."""
        return unwrap_model(self.task.get_trainable_module())

    @property
    def is_sharded(self) -> bool:
        return mesh_of(self.model) is not None

    def weights(self, average: bool, keep: bool = True) -> dict[str, Tensor]:
        """The network's state dict: the moving average's, or the weights under training.

        All processes of a sharded model call this together; ``keep=False`` gives the memory back at once.
        """
        state = unwrap_model(self.task.get_trainable_module(ema=average)).state_dict()
        return as_wholes(state, keep)

    def prepare_model(self, world: World) -> Callable[[Path], None]:
        """Gather the weights that evaluation sees (the average, if there is one); returns what writes them."""
        weights = self.weights(self.task.has_ema(), keep=world.is_primary)

        def write(folder: Path) -> None:
            if world.is_primary:
                save_model(folder, self.model, weights)

        return write

    def prepare(self, world: World, as_shares: bool = False) -> Callable[[Path], None]:
        """Gather everything that a checkpoint holds; returns what writes it.

        Each process calls both. Gathering needs all of them, and writing none of the others, so that a full disk leaves
        nobody waiting (shares are written by torch, which tells all processes of a failure in one).

        Args:
            as_shares: leave weights and optimizer in shares, each written by its process.
        """
        if as_shares:
            optimizer, shares = take_out_shares(self.optimizer.state_dict())
            shares.update(self._model_shares())
            write_tensors = partial(_write_shares, shares)
        else:
            optimizer = as_wholes(self.optimizer.state_dict(), keep=world.is_primary)
            write_tensors = self._whole_writer(world)
        progress = {
            "format": _FORMAT,
            "processes": world.size,
            "average": self.task.has_ema(),
            **{name: getattr(self, name) for name in _PROGRESS},
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        buffers = self._own_buffers()

        def write(folder: Path) -> None:
            write_tensors(folder)
            if world.is_distributed and buffers:
                save(folder / _buffers_name(world.rank), buffers)
            if world.is_primary:
                write_atomically(folder / TRAINER_STATE, partial(_write_object, progress))

        return write

    def _whole_writer(self, world: World) -> Callable[[Path], None]:
        write_model = self.prepare_model(world)
        training = self.weights(average=False, keep=world.is_primary) if self.task.has_ema() else None

        def write(folder: Path) -> None:
            write_model(folder)
            if world.is_primary and training is not None:
                save(folder / TRAINING_WEIGHTS, training)

        return write

    def _model_shares(self) -> dict[str, Tensor]:
        kinds = ("weights", "average") if self.task.has_ema() else ("weights",)
        return {
            f"{kind}.{name}": tensor
            for kind in kinds
            for name, tensor in unwrap_model(self.task.get_trainable_module(ema=kind == "average")).state_dict().items()
        }

    def _own_buffers(self) -> dict[str, Tensor]:
        """Statistics of batch norm, which differ from process to process until an epoch ends."""
        return {
            f"{average}.{name}.{key}": buffer
            for average in ((False, True) if self.task.has_ema() else (False,))
            for name, module in unwrap_model(self.task.get_trainable_module(ema=average)).named_modules()
            if isinstance(module, _BatchNorm)
            for key, buffer in module.named_buffers(recurse=False)
        }

    def restore(self, folder: Path, world: World) -> None:
        """Read what :meth:`prepare` wrote, on any number of processes, sharded or not.

        Raises:
            UserError: a file is missing or damaged, or belongs to another model or other settings.
        """
        progress = _read_progress(folder / TRAINER_STATE)
        as_shares = (folder / SHARES).is_dir()
        if as_shares and not self.is_sharded:
            raise UserError(f"--resume {folder}: written with --sharded-checkpoints; add --parallel fsdp to read it")
        self._check_average(folder, progress["average"])
        try:
            if as_shares:
                self._restore_shares(folder, progress)
            else:
                self._restore_wholes(folder, progress)
            if self.scaler and progress["scaler"]:
                self.scaler.load_state_dict(progress["scaler"])
            own = folder / _buffers_name(world.rank)
            if own.is_file() and progress["processes"] == world.size:
                self._restore_buffers(load(own))
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"--resume {folder}: does not fit this model and optimizer: {first_line(error)}") from error
        for name in _PROGRESS:
            setattr(self, name, progress[name])

    def _restore_wholes(self, folder: Path, progress: dict[str, Any]) -> None:
        has_average = progress["average"]
        if has_average:
            load_wholes(unwrap_model(self.task.get_trainable_module(ema=True)), load(folder))
        load_wholes(self.model, load(folder / TRAINING_WEIGHTS if has_average else folder))
        optimizer = progress["optimizer"]
        if self.is_sharded:
            optimizer = optimizer_shares(optimizer, self._parameters())
        self.optimizer.load_state_dict(optimizer)

    def _restore_shares(self, folder: Path, progress: dict[str, Any]) -> None:
        optimizer = empty_shares(progress["optimizer"], self._parameters())
        _, shares = take_out_shares(optimizer)
        model = self._model_shares()
        # In place: the tensors of the model are what is read into.
        load_shares(folder / SHARES, {**shares, **model})
        self.optimizer.load_state_dict(optimizer)

    def _check_average(self, folder: Path, has_average: bool) -> None:
        if has_average != self.task.has_ema():
            fix = "give the same --ema-decay" if has_average else "leave out --ema-decay"
            raise UserError(f"--resume {folder}: saved {'with' if has_average else 'without'} an average; {fix}")

    def _restore_buffers(self, saved: dict[str, Tensor]) -> None:
        for name, buffer in self._own_buffers().items():
            buffer.copy_(saved[name])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def _write_object(value: Any, path: str) -> None:
    # By way of memory: where the disk is full, torch.save to a file speaks of unexpected positions in it.
    content = io.BytesIO()
    torch.save(value, content)
    Path(path).write_bytes(content.getbuffer())


def _write_shares(shares: dict[str, Tensor], folder: Path) -> None:
    save_shares(folder / SHARES, shares)


def _buffers_name(rank: int) -> str:
    return f"buffers-{rank:05d}.safetensors"


def _read_progress(path: Path) -> dict:
    try:
        progress = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"--resume: cannot read {path}: {first_line(error)}") from error
    if not isinstance(progress, dict) or progress.get("format") != _FORMAT:
        raise UserError(f"--resume: {path} is not a trainer state of this version")
    return progress
