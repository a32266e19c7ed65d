"""``vicinal bench models``: CPU time and memory of whole models, beside timm's model of the same architecture."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

from .. import zoo  # noqa: F401  registers our models with timm
from ..kernels import backend
from ..train.errors import UserError, nearest
from .measure import least_cpu_times, peak_bytes, report, tracked

# Ours and timm's of the same architecture, at a size that both take.
COUNTERPARTS = {
    "davit_tiny_vicinal": "davit_tiny",
    "maxvit_tiny": "maxvit_tiny_tf_224",
    "convit_tiny_vicinal": "convit_tiny",
    "shvit_s1_vicinal": "shvit_s1",
    "halonet26t_vicinal": "halonet26t",
}
STEPS = ("inference", "training")


@dataclass(frozen=True)
class BenchOptions:
    """Measure models on the CPU in float32: least process CPU time, and peak memory of the tensors of a step."""

    models: tuple[str, ...] = ()
    """Names of our models; if none is given, all that timm has too."""
    batch_size: int = 8
    """Images of a step."""
    img_size: int | None = None
    """Height and width of the images; each model's own if not given."""
    repeats: int = 3
    """Runs of which the fastest counts."""
    csv: Path | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in self.models:
            if not timm.is_model(name):
                raise UserError(f"--models {name}: no such model; {nearest(name, timm.list_models())}")


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios are to ours with its fastest kernels."""

    model: str
    image: str
    step: str
    implementation: str
    cpu_ms: float
    ratio_to_ours: float
    peak_mib: float


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal bench models``; returns its exit code."""
    import tyro

    options = tyro.cli(BenchOptions, prog="vicinal bench models", args=argv)
    names = options.models or [name for name in COUNTERPARTS if timm.is_model(name)]
    report([row for name in tracked(names) for row in _measure_model(name, options)], options.csv)
    return 0


def _measure_model(name: str, options: BenchOptions) -> Iterator[Row]:
    ours = timm.create_model(name)
    size = options.img_size or ours.pretrained_cfg["input_size"][-1]
    images = torch.randn(options.batch_size, 3, size, size)
    for step, run in zip(STEPS, (_infer, _train), strict=True):
        calls: dict[str, Callable[[], None]] = {"ours": partial(run, ours, images)}
        calls["ours, reference kernels"] = partial(_with_reference, run, ours, images)
        if name in COUNTERPARTS:
            calls["timm"] = partial(run, timm.create_model(COUNTERPARTS[name]), images)
        times = least_cpu_times(calls, options.repeats)
        for implementation, call in calls.items():
            ratio = times[implementation] / times["ours"]
            memory = peak_bytes(call) / 2**20
            yield Row(
                name,
                f"{options.batch_size}x{size}x{size}",
                step,
                implementation,
                times[implementation] * 1e3,
                ratio,
                memory,
            )


def _infer(model: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model.eval()(images)


def _train(model: nn.Module, images: torch.Tensor) -> None:
    model.train().zero_grad(set_to_none=True)
    model(images).square().mean().backward()


def _with_reference(run: Callable[[nn.Module, torch.Tensor], None], model: nn.Module, images: torch.Tensor) -> None:
    with backend("reference"):
        run(model, images)
