"""One update: forward and backward of the batches of a group, and the optimizer's step, unless the loss forbids it."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from ..torch_internals import BatchNorm, copy_all
from .build import autocast
from .config import TrainConfig
from .data.transforms import Preprocess
from .run.randomness import seed_all, stream_seed
from .run.state import TrainState
from .run.world import Arrival, World

Batch = tuple[Tensor, Tensor]


class UpdateReport(NamedTuple):
    """What all processes know after an update.

    Attributes:
        loss: mean over the group's images, of all processes.
        stop: whether a process was asked to end.
        unreadable: images newly found unreadable.
    """

    loss: float
    stop: bool
    unreadable: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


def groups_of(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of ``size`` batches; the last list holds what is left."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


class NormStatistics:
    """The running statistics of batch norm before an update: a forward pass that is not finite spoils them.

    Args:
        model: whose statistics to keep.
    """

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Note them as they are now."""
        if self.buffers:
            copy_all(self.kept, self.buffers)

    @torch.no_grad()
    def give_back(self) -> None:
        """Set them as they were noted."""
        if self.buffers:
            copy_all(self.buffers, self.kept)


class Updater:
    """Runs updates.

    Args:
        config: of the run.
        world: the processes that share it.
        state: changed by each update.
        preprocess: a batch's last steps.
        should_stop: whether this process was asked to end.
        count_unreadable: images that this process newly found unreadable.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        state: TrainState,
        preprocess: Preprocess,
        should_stop: Callable[[], bool] = lambda: False,
        count_unreadable: Callable[[], int] = lambda: 0,
    ):
        self.config, self.world, self.state, self.preprocess = config, world, state, preprocess
        self.should_stop, self.count_unreadable = should_stop, count_unreadable
        self.statistics = NormStatistics(state.model)

    def run(self, group: Sequence[Batch], key: tuple[int, ...]) -> UpdateReport:
        """Average the gradients of a group's batches into one update; leaves it out if the loss is not finite.

        Args:
            group: this process's batches, images (B, 3, H, W) uint8 and targets (B,).
            key: counters that choose what is random in the update.
        """
        task, device = self.state.task, self.world.device
        self.statistics.keep()
        total = torch.zeros((), device=device)
        for number, batch in enumerate(group):
            seed_all(stream_seed("batch", self.config.run.seed, *key, number, self.world.rank))
            images, targets = self.preprocess(*batch)
            completes = number == len(group) - 1
            with nullcontext() if completes else task.no_sync():
                with autocast(self.config.run, device):
                    loss = task(images, targets)["loss"] / len(group)
                total += loss.detach()
                # On its way before the backward pass, so that the host learns of it while the device is at that.
                arrival = self._announce(total) if completes else None
                self._backward(loss)
        loss_sum, stop, unreadable = arrival.read()
        report = UpdateReport(loss_sum / self.world.size, stop > 0, round(unreadable))
        self._step() if report.is_finite else self._leave_out()
        return report

    def _announce(self, loss: Tensor) -> Arrival:
        values = torch.zeros(3, device=loss.device)
        values[0] = loss
        if self.should_stop():
            values[1] = 1
        if count := self.count_unreadable():
            values[2] = count
        return self.world.all_reduce(values)

    def _backward(self, loss: Tensor) -> None:
        scaler = self.state.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _step(self) -> None:
        state, config = self.state, self.config.optimizer
        if config.clip_grad is not None:
            if state.scaler is not None:
                state.scaler.unscale_(state.optimizer)
            # Adaptive clipping leaves the classifier alone (Brock et al. 2021, section 4.1).
            parameters = state.task.get_clip_parameters(exclude_head=config.clip_mode == "agc")
            dispatch_clip_grad(list(parameters), config.clip_grad, config.clip_mode)
        if state.scaler is not None:
            state.scaler.step(state.optimizer)
            state.scaler.update()
        else:
            state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.skips = 0
        state.task.update_ema(step=state.step)

    def _leave_out(self) -> None:
        self.state.optimizer.zero_grad()
        self.statistics.give_back()
        self.state.step += 1
        self.state.skips += 1
