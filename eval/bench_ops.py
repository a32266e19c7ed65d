"""``vicinal bench ops``: CPU time and memory of the attention operators, beside what one would write without them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import backend, neighborhood_attention, window_attention
from .measure import least_cpu_times, peak_bytes, report, tracked

KERNEL_SIZE = 7
DTYPES = ("float32", "bfloat16")

# (batch, height, width, heads, head_dim): the stages of NAT-Mini and Swin-T at 224 pixels, and one large map.
SHAPES = {
    "neighborhood_attention": {
        "full": [(8, 56, 56, 2, 32), (8, 28, 28, 4, 32), (8, 14, 14, 8, 32), (8, 7, 7, 16, 32), (1, 112, 112, 2, 32)],
        "small": [(2, 14, 14, 2, 16), (1, 28, 28, 2, 16)],
    },
    "window_attention": {
        "full": [(8, 56, 56, 3, 32), (8, 28, 28, 6, 32), (8, 14, 14, 12, 32), (1, 112, 112, 3, 32)],
        "small": [(2, 14, 14, 2, 16), (1, 28, 28, 2, 16)],
    },
}


@dataclass(frozen=True)
class BenchOptions:
    """Measure the operators on the CPU: least process CPU time, and peak memory of the tensors that a call makes."""

    op: Literal["all", "neighborhood_attention", "window_attention"] = "all"
    """Operator to measure; both have a 7x7 window and a relative position bias."""
    dtype: Literal["all", "float32", "bfloat16"] = "all"
    """Of query, key and value."""
    repeats: int = 7
    """Runs of which the fastest counts."""
    shapes: Literal["small", "full"] = "full"
    """full: the stages of a backbone at 224 pixels; small: a few seconds."""
    csv: Path | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    shape: str
    dtype: str
    step: str
    implementation: str
    cpu_ms: float
    ratio_to_tiled: float
    peak_mib: float


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal bench ops``; returns its exit code."""
    import tyro

    options = tyro.cli(BenchOptions, prog="vicinal bench ops", args=argv)
    report(measure(options), options.csv)
    return 0


def measure(options: BenchOptions) -> list[Row]:
    """The rows of the table."""
    operators = SHAPES if options.op == "all" else [options.op]
    dtypes = DTYPES if options.dtype == "all" else [options.dtype]
    cases = [(op, shape, dtype) for op in operators for shape in SHAPES[op][options.shapes] for dtype in dtypes]
    return [row for case in tracked(cases) for row in _measure_case(*case, options.repeats)]


