"""What a run says: records on the disk, always, and progress on the screen, for the first process only."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, Protocol

from ..checkpoints import write_atomically

EPOCH_FIELDS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "val_loss",
    "val_top1",
    "val_top5",
    "val_images",
    "images_per_second",
    "seconds",
)


class MetricsLog:
    """Records of a run: every one as a line of ``metrics.jsonl``, those of epochs also as a row of ``metrics.csv``.

    Epochs count from 1.

    Args:
        jsonl, table: the two files.
        records: what the run said before it was resumed; replaces the files' content, so that what an interrupted epoch
            wrote does not appear twice.
    """

    def __init__(self, jsonl: Path, table: Path, records: list[dict[str, Any]]):
        self.jsonl, self.table = jsonl, table
        self.epochs = [record for record in records if record["event"] == "epoch"]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(jsonl, lambda temporary: Path(temporary).write_text(lines, encoding="utf-8"))
        self._write_table()

    def add(self, event: str, **values: Any) -> dict[str, Any]:
        """Append one record of an event, ``step`` or ``epoch``."""
        record = {"event": event, **values}
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if event == "epoch":
            self.epochs.append(record)
            self._write_table()
        return record

    def _write_table(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, EPOCH_FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        write_atomically(self.table, lambda temporary: Path(temporary).write_text(text.getvalue(), encoding="utf-8"))


def read_records(path: Path, last_epoch: int | None = None) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, up to an epoch if one is given; a torn last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [record for record in records if last_epoch is None or record["epoch"] <= last_epoch]


class Screen(Protocol):
    """Progress for a person."""

    def say(self, text: str) -> None:
        """Print a line."""
        ...

    def begin(self, epoch: int, batches: int) -> None:
        """An epoch of so many batches starts."""
        ...

    def advance(self, loss: float) -> None:
        """One batch is done; ``loss`` is the newest one known."""
        ...

    def close(self) -> None:
        """The run is over; give the terminal back."""
        ...


class SilentScreen:
    """For every process but the first."""

    def say(self, text: str) -> None:
        """Nothing."""

    def begin(self, epoch: int, batches: int) -> None:
        """Nothing."""

    def advance(self, loss: float) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainScreen(SilentScreen):
    """Lines, for files and pipes."""

    def say(self, text: str) -> None:
        print(text, flush=True)


class TerminalScreen:
    """A bar for the running epoch and the whole run, with the lines above it."""

    def __init__(self, epochs: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        self.epochs = epochs
        self.bar = None
        self.progress.start()

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def begin(self, epoch: int, batches: int) -> None:
        if self.bar is not None:
            self.progress.remove_task(self.bar)
        self.bar = self.progress.add_task(f"epoch {epoch + 1}/{self.epochs}", total=batches, loss=float("nan"))

    def advance(self, loss: float) -> None:
        self.progress.update(self.bar, advance=1, loss=loss)

    def close(self) -> None:
        if self.bar is not None:
            self.progress.remove_task(self.bar)
        self.progress.stop()


def open_screen(is_primary: bool, epochs: int) -> Screen:
    """Bars on a terminal, plain lines elsewhere, nothing in other processes."""
    if not is_primary:
        return SilentScreen()
    return TerminalScreen(epochs) if sys.stdout.isatty() else PlainScreen()
