"""Window attention in Triton: windows are read from the map and written back in place, without a partition.

A program serves one head. Windows that fit into one block of tokens are attended to whole: small ones share a block,
several blocks share a program, and the backward recomputes the softmax and reads each tensor once. Larger windows go
through an online softmax over blocks of keys, and their gradients are summed by the tokens that own them.

The gradient of the bias table is summed over windows in registers, then over programs and offsets in a fixed order.
"""

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ..checks import per_axis
from ..launch import Parameters
from ..triton_common import Call, ceil_div, next_power_of_two, refuse_tensors
from .fused_kernels import (
    backward_bias_kernel,
    backward_key_kernel,
    backward_query_kernel,
    forward_kernel,
    sum_by_offset_kernel,
)
from .fused_kernels_geometry import Plan
from .fused_kernels_whole import backward_whole_kernel, bias_kernel, forward_whole_kernel

PROGRAMS = {"forward_whole": 4096, "backward_whole": 1024, "backward_bias": 1024}
"""PROGRAMS[kernel] is the number of programs that windows are dealt out to: enough to fill a large GPU of 132
multiprocessors several times, and few enough that a program reads the bias once for many windows. A program of the
backward also writes the sum of its gradients of the bias, so that there are fewer.
"""


class _Windows(NamedTuple):
    """The arguments of all kernels of windows; WIDTH: slots of a row of a window, a power of two."""

    table: Optional[Tensor]
    plan: Plan
    SHIFTED: bool
    PER_HEAD: bool
    WINDOW: tuple[int, int]
    WIDTH: int


class _Whole(NamedTuple):
    """The arguments of kernels for windows that fit into one block; PACK: windows of a block."""

    blocks_per_program: int
    tiles: Tensor
    PACK: int


