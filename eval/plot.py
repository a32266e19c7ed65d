"""``vicinal plot``: the curves of one run or of several, in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..checkpoints import write_atomically
from ..train.errors import UserError
from ..train.log import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.98
_PANELS = {
    "train_loss": "training loss",
    "val_loss": "held-out loss",
    "val_top1": "held-out top-1, %",
    "lr": "learning rate",
}


@dataclass(frozen=True)
class PlotArguments:
    """Draw loss, held-out loss and accuracy, and learning rate of runs over their epochs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs."""
    output: str = "plot.png"
    """The picture."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal plot``; prints a line for each run and where the picture lies."""
    arguments = tyro.cli(PlotArguments, prog="vicinal plot", args=list(argv))
    if not arguments.runs:
        raise UserError("vicinal plot: give the folders of one or more runs")
    runs = {name: read_run(Path(path)) for name, path in zip(labels(arguments.runs), arguments.runs, strict=True)}
    picture = draw_curves(runs, Path(arguments.output))
    for name, records in runs.items():
        print(summarize(name, records))
    print(f"picture: {picture}")
    return 0


def labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"vicinal plot: the same run is given twice: {', '.join(paths)}")


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The records of updates and epochs of a run.

    Raises:
        UserError: there are none.
    """
    records = [record for record in read_records(folder / "metrics.jsonl") if record["event"] in ("step", "epoch")]
    if not records:
        raise UserError(f"{folder}: no records of a run: metrics.jsonl is missing or empty")
    return records


def summarize(name: str, records: Sequence[dict[str, Any]]) -> str:
    """One line about a run."""
    epochs = [record for record in records if record["event"] == "epoch"]
    if not epochs:
        return f"{name}: update {records[-1]['step']}, training loss {records[-1]['train_loss']:.4f}"
    best = max(epochs, key=lambda record: record["val_top1"])
    return f"{name}: {len(epochs)} epochs, best held-out top-1 {best['val_top1']:.2f} % in epoch {best['epoch']}"


def points(records: Sequence[dict[str, Any]], field: str) -> tuple[list[float], list[float]]:
    """Epochs (fractions, for updates) and values of a field: of the updates where they have it, else of the epochs."""
    steps = [record for record in records if record["event"] == "step" and field in record]
    epochs = [record for record in records if record["event"] == "epoch"]
    if not steps:
        return [record["epoch"] for record in epochs], [record[field] for record in epochs]
    # The first finished epoch says how many updates one has; before that the update itself is the axis.
    per_epoch = epochs[0]["step"] / epochs[0]["epoch"] if epochs else 1
    return [record["step"] / per_epoch for record in steps], [record[field] for record in steps]


def smooth(values: Sequence[float], factor: float) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = factor * average + (1 - factor) * value, factor * weight + (1 - factor)
        result.append(average / weight)
    return result


def draw_curves(runs: dict[str, Sequence[dict[str, Any]]], path: Path) -> Path:
    """Draw the picture, one colour for each run."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'vicinal[demo]'") from error
    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, (field, title) in zip(panels.flat, _PANELS.items(), strict=True):
        for number, (name, records) in enumerate(runs.items()):
            _draw_curve(axes, *points(records, field), f"C{number}", name)
        axes.set(title=title, xlabel="epoch")
        axes.grid(color="#e6e9ed", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw_curve(axes: "Axes", epochs: list[float], values: list[float], color: str, name: str) -> None:
    is_noisy = len(values) > 100 and axes.get_subplotspec().num1 == 0
    if is_noisy:
        axes.plot(epochs, values, color=color, alpha=0.2, linewidth=0.8)
    shown = smooth(values, SMOOTHING) if is_noisy else values
    axes.plot(epochs, shown, color=color, label=name, marker="." if len(values) < 20 else None)
