"""Progress for a person: bars on a terminal, plain lines elsewhere, nothing from any process but the first."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Protocol

import torch

PLAIN_INTERVAL = 60.0
"""Seconds between two plain lines about the same epoch."""


@dataclass(frozen=True)
class Progress:
    """How far an epoch has come.

    Attributes:
        epoch: counted from 1.
        done, total: updates of the epoch.
        loss: of the last update.
        images_per_second: of all processes.
        seconds_left: of training until the end of the run.
        memory: most bytes held so far: of CUDA memory, or of this process.
    """

    epoch: int
    done: int
    total: int
    loss: float
    images_per_second: float
    seconds_left: float
    memory: int

    @property
    def rates(self) -> str:
        """Throughput, time left and memory, for people."""
        left = "?" if self.seconds_left != self.seconds_left else _duration(self.seconds_left)
        return f"{self.images_per_second:.0f} images/s  {left} left  {self.memory / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


def peak_memory(device: torch.device) -> int:
    """Most bytes that were held at a time: tensors on CUDA, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Screen(Protocol):
    """Progress for a person."""

    def say(self, text: str) -> None:
        """Print a line."""
        ...

    def advance(self, progress: Progress) -> None:
        """An update is done."""
        ...

    def close(self) -> None:
        """The run is over; give the terminal back."""
        ...


class SilentScreen:
    """For every process but the first."""

    def say(self, text: str) -> None:
        """Nothing."""

    def advance(self, progress: Progress) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainScreen(SilentScreen):
    """Lines, for files and pipes."""

    def __init__(self, epochs: int):
        self.epochs = epochs
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def advance(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_INTERVAL:
            return
        self._last = now
        self.say(
            f"epoch {progress.epoch:>3}/{self.epochs}  update {progress.done}/{progress.total}  "
            f"loss {progress.loss:.4f}  {progress.rates}"
        )


class TerminalScreen:
    """A bar for the running epoch, with the lines above it."""

    def __init__(self, epochs: int):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rates]}"),
        )
        self.epochs, self.epoch, self.bar = epochs, 0, None
        self.bars.start()

    def say(self, text: str) -> None:
        self.bars.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def advance(self, progress: Progress) -> None:
        fields = {"loss": progress.loss, "rates": progress.rates}
        if progress.epoch != self.epoch:
            self._remove_bar()
            self.epoch = progress.epoch
            name = f"epoch {progress.epoch}/{self.epochs}"
            self.bar = self.bars.add_task(name, total=progress.total, **fields)
        self.bars.update(self.bar, completed=progress.done, **fields)

    def _remove_bar(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
            self.bar = None

    def close(self) -> None:
        self._remove_bar()
        self.bars.stop()


def open_screen(is_primary: bool, epochs: int) -> Screen:
    """Bars on a terminal, plain lines elsewhere, nothing in other processes."""
    if not is_primary:
        return SilentScreen()
    return TerminalScreen(epochs) if sys.stdout.isatty() else PlainScreen(epochs)
