"""``vicinal report``: one picture of a run, with its curves, some predictions and where the network looks."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from ..checkpoints import write_atomically
from ..command import parse_options
from ..errors import UserError, require_packages
from ..outputs import check_output_file
from ..train.config import TrainConfig
from ..train.data.decode import UnreadableImage
from ..train.data.images import Images, open_images
from ..train.data.transforms import InputSpec, Preprocess, eval_transform
from ..train.network.check import check_forward
from ..train.recipe import read_recipe
from ..train.run.log import read_records
from .attend import AttentionRecord, record_attention
from .classify import find_model, load_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

NUM_EXAMPLES = 10
NUM_MISTAKES = 2
MIN_MAP = 4  # positions per axis; a coarser map shows nothing
_TRAIN, _VAL, _GOOD, _BAD, _INK = "#9aa5b1", "#1f5fa8", "#2a7d4f", "#c0392b", "#2d3540"


@dataclass(frozen=True)
class ReportArguments:
    """Draw report.png into the folder of a run: curves, predictions, attention maps."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""


@dataclass(frozen=True)
class Example:
    """A val image and what the network says to it."""

    pixels: np.ndarray
    """uint8, (H, W, 3), as prepared for the network."""
    target: str
    prediction: str
    probability: float
    attention: list[np.ndarray]
    """Attention received (h, w), one map per resolution of the network, finest first."""

    @property
    def is_right(self) -> bool:
        return self.prediction == self.target


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal report``; prints where the picture lies."""
    arguments = parse_options(ReportArguments, "vicinal report", argv)
    print(f"picture: {draw_report(arguments.run)}")
    return 0


def draw_report(run: str | Path) -> Path:
    """Draw ``report.png`` of a run from its records and its best model.

    Raises:
        UserError: not the folder of a run that has finished an epoch, or matplotlib is missing.
    """
    require_packages({"the report": "matplotlib"})
    from matplotlib.figure import Figure

    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not the folder of a run: it holds no config.yaml")
    check_output_file("report", run / "report.png")
    config = TrainConfig(**read_recipe(run / "config.yaml"))
    epochs = [record for record in read_records(run / "metrics.jsonl") if record["event"] == "epoch"]
    if not epochs:
        raise UserError(f"{run}: no epoch is finished yet")
    examples = choose_examples(load_model(find_model(str(run))[0]), config)
    figure = Figure(figsize=(13, 7.6), dpi=130, facecolor="white", layout="constrained")
    _draw(figure, config, epochs, examples)
    return write_atomically(run / "report.png", lambda temporary: figure.savefig(temporary, format="png"))


def choose_examples(model: nn.Module, config: TrainConfig) -> list[Example]:
    """A few val images: some that the network gets wrong, if there are any, and for the rest one of each class."""
    _, images = open_images(config.data)
    spec = InputSpec.resolve(config.data, model.pretrained_cfg)
    check_forward(model, spec, model.num_classes)
    candidates = _round_robin(images.targets)[:500]
    pixels, targets = _load_readable(images, candidates, eval_transform(spec))
    preprocess = Preprocess(spec, torch.device("cpu"), model.num_classes)
    with torch.no_grad():
        logits = torch.cat(
            [model(preprocess(*chunk)[0]) for chunk in zip(pixels.split(50), targets.split(50), strict=True)]
        )
    wrong = (logits.argmax(1) != targets).nonzero().flatten().tolist()[:NUM_MISTAKES]
    right = [index for index in range(len(targets)) if index not in wrong]
    chosen = [*right[: NUM_EXAMPLES - len(wrong)], *wrong]
    with torch.no_grad(), record_attention(model) as records:
        model(preprocess(pixels[chosen], targets[chosen])[0])
    return _describe(pixels[chosen], targets[chosen], logits[chosen], _by_resolution(records), images)


def _load_readable(
    images: Images, candidates: Sequence[int], transform: Callable[[Image.Image], Tensor]
) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, H, W) and targets (N,) of the images that can be read; the others are named."""
    pixels, targets = [], []
    for index in candidates:
        try:
            pixels.append(transform(images.load(index)))
            targets.append(images.targets[index])
        except UnreadableImage as error:
            print(f"note: {error}; it is left out of the report", file=sys.stderr)
    if not pixels:
        raise UserError("none of the val images can be read, so that there is nothing to show")
    return torch.stack(pixels), torch.tensor(targets)