class _Call(Call):
    """The windows of one call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: Sequence[int],
        partition: str,
        shift: Sequence[int],
        relative_position_bias: Optional[Tensor],
        scale: Optional[float],
    ) -> None:
        super().__init__("window", query, key, value, scale)
        self.window = per_axis("window_size", window_size, 2)
        self.tokens_per_window = self.window[0] * self.window[1]
        width = next_power_of_two(self.window[1])  # which makes divisions shifts
        self.slots = self.window[0] * width
        counts = tuple(size // extent for size, extent in zip(self.size, self.window, strict=True))
        self.windows = self.batch * counts[0] * counts[1]
        step, spacing = ((1, 1), counts) if partition == "grid" else (self.window, (1, 1))
        shifts = zip(per_axis("shift", shift, 2), counts, strict=True)
        shifts = tuple(offset if count > 1 else 0 for offset, count in shifts)
        self.shared = _Windows(
            table=None if relative_position_bias is None else relative_position_bias.contiguous(),
            plan=Plan(self.batch, counts, self.size, step, spacing, shifts),
            SHIFTED=any(shifts),
            PER_HEAD=relative_position_bias is not None,
            WINDOW=self.window,
            WIDTH=width,
        )

    def whole(self, name: str) -> Optional[tuple[int, Parameters, _Whole]]:
        """Programs, parameters and arguments of the kernel for windows that fit into one block, None if they do not."""
        parameters = self.parameters(name)
        if self.tokens_per_window > parameters.block:
            return None
        pack = 1 if self.shared.SHIFTED else parameters.block // self.tokens_per_window
        block = max(16, next_power_of_two(pack * self.tokens_per_window))
        blocks_per_program = max(1, ceil_div(self.windows, pack) * self.heads // PROGRAMS[name])
        programs = sum(ceil_div(self.batch * count, pack * blocks_per_program) for count in self.alike()) * self.heads
        whole = _Whole(blocks_per_program, self.bias_tiles(block, pack), pack)
        return programs, parameters._replace(block=block), whole

    def alike(self) -> list[int]:
        """Windows of an image that the shift tears in no way, along columns, along rows, and both."""
        (rows, torn_rows), (columns, torn_columns) = (
            (count - (shift > 0), int(shift > 0))
            for count, shift in zip(self.shared.plan.counts, self.shared.plan.shift, strict=True)
        )
        return [rows * columns, rows * torn_columns, torn_rows * columns, torn_rows * torn_columns]

    def bias_tiles(self, block: int, pack: int) -> Tensor:
        """What is added to the scores of a block of windows, made once for all of them."""
        shape = (self.heads if self.shared.PER_HEAD else 1, 4 if self.shared.SHIFTED else 1, block, block)
        tiles = self.query.new_empty(shape, dtype=torch.float32)
        self.submit(bias_kernel, shape[0] * shape[1], Parameters(block, 4, 1), self.shared, tiles=tiles, PACK=pack)
        return tiles

    def parts(self, parameters: Parameters) -> int:
        """Programs for all parts of all windows."""
        return self.windows * self.heads * ceil_div(self.slots, parameters.block)


def refuse(query: Tensor, key: Tensor, value: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors("window", query, value)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    outputs = call.start_forward()
    whole = call.whole("forward_whole")
    if whole:
        call.submit(forward_whole_kernel, *whole, call.shared)
    else:
        parameters = call.parameters("forward")
        call.submit(forward_kernel, call.parts(parameters), parameters, call.shared)
    return outputs


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    *arguments,
    into: Optional[Sequence[Tensor]] = None,
) -> list[Tensor]:
    """Gradients of query, key, value and the bias table, those that are needed; the first three `into` tensors."""
    call = _Call(*arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient, into)
    whole = call.whole("backward_whole")
    grad_table = _backward_whole(call, *whole, needs_gradient) if whole else _backward_parts(call, needs_gradient)
    return [gradient for gradient in (*gradients, grad_table) if gradient is not None]


def _backward_whole(
    call: _Call, programs: int, parameters: Parameters, whole: _Whole, needs_gradient: Sequence[bool]
) -> Optional[Tensor]:
    """Fills the gradients; returns that of the table, if it is needed."""
    shape = (programs // call.heads, call.heads, parameters.block, parameters.block)
    partial = call.query.new_empty(shape, dtype=torch.float32) if needs_gradient[3] else None
    call.submit(backward_whole_kernel, programs, parameters, whole, call.shared, partial=partial)
    return None if partial is None else _sum_by_offset(call, partial.sum(0), call.window[1], whole.PACK)


def _backward_parts(call: _Call, needs_gradient: Sequence[bool]) -> Optional[Tensor]:
    """As :func:`_backward_whole`, for windows of several blocks."""
    _, needs_key, needs_value, needs_bias = needs_gradient
    kernels = {"backward_query": backward_query_kernel}
    if needs_key or needs_value:
        kernels["backward_key"] = backward_key_kernel
    for name, kernel in kernels.items():
        parameters = call.parameters(name)
        call.submit(kernel, call.parts(parameters), parameters, call.shared)
    return _backward_bias(call) if needs_bias else None


def _backward_bias(call: _Call) -> Tensor:
    parameters = call.parameters("backward_bias")
    parts = ceil_div(call.slots, parameters.block)
    windows_per_program = max(1, call.windows * call.heads * parts**2 // PROGRAMS["backward_bias"])
    chunks = ceil_div(call.windows, windows_per_program)
    shape = (chunks, call.heads, parts * parameters.block, parts * parameters.block)
    partial = call.query.new_empty(shape, dtype=torch.float32)
    programs = chunks * parts**2 * call.heads
    call.submit(
        backward_bias_kernel,
        programs,
        parameters,
        call.shared,
        partial=partial,
        windows_per_program=windows_per_program,
    )
    return _sum_by_offset(call, partial.sum(0), call.shared.WIDTH, 1)


def _sum_by_offset(call: _Call, grad_scores: Tensor, width: int, pack: int) -> Tensor:
    """Gradient of the table from that of the scores of all pairs of slots of a block, (heads, slots, slots)."""
    grad_table = call.query.new_empty(call.shared.table.shape, dtype=torch.float32)
    extent = grad_scores.shape[-1]
    parameters = Parameters(next_power_of_two(extent), 1, 1)
    call.submit(
        sum_by_offset_kernel,
        grad_table.numel(),
        parameters,
        call.shared,
        grad_scores=grad_scores,
        grad_table=grad_table,
        WIDTH=width,
        PACK=pack,
        EXTENT=extent,
    )
    return grad_table
