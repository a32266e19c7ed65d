"""``vicinal plot``: the curves of one run or of several, in one picture."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..checkpoints import write_atomically
from ..command import parse_options
from ..errors import UserError, first_line, require_packages
from ..outputs import check_output_file
from ..train.run.log import count_odd_lines, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.98
MANY_POINTS = 100
"""A training loss of more updates than this is noise to the eye, and is drawn smoothed."""
FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps")
_PANELS = {
    "train_loss": "training loss",
    "val_loss": "val loss",
    "val_top1": "val top-1, %",
    "lr": "learning rate",
}


@dataclass(frozen=True)
class PlotArguments:
    """Draw loss, val loss and accuracy, and learning rate of runs over their epochs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs."""
    output: str = "plot.png"
    """The picture; its suffix chooses the format, such as .png, .svg or .pdf."""


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal plot``; prints a line for each run and where the picture lies."""
    arguments = parse_options(PlotArguments, "vicinal plot", argv)
    if not arguments.runs:
        raise UserError("vicinal plot: give the folders of one or more runs")
    check_output_file("--output", arguments.output, FORMATS)
    runs = {name: read_run(Path(path)) for name, path in zip(labels(arguments.runs), arguments.runs, strict=True)}
    picture = draw_curves(runs, Path(arguments.output))
    for name, records in runs.items():
        print(summarize(name, records))
    print(f"picture: {picture}")
    return 0


def labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart.

    Raises:
        UserError: no paths, or one that is there twice.
    """
    if not paths:
        raise UserError("paths is empty: give the folders of one or more runs")
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"vicinal plot: the same run is given twice: {', '.join(paths)}")


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The records of updates and epochs of a run.

    Raises:
        UserError: there are none, or the file is not one of records.
    """
    try:
        found = read_records(Path(folder) / "metrics.jsonl")
        records = [record for record in found if record["event"] in ("step", "epoch")]
        for record in records:
            _check_record(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: metrics.jsonl is not that of a run: {first_line(error)}") from error
    odd = count_odd_lines(Path(folder) / "metrics.jsonl")
    if not records:
        why = f"its {odd} lines are no records" if odd else "it is missing or empty"
        raise UserError(f"{folder}: metrics.jsonl is not that of a run: {why}")
    if odd:
        print(f"note: {folder}: {odd} lines of metrics.jsonl are no records and are left out", file=sys.stderr)
    return records


def _check_record(record: dict[str, Any]) -> None:
    """Raise a KeyError or a TypeError for what no run writes."""
    for field in ("step", "epoch", "train_loss", "lr", *(["val_loss", "val_top1"] * (record["event"] == "epoch"))):
        float(record[field])


def summarize(name: str, records: Sequence[dict[str, Any]]) -> str:
    """One line about a run."""
    epochs = [record for record in records if record["event"] == "epoch"]
    if not epochs:
        return f"{name}: update {records[-1]['step']}, training loss {records[-1]['train_loss']:.4f}"
    best = max(epochs, key=lambda record: record["val_top1"])
    return f"{name}: {len(epochs)} epochs, best val top-1 {best['val_top1']:.2f} % in epoch {best['epoch']}"


def points(records: Sequence[dict[str, Any]], field: str, by_update: bool = True) -> tuple[list[float], list[float]]:
    """Epochs (fractions, for updates) and values of a field.

    Args:
        by_update: of the updates where they have the field, else of the epochs; False takes those of the epochs alone.
    """
    steps = [record for record in records if record["event"] == "step" and field in record] if by_update else []
    epochs = [record for record in records if record["event"] == "epoch"]
    if not steps:
        return [record["epoch"] for record in epochs], [record[field] for record in epochs]
    # The first finished epoch says how many updates one has; before that the update itself is the axis.
    per_epoch = epochs[0]["step"] / epochs[0]["epoch"] if epochs else 1
    return [record["step"] / per_epoch for record in steps], [record[field] for record in steps]


def smooth(values: Sequence[float], factor: float) -> list[float]:
    """Exponential moving average, corrected for its start.

    Args:
        factor: weight of the past in [0, 1); 0 leaves the values as they are.

    Raises:
        UserError: another factor.
    """
    if not 0 <= factor < 1:
        raise UserError(f"factor={factor} must lie in [0, 1)")
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = factor * average + (1 - factor) * value, factor * weight + (1 - factor)
        result.append(average / weight)
    return result


def draw_curves(runs: dict[str, Sequence[dict[str, Any]]], path: Path) -> Path:
    """Draw the picture, one colour for each run; the path's suffix chooses the format.

    All runs of a panel are drawn alike: by update where each has records of updates, and smoothed if one of them has
    more than :data:`MANY_POINTS`.

    Raises:
        UserError: no runs, a path that cannot be written or whose suffix is not in :data:`FORMATS`, or no matplotlib.
    """
    if not runs:
        raise UserError("runs is empty: give the records of one or more runs")
    check_output_file("--output", path, FORMATS)
    require_packages({"a plot": "matplotlib"})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, (field, title) in zip(panels.flat, _PANELS.items(), strict=True):
        curves = choose_points(runs, field)
        is_noisy = field == "train_loss" and any(len(values) > MANY_POINTS for _, values in curves.values())
        for number, (name, curve) in enumerate(curves.items()):
            _draw_curve(axes, *curve, f"C{number}", name, is_noisy)
        axes.set(title=title, xlabel="epoch")
        axes.grid(color="#e6e9ed", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    suffix = Path(path).suffix.lower().removeprefix(".")
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix))


def choose_points(runs: dict[str, Sequence[dict[str, Any]]], field: str) -> dict[str, tuple[list[float], list[float]]]:
    """The points of each run's curve: of updates, or of epochs if one of the runs has only these."""
    kinds = {name: {record["event"] for record in records if field in record} for name, records in runs.items()}
    by_update = not any(kind == {"epoch"} for kind in kinds.values())
    # A run in its first epoch has updates only.
    return {name: points(runs[name], field, by_update or "epoch" not in kinds[name]) for name in runs}


def _draw_curve(axes: "Axes", epochs: list[float], values: list[float], color: str, name: str, is_noisy: bool) -> None:
    if is_noisy:
        axes.plot(epochs, values, color=color, alpha=0.2, linewidth=0.8)
    shown = smooth(values, SMOOTHING) if is_noisy else values
    axes.plot(epochs, shown, color=color, label=name, marker="." if len(values) < 20 else None)