def _measure_case(op: str, shape: tuple[int, ...], dtype: str, repeats: int) -> Iterator[Row]:
    inputs = _inputs(shape, getattr(torch, dtype))
    implementations = IMPLEMENTATIONS[op]
    for step, run in (("forward", _forward), ("forward+backward", _forward_backward)):
        calls = {name: partial(run, function, *inputs) for name, function in implementations.items()}
        times = least_cpu_times(calls, repeats)
        for name, call in calls.items():
            ratio = times[name] / times["tiled"]
            yield Row(
                op, "x".join(map(str, shape)), dtype, step, name, times[name] * 1e3, ratio, peak_bytes(call) / 2**20
            )


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A packed projection (batch, height, width, 3, heads, head_dim), a bias table, and an output gradient."""
    batch, height, width, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, height, width, 3, heads, head_dim, generator=generator).to(dtype).requires_grad_()
    side = 2 * KERNEL_SIZE - 1
    table = torch.randn(heads, side, side, generator=generator).requires_grad_()
    return packed, table, torch.randn(shape, generator=generator).to(dtype)


def _forward(function: Callable[[Tensor, Tensor], Tensor], packed: Tensor, table: Tensor, grad_output: Tensor) -> None:
    with torch.no_grad():
        function(packed, table)


def _forward_backward(
    function: Callable[[Tensor, Tensor], Tensor], packed: Tensor, table: Tensor, grad_output: Tensor
) -> None:
    torch.autograd.grad(function(packed, table), (packed, table), grad_output)


def _our_neighborhood(name: str, packed: Tensor, table: Tensor) -> Tensor:
    with backend(name):
        return neighborhood_attention(*packed.unbind(3), KERNEL_SIZE, relative_position_bias=table)


def _our_window(name: str, packed: Tensor, table: Tensor) -> Tensor:
    with backend(name):
        return window_attention(*packed.unbind(3), KERNEL_SIZE, shift=KERNEL_SIZE // 2, relative_position_bias=table)


def gather_neighborhoods(packed: Tensor, table: Tensor) -> Tensor:
    """Neighborhood attention as a few lines of PyTorch: copy the 49 keys and values of every query, then attend."""
    batch, height, width, _, heads, head_dim = packed.shape
    index, offset = _neighborhood_index(height, width)
    query, key, value = packed.flatten(1, 2).unbind(2)  # (batch, tokens, heads, head_dim)
    keys, values = (tensor[:, index] for tensor in (key, value))  # (batch, tokens, 49, heads, head_dim)
    scores = torch.einsum("bnhd,bnkhd->bnhk", query * head_dim**-0.5, keys)
    weights = (scores + table.flatten(1)[:, offset].transpose(0, 1)).softmax(-1).to(value.dtype)
    return torch.einsum("bnhk,bnkhd->bnhd", weights, values).reshape(batch, height, width, heads, head_dim)


@lru_cache(maxsize=16)
def _neighborhood_index(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat positions of the keys of each query, and their entries of the flattened bias table, (tokens, 49)."""
    rows, columns = _axis_index(height), _axis_index(width)
    index = rows[:, None, :, None] * width + columns[None, :, None, :]
    down = rows - torch.arange(height)[:, None] + KERNEL_SIZE - 1
    across = columns - torch.arange(width)[:, None] + KERNEL_SIZE - 1
    offset = down[:, None, :, None] * (2 * KERNEL_SIZE - 1) + across[None, :, None, :]
    return tuple(part.reshape(height * width, KERNEL_SIZE**2) for part in (index, offset))


def _axis_index(size: int) -> Tensor:
    start = (torch.arange(size) - KERNEL_SIZE // 2).clamp(0, size - KERNEL_SIZE)
    return start[:, None] + torch.arange(KERNEL_SIZE)


def partition_windows(packed: Tensor, table: Tensor) -> Tensor:
    """Shifted window attention as Swin implementations write it: roll, partition, SDPA with a mask, and back."""
    batch, height, width, _, heads, head_dim = packed.shape
    size, shifts = KERNEL_SIZE, _shifts(height, width)
    offset, mask = _window_index(height, width)
    rolled = packed.roll([-shift for shift in shifts], (1, 2)).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    windows = rolled.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, size * size, head_dim)
    bias = (table.flatten(1)[:, offset] + mask).to(packed.dtype).repeat(batch, 1, 1, 1)
    output = F.scaled_dot_product_attention(*windows, attn_mask=bias)
    output = output.view(batch, height // size, width // size, heads, size, size, head_dim)
    output = output.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads, head_dim)
    return output.roll(shifts, (1, 2))


def _shifts(height: int, width: int) -> tuple[int, int]:
    return tuple(KERNEL_SIZE // 2 if size > KERNEL_SIZE else 0 for size in (height, width))


@lru_cache(maxsize=16)
def _window_index(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Entries of the flattened bias table, (49, 49), and the mask of the shifted map, (windows, 1, 49, 49)."""
    size, (down, right) = KERNEL_SIZE, _shifts(height, width)
    position = torch.arange(size)
    distance = position[None, :] - position[:, None] + size - 1
    offset = distance[:, None, :, None] * (2 * size - 1) + distance[None, :, None, :]
    labels = torch.zeros(height, width)
    labels[height - down :] += 2
    labels[:, width - right :] += 1
    windows = labels.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).reshape(-1, 1, size * size)
    torn = windows.transpose(1, 2) != windows
    mask = torch.zeros(torn.shape).masked_fill(torn, float("-inf"))
    return offset.reshape(size * size, size * size), mask[:, None]


IMPLEMENTATIONS = {
    "neighborhood_attention": {
        "tiled": partial(_our_neighborhood, "tiled"),
        "reference": partial(_our_neighborhood, "reference"),
        "gather": gather_neighborhoods,
    },
    "window_attention": {
        "tiled": partial(_our_window, "tiled"),
        "reference": partial(_our_window, "reference"),
        "partition+sdpa": partition_windows,
    },
}
