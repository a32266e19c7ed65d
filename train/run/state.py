"""What a run is at one moment: what a checkpoint holds.

Random generators are not part of it (see :mod:`.randomness`), and neither is the schedule, a function of ``epoch`` and
``position``.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ...checkpoints import load, save, save_model, write_atomically
from ...errors import UserError, find_shortage, first_line
from ...torch_internals import BatchNorm
from .folder import TRAINER_STATE
from .fsdp import (
    empty_shards,
    full_tensors,
    load_full_tensors,
    load_shards,
    mesh_of,
    save_shards,
    shard_optimizer_state,
    take_out_shards,
)
from .resume import changed_options, hold_against
from .world import World

TRAINING_WEIGHTS = "training_weights.safetensors"
SHARDS = "shards"
_FORMAT = 4
_COUNTERS = ("epoch", "position", "step", "loss_batches", "skips", "best_epoch")
_NUMBERS = ("loss_sum", "top1", "best_top1")
_PROGRESS = (*_COUNTERS, *_NUMBERS, "unreadable")
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys((*_COUNTERS, "processes"), int),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **{"unreadable": list, "average": bool, "optimizer": dict, "scaler": (dict, type(None)), "settings": dict},
}
# States of the optimizers that have a number for each weight.
_LIKE_THE_WEIGHT = ("exp_avg", "exp_avg_sq", "momentum_buffer")


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
    unreadable: list[str] = field(default_factory=list)
    """Messages of the images that could not be read."""
    top1: float = math.nan
    """Val accuracy after the last finished epoch, percent."""
    best_top1: float = -math.inf
    best_epoch: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """What the run is held against when it goes on from a checkpoint: see :mod:`.resume`."""

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
        return full_tensors(state, keep)

    def prepare_model(self, world: World) -> Callable[[Path], None]:
        """Gather the weights that evaluation sees (the average, if there is one); returns what writes them."""
        weights = self.weights(self.task.has_ema(), keep=world.is_primary)

        def write(folder: Path) -> None:
            if world.is_primary:
                save_model(folder, self.model, weights)

        return write

    def prepare(self, world: World, sharded: bool = False) -> Callable[[Path], None]:
        """Gather everything that a checkpoint holds; returns what writes it.

        Each process calls both. Gathering needs all of them, and writing none of the others, so that a full disk leaves
        nobody waiting (shards are written by torch, which tells all processes of a failure in one).

        Args:
            sharded: leave weights and optimizer in shards, each written by its process.
        """
        if sharded:
            optimizer, shards = take_out_shards(self.optimizer.state_dict())
            shards.update(self._model_shards())
            write_tensors = partial(_write_shards, shards)
        else:
            optimizer = full_tensors(self.optimizer.state_dict(), keep=world.is_primary)
            write_tensors = self._full_writer(world)
        progress = {
            "format": _FORMAT,
            "processes": world.size,
            "average": self.task.has_ema(),
            **{name: getattr(self, name) for name in _PROGRESS},
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "settings": self.settings,
        }
        buffers = self._own_buffers()

        def write(folder: Path) -> None:
            write_tensors(folder)
            if world.is_distributed and buffers:
                save(folder / _buffers_name(world.rank), buffers)
            if world.is_primary:
                write_atomically(folder / TRAINER_STATE, partial(_write_object, progress))

        return write

    def _full_writer(self, world: World) -> Callable[[Path], None]:
        write_model = self.prepare_model(world)
        training = self.weights(average=False, keep=world.is_primary) if self.task.has_ema() else None

        def write(folder: Path) -> None:
            write_model(folder)
            if world.is_primary and training is not None:
                save(folder / TRAINING_WEIGHTS, training)

        return write

    def _model_shards(self) -> dict[str, Tensor]:
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
            if isinstance(module, BatchNorm)
            for key, buffer in module.named_buffers(recurse=False)
        }

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of how far the run has come."""
        return {"epoch": self.epoch, "position": self.position, "best_epoch": self.best_epoch}

    def restore(self, folder: Path, world: World) -> list[str]:
        """Read what :meth:`prepare` wrote, on any number of processes, sharded or not.

        Options of the optimizer that are different now take the place of those that the checkpoint holds.

        Returns:
            What to say of the settings that are different now.

        Raises:
            UserError: a file is missing or damaged, or belongs to another model, other data or other settings.
        """
        progress = _read_progress(folder / TRAINER_STATE)
        notes = hold_against(progress["settings"], self.settings, f"--resume {folder}")
        sharded = (folder / SHARDS).is_dir()
        if sharded and not self.is_sharded:
            raise UserError(f"--resume {folder}: written with --sharded-checkpoints; add --parallel fsdp to read it")
        self._check_average(folder, progress["average"])
        fresh = [dict(group) for group in self.optimizer.param_groups]
        try:
            if sharded:
                self._restore_shards(folder, progress)
            else:
                self._restore_full(folder, progress)
            if self.scaler and progress["scaler"]:
                self.scaler.load_state_dict(progress["scaler"])
            own = folder / _buffers_name(world.rank)
            if own.is_file() and progress["processes"] == world.size:
                self._restore_buffers(load(own))
            self._check_optimizer()
        except Exception as error:  # whatever the readers of torch do with a file that is not what it says
            if find_shortage(error):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"--resume {folder}: does not fit this model and optimizer: {reason}") from error
        self._apply_options(fresh, changed_options(progress["settings"], self.settings), folder)
        for name in _PROGRESS:
            setattr(self, name, progress[name])
        return notes

    def _check_optimizer(self) -> None:
        """Refuse a state that would fail at the first update."""
        for parameter, state in self.optimizer.state.items():
            for name in _LIKE_THE_WEIGHT:
                value = state.get(name)
                if value is not None and getattr(value, "shape", None) != parameter.shape:
                    raise ValueError(f"{name} of a weight of shape {tuple(parameter.shape)} has another shape")

    def _apply_options(self, fresh: list[dict[str, Any]], names: list[str], folder: Path) -> None:
        """Options of the groups as they are configured now; the learning rate is the schedule's."""
        for group, own in zip(self.optimizer.param_groups, fresh, strict=True):
            unknown = [name for name in names if name not in own]
            if unknown:
                raise UserError(f"--resume {folder}: --optimizer-kwargs {unknown[0]} cannot be changed in a run")
            group.update({name: own[name] for name in ("weight_decay", *names) if name in own})

    def _restore_full(self, folder: Path, progress: dict[str, Any]) -> None:
        has_average = progress["average"]
        if has_average:
            load_full_tensors(unwrap_model(self.task.get_trainable_module(ema=True)), load(folder))
        load_full_tensors(self.model, load(folder / TRAINING_WEIGHTS if has_average else folder))
        optimizer = progress["optimizer"]
        if self.is_sharded:
            optimizer = shard_optimizer_state(optimizer, self._parameters())
        self.optimizer.load_state_dict(optimizer)

    def _restore_shards(self, folder: Path, progress: dict[str, Any]) -> None:
        optimizer = empty_shards(progress["optimizer"], self._parameters())
        _, shards = take_out_shards(optimizer)
        model = self._model_shards()
        # In place: the tensors of the model are what is read into.
        load_shards(folder / SHARDS, {**shards, **model})
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


def _write_shards(shards: dict[str, Tensor], folder: Path) -> None:
    save_shards(folder / SHARDS, shards)


def _buffers_name(rank: int) -> str:
    return f"buffers-{rank:05d}.safetensors"


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle makes of itself
        if find_shortage(error):
            raise
        raise UserError(f"--resume: cannot read {path}: {first_line(error)}") from error
    if not isinstance(progress, dict) or progress.get("format") != _FORMAT:
        raise UserError(f"--resume: {path} is not a trainer state of this version")
    for name, kind in _KINDS.items():
        value = progress.get(name)
        is_whole = name in progress and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not is_whole or (kind is int and value < 0):
            given = f"{name} is {value!r:.60}" if name in progress else f"{name} is missing"
            raise UserError(f"--resume: {path} is not a whole trainer state: {given}")
    if not all(isinstance(message, str) for message in progress["unreadable"]):
        raise UserError(f"--resume: {path} is not a whole trainer state: unreadable holds other things than messages")
    return progress
