"""``vicinal bench ops``: time and memory of the attention operators, beside what one would write without them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...command import check_fields, parse_options
from ...errors import UserError, nearest
from ...kernels import backend
from ...kernels.dispatch import BACKENDS, OPERATORS
from .measure import Ceilings, check_table, kernel_times, measure_ceilings, peak_bytes, report, tracked
from .ops_cases import EAGER, Problem, make_problem

DTYPES = ("float32", "bfloat16")
STEPS = ("forward", "backward", "forward+backward")
IMPLEMENTATIONS = (*(name for name in BACKENDS if name != "auto"), "eager", "flex")


@dataclass(frozen=True)
class BenchOptions:
    """Measure the operators: process CPU time, or time on a GPU, and peak memory of the tensors that a call makes."""

    op: Literal[("all", *EAGER)] = "all"
    """Operator to measure, with every bias it takes."""
    dtype: Literal["all", "float32", "bfloat16"] = "all"
    """Of query, key and value."""
    repeats: int = 7
    """Runs of which the fastest counts."""
    shapes: Literal["small", "full", "gpu", "gpu-first"] = "full"
    """full: the stages of a backbone at 224 pixels; gpu: these with a batch of 128; gpu-first: only the first of them;
    small: a few seconds."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    bias: bool = True
    """With a bias table for windows and neighborhoods."""
    flex: bool = False
    """Also compile torch's flex_attention, for windows and neighborhoods. Minutes on a CPU, and no backward there."""
    without: tuple[str, ...] = ()
    """Implementations to leave out, such as reference."""
    csv: Path | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        check_fields(self, repeats="[1, inf)")
        for name in self.without:
            if name not in IMPLEMENTATIONS:
                hint = nearest(name, IMPLEMENTATIONS, count=1)
                raise UserError(f"--without {name}: must be one of {', '.join(IMPLEMENTATIONS)}; {hint}".rstrip("; "))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here; use --device cpu")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        floor_fraction: time that the floor takes at the measured ceilings, over the time taken.
    """

    op: str
    bias: bool
    shape: str
    dtype: str
    step: str
    implementation: str
    ms: float
    ratio_to_tiled: float
    peak_mib: float
    floor_mib: float
    floor_gflop: float
    floor_fraction: float


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal bench ops``; returns its exit code."""
    options = parse_options(BenchOptions, "vicinal bench ops", argv)
    check_table(options.csv)
    report(measure(options), options.csv)
    return 0


def measure(options: BenchOptions) -> list[Row]:
    """The rows of the table."""
    operators = EAGER if options.op == "all" else [options.op]
    dtypes = DTYPES if options.dtype == "all" else [options.dtype]
    ceilings = {dtype: measure_ceilings(getattr(torch, dtype), options.device) for dtype in dtypes}
    cases = [(op, shape, dtype) for op in operators for shape in shapes_of(op, options.shapes) for dtype in dtypes]
    return [row for case in tracked(cases) for row in _measure_case(*case, ceilings[case[2]], options)]


def shapes_of(op: str, name: str) -> list[tuple[int, ...]]:
    """Shapes of an operator by the name of their set."""
    shapes = OPERATORS[op].examples.shapes
    return list(shapes["gpu"][:1] if name == "gpu-first" else shapes[name])


def _measure_case(
    op: str, shape: tuple[int, ...], dtype: str, ceilings: Ceilings, options: BenchOptions
) -> Iterator[Row]:
    problem = make_problem(op, shape, getattr(torch, dtype), options.device, options.flex, options.bias)
    for step in STEPS:
        calls = {name: call for name, call in _calls(problem, step) if name not in options.without}
        times = kernel_times(calls, options.repeats, options.device)
        floor_bytes, floor_flops = problem.floor(step)
        floor = max(floor_bytes / ceilings.bytes_per_second, floor_flops / ceilings.flops_per_second)
        for name, call in calls.items():
            yield Row(
                op,
                options.bias,
                "x".join(map(str, shape)),
                dtype,
                step,
                name,
                times[name] * 1e3,
                times[name] / times.get("tiled", times[name]),
                peak_bytes(call, options.device) / 2**20,
                floor_bytes / 2**20,
                floor_flops / 1e9,
                floor / times[name],
            )


def _calls(problem: Problem, step: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What can run here: fused where it does not refuse, flex on the CPU only forward."""
    on_cpu = problem.grad_output.device.type == "cpu"
    for name, function in problem.implementations.items():
        if name == "fused" and not _runs(function, problem.leaves):
            continue
        if name == "flex" and on_cpu and step != "forward":
            continue
        yield name, _call(function, problem, step, name if name in BACKENDS else "auto")


def _runs(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> bool:
    try:
        _forward(function, leaves)
    except ValueError:  # a forced backend that cannot run says so
        return False
    return True


def _call(function: Callable[..., Tensor], problem: Problem, step: str, chosen: str) -> Callable[[], object]:
    """Args: chosen: the backend, which the backward looks up again."""
    if step == "forward":
        return partial(_forward, function, problem.leaves)
    kept = function(*problem.leaves) if step == "backward" else None

    def differentiate() -> None:
        output = function(*problem.leaves) if kept is None else kept
        with backend(chosen):
            torch.autograd.grad(output, problem.leaves, problem.grad_output, retain_graph=kept is not None)

    return differentiate


def _forward(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    function(*(leaf.detach() for leaf in leaves))