def _round_robin(targets: Sequence[int]) -> list[int]:
    """Indices ordered so that the classes take turns."""
    seen: dict[int, int] = {}
    turns = []
    for index, target in enumerate(targets):
        turns.append((seen.get(target, 0), target, index))
        seen[target] = seen.get(target, 0) + 1
    return [index for _, _, index in sorted(turns)]


def _by_resolution(records: list[AttentionRecord]) -> list[Tensor]:
    """Mean attention received over the modules of each resolution, (B, h, w), finest first."""
    sizes = sorted({record.received.shape[1:] for record in records}, reverse=True)
    maps = [torch.stack([record.received for record in records if record.received.shape[1:] == size]) for size in sizes]
    return [stack.mean(0) for stack in maps if min(stack.shape[2:]) >= MIN_MAP]


def _describe(pixels: Tensor, targets: Tensor, logits: Tensor, maps: list[Tensor], images: Images) -> list[Example]:
    probabilities, predictions = logits.softmax(1).max(1)
    return [
        Example(
            pixels[row].permute(1, 2, 0).numpy(),
            images.classes[targets[row]],
            images.classes[predictions[row]],
            float(probabilities[row]),
            [attention[row].numpy() for attention in maps],
        )
        for row in range(len(pixels))
    ]


def _draw(figure: "Figure", config: TrainConfig, epochs: list[dict[str, Any]], examples: list[Example]) -> None:
    best = max(epochs, key=lambda record: record["val_top1"])
    rows = 1 + len(examples[0].attention)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6, 1.5 * rows])
    seconds = sum(record["seconds"] for record in epochs)
    title = f"{config.model.name} on {config.data.name}"
    result = f"{best['val_top1']:.2f} % of {best['val_images']} val images after {seconds:.0f} s of training"
    figure.suptitle(f"{title}: {result}\n", fontsize=15, fontweight="bold", color=_INK)
    _draw_curves(top, epochs, best)
    _draw_examples(bottom, examples, rows)


def _draw_curves(figure: "SubFigure", epochs: list[dict[str, Any]], best: dict[str, Any]) -> None:
    loss, accuracy = figure.subplots(1, 2)
    numbers = [record["epoch"] for record in epochs]
    loss.plot(
        numbers, [record["train_loss"] for record in epochs], color=_TRAIN, label="training (augmented, smoothed)"
    )
    loss.plot(numbers, [record["val_loss"] for record in epochs], color=_VAL, label="val")
    loss.set_title("cross-entropy loss")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    top1 = [record["val_top1"] for record in epochs]
    accuracy.plot(numbers, top1, color=_VAL)
    accuracy.plot(best["epoch"], best["val_top1"], "o", color=_VAL)
    accuracy.annotate(
        f"best {best['val_top1']:.2f} %, epoch {best['epoch']}",
        (best["epoch"], best["val_top1"]),
        xytext=(0, -44),
        textcoords="offset points",
        ha="right" if best["epoch"] > numbers[-1] / 2 else "left",
        color=_VAL,
    )
    accuracy.set_title("val top-1 accuracy, %")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e9ed", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_examples(figure: "SubFigure", examples: list[Example], rows: int) -> None:
    grid = figure.subplots(rows, len(examples), squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for column, example in enumerate(examples):
        color = _GOOD if example.is_right else _BAD
        wrong = "" if example.is_right else f"\ntrue: {example.target}"
        grid[0, column].imshow(example.pixels)
        grid[0, column].set_title(f"{example.prediction}  {example.probability:.0%}{wrong}", color=color, fontsize=11)
        for row, attention in enumerate(example.attention, start=1):
            heat = _draw_attention(grid[row, column], example.pixels, attention)
    grid[0, 0].set_ylabel("image and\nprediction", color=_INK)
    for row, attention in enumerate(examples[0].attention, start=1):
        height, width = attention.shape
        grid[row, 0].set_ylabel(f"attention on\n{height}x{width} tokens", color=_INK)
    if rows > 1:
        bar = figure.colorbar(heat, ax=grid[1:, :], fraction=0.02, pad=0.01)
        bar.set_label("attention received\n(1 = uniform weights)", color=_INK)
        bar.outline.set_visible(False)


def _draw_attention(axes: Any, pixels: np.ndarray, attention: np.ndarray) -> Any:
    """The map over the image, smoothed to the image's size."""
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    heat = axes.imshow(attention, cmap="magma", vmin=0, vmax=2, extent=extent, interpolation="bicubic")
    grey = pixels.mean(2)
    if np.ptp(grey) > 0:
        outline = (grey.min() + grey.max()) / 2
        axes.contour(grey, levels=[outline], colors="white", linewidths=0.9, extent=(0, width, 0, height))
    return heat
