"""Records of a run: on the disk always, and to TensorBoard and Weights & Biases where asked for."""

import csv
import io
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ...checkpoints import write_atomically
from ...errors import RunStopped, UserError

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


class Sink(Protocol):
    """Another place that records go to."""

    def add(self, record: dict[str, Any]) -> None:
        """Take one record; ``step`` is its place on the axis of time."""
        ...

    def close(self) -> None:
        """Send what is held back."""
        ...


class TensorBoardSink:
    """Numbers of the records as scalars ``EVENT/NAME``; on resume, what lay after the checkpoint is left out."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs tensorboard: pip install 'vicinal[log]'") from error
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """Records in a project of Weights & Biases; a resumed run goes on in the same one."""

    def __init__(self, project: str, folder: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs wandb: pip install 'vicinal[log]'") from error
        note = folder / "wandb_id.txt"
        if not note.is_file():
            write_atomically(note, lambda temporary: Path(temporary).write_text(uuid.uuid4().hex))
        self.run = wandb.init(
            project=project, id=note.read_text(), name=folder.name, dir=str(folder), config=config, resume="allow"
        )

    def add(self, record: dict[str, Any]) -> None:
        self.run.log({f"{record['event']}/{name}": value for name, value in _numbers(record).items()}, record["step"])

    def close(self) -> None:
        self.run.finish()


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, (int, float))}


class MetricsLog:
    """Records of a run: every one as a line of ``metrics.jsonl``, those of epochs also as a row of ``metrics.csv``.

    Epochs count from 1.

    Args:
        jsonl, table: the two files.
        records: what the run said before it was resumed; replaces the files' content, so that what came after the
            checkpoint does not appear twice.
        sinks: other places to send new records to.
    """

    def __init__(self, jsonl: Path, table: Path, records: list[dict[str, Any]], sinks: Sequence[Sink] = ()):
        self.jsonl, self.table, self.sinks = jsonl, table, sinks
        self.epochs = [record for record in records if record["event"] == "epoch"]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(jsonl, lambda temporary: Path(temporary).write_text(lines, encoding="utf-8"))
        self._write_table()

    def add(self, event: str, **values: Any) -> dict[str, Any]:
        """Append one record of an event: ``step``, ``epoch``, ``skipped`` or ``unreadable``.

        Raises:
            RunStopped: it cannot be written.
        """
        record = {"event": event, **values}
        try:
            with self.jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if event == "epoch":
                self.epochs.append(record)
                self._write_table()
        except OSError as error:
            raise RunStopped(f"cannot write {self.jsonl}: {error.strerror}; the last checkpoint is intact") from error
        for sink in self.sinks:
            sink.add(record)
        return record

    def close(self) -> None:
        """Let the sinks send what they hold back."""
        for sink in self.sinks:
            sink.close()

    def _write_table(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, EPOCH_FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        write_atomically(self.table, lambda temporary: Path(temporary).write_text(text.getvalue(), encoding="utf-8"))


def read_records(path: Path, last_epoch: int | None = None, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, up to a finished epoch and an update if they are given.

    Lines that are no records are left out, such as a last one that a kill cut short: :func:`count_odd_lines`.
    """
    return [
        record
        for record in filter(None, map(_parse_record, _read_lines(path)))
        if (last_step is None or record["step"] <= last_step)
        and (last_epoch is None or record["event"] != "epoch" or record["epoch"] <= last_epoch)
    ]


def count_odd_lines(path: Path) -> int:
    """Lines of ``metrics.jsonl`` that are no records; a torn last one is not counted."""
    # What follows the last end of a line is empty, or torn.
    return sum(_parse_record(line) is None for line in _read_lines(path)[:-1])


def _read_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n") if path.is_file() else []


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("event"), str)
    numbers = (record.get(name) for name in ("step", "epoch")) if is_record else (None,)
    return record if all(isinstance(number, int) for number in numbers) else None
