"""``vicinal bench models``: time and memory of whole models, or of their attention alone, beside timm's and plain ones.

The plain form of a model computes its attention as the official code does without extensions of its own: neighbours,
halos and routed regions are gathered, and the weights are stored.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor, nn

from ... import zoo  # noqa: F401  registers our models with timm
from ...command import check_fields, parse_options
from ...errors import UserError, first_line, nearest
from ...kernels import backend
from .measure import check_table, peak_bytes, print_table, replayed_seconds, step_times, tracked, write_table
from .official_mixers import official_mixers

# Ours and timm's of the same architecture, at a size that both take.
COUNTERPARTS = {
    "davit_tiny_vicinal": "davit_tiny",
    "maxvit_tiny": "maxvit_tiny_tf_224",
    "convit_tiny_vicinal": "convit_tiny",
    "convit_small_vicinal": "convit_small",
    "shvit_s1_vicinal": "shvit_s1",
    "shvit_s4_vicinal": "shvit_s4",
    "halonet26t_vicinal": "halonet26t",
    "halonet_h1_vicinal": "halonet_h1",
}
STEPS = ("inference", "training")
REPLAYED = ", replayed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BenchOptions:
    """Measure models: least process CPU time, or time on a GPU, and peak memory of the tensors of a step."""

    models: tuple[str, ...] = ()
    """Names of our models; if none is given, all that timm has too."""
    batch_size: int = 8
    """Images of a step."""
    img_size: int | None = None
    """Height and width of the images; each model's own if not given."""
    part: Literal["model", "attention"] = "model"
    """What is measured: the whole model, or only its attention modules, on the maps that reach them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: by autocast."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; on a GPU images and weights are channels-last."""
    compile: bool = False
    """Also measure ours and timm's under torch.compile."""
    graphs: bool = False
    """Also capture each step as a CUDA graph and replay it: its time without that of the host."""
    repeats: int = 3
    """Runs of which the fastest counts."""
    csv: Path | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        check_fields(self, batch_size="[1, inf)", repeats="[1, inf)", img_size="[1, inf)")
        for name in self.models:
            if not timm.is_model(name):
                raise UserError(f"--models {name}: no such model; {nearest(name, timm.list_models())}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
        if self.graphs and self.device != "cuda":
            raise UserError(f"--graphs: a CUDA graph needs --device cuda, not --device {self.device}")


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios are to ours with the backends that it takes by itself."""

    model: str
    image: str
    step: str
    implementation: str
    ms: float
    images_per_second: float
    ratio_to_ours: float
    peak_mib: float


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal bench models``; returns its exit code."""
    options = parse_options(BenchOptions, "vicinal bench models", argv)
    check_table(options.csv)
    rows: list[Row] = []
    for name in tracked(options.models or list(COUNTERPARTS)):
        rows += _measure(name, options)
        write_table(rows, options.csv)  # a run that is cut off keeps what it has
    print_table(rows)
    return 0


class AttentionModules(nn.Module):
    """The attention modules of a network, each on the input that it has for these images."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_outermost(model))
        received: list[Tensor] = []
        hooks = [part.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0])) for part in self.parts]
        with torch.no_grad():
            model.eval()(images)
        for hook in hooks:
            hook.remove()
        self.inputs = nn.ParameterList(received)

    def forward(self, _: Tensor) -> Tensor:
        return torch.stack([part(image).square().mean() for part, image in zip(self.parts, self.inputs, strict=True)])


def _outermost(model: nn.Module) -> list[nn.Module]:
    """Modules that can compute their attention in a plain form, without those inside another one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn") and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    if not found:
        raise UserError("--part attention: this model has no attention modules with a plain form; leave --part out")
    return list(found.values())


def _measure(name: str, options: BenchOptions) -> Iterator[Row]:
    ours = timm.create_model(name)
    size = options.img_size or ours.pretrained_cfg["input_size"][-1]
    images = _place(torch.randn(options.batch_size, 3, size, size), options)
    networks = dict(_networks(name, _place(ours, options), images, options))
    for step in STEPS:
        yield from measure_step(name, step, networks, images, options)


def measure_step(
    name: str, step: str, networks: dict[str, tuple[nn.Module, Callable]], images: Tensor, options: BenchOptions
) -> Iterator[Row]:
    """Rows of one step of networks that each come with the context they run in."""
    calls = {
        label: partial(_run, step, network, images, context, options.dtype)
        for label, (network, context) in networks.items()
    }
    times = step_times(calls, options.repeats, options.device)
    peaks = {label: peak_bytes(call, options.device) / 2**20 for label, call in calls.items()}
    replayed = dict(_replayed(name, calls, options.repeats)) if options.graphs else {}
    for label, seconds in [*times.items(), *replayed.items()]:
        yield Row(
            name,
            "x".join(map(str, (options.batch_size, *images.shape[2:]))),
            step,
            label,
            seconds * 1e3,
            options.batch_size / seconds,
            seconds / times.get("ours", seconds),
            peaks[label.removesuffix(REPLAYED)],
        )


def _replayed(name: str, calls: dict[str, Callable[[], None]], repeats: int) -> Iterator[tuple[str, float]]:
    """Seconds of those calls that can be captured as CUDA graphs, under their names with a suffix."""
    for label, call in calls.items():
        try:
            yield label + REPLAYED, replayed_seconds(call, repeats)
        except RuntimeError as error:
            print(f"{name}, {label}: no CUDA graph: {first_line(error)}", file=sys.stderr)


def _place(thing: nn.Module | Tensor, options: BenchOptions) -> nn.Module | Tensor:
    if options.device == "cpu":
        return thing
    return thing.to(options.device, memory_format=torch.channels_last)


def _networks(
    name: str, ours: nn.Module, images: Tensor, options: BenchOptions
) -> Iterator[tuple[str, tuple[nn.Module, Callable[[], AbstractContextManager]]]]:
    """What is compared: a network, and the context that it runs in."""
    subject = AttentionModules(ours, images) if options.part == "attention" else ours
    yield "ours", (subject, nullcontext)
    if options.device == "cuda":  # where the plain form of a batch of this size fills the memory
        yield "ours, tiled", (subject, partial(backend, "tiled"))
    else:
        yield "ours, plain attention", (subject, partial(plain_attention, subject))
    official = official_mixers(subject.parts, subject.inputs) if options.part == "attention" else None
    if official is not None:
        yield "official mixers", (official, nullcontext)
    theirs = None
    if name in COUNTERPARTS and options.part == "model":
        theirs = _place(timm.create_model(COUNTERPARTS[name]), options)
        yield "timm", (theirs, nullcontext)
    if options.compile:
        yield "ours, compiled", (torch.compile(subject), nullcontext)
        if options.device == "cuda":
            yield "ours, tiled, compiled", (torch.compile(subject), partial(backend, "tiled"))
        if theirs is not None:
            yield "timm, compiled", (torch.compile(theirs), nullcontext)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Have the attention of a model computed in its plain form."""
    parts = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    with ExitStack() as stack:
        stack.enter_context(backend("reference"))
        for part in parts:
            part.fused_attn = False
            stack.callback(setattr, part, "fused_attn", True)
        yield


def _run(
    step: str, model: nn.Module, images: Tensor, context: Callable[[], AbstractContextManager], dtype: str
) -> None:
    training = step == "training"
    model.train(training)
    cast = torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "float32")
    with context(), torch.inference_mode(not training):
        with cast:
            output = model(images)
        if training:
            model.zero_grad(set_to_none=True)
            output.float().square().mean().backward()
