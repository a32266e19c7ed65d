"""Neighborhood attention in Triton: a tile of queries attends to the box of keys around it, read from the map in place.

Maps of one and two axes are maps of three with leading axes of size 1. Places count inside a group of tokens `dilation`
apart, so a program knows no dilation beyond the address of a token. A tile of queries, or of keys, is owned by one
program for one head, which goes through the tokens that it meets box by box: gradients of query, key and value are sums
in a fixed order, and so is that of the bias table. Bias and visibility come from a table of their own
(see fused_kernels_columns.py), with -inf where a query does not see a key, so that programs need no masks.
"""

import math
from typing import Any, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ..launch import Parameters
from ..triton_common import Call, ceil_div, next_power_of_two, refuse_tensors
from .check import neighborhood_options
from .fused_kernels import (
    backward_bias_kernel,
    backward_key_kernel,
    backward_query_kernel,
    forward_kernel,
    gather_bias_kernel,
)
from .fused_kernels_columns import column_table_kernel
from .fused_kernels_geometry import Ends, Geometries, Plan

TILES = {
    1: {64: (1, 1, 64), 32: (1, 1, 32), 16: (1, 1, 16)},
    2: {64: (1, 8, 8), 32: (1, 4, 8), 16: (1, 4, 4)},
    3: {64: (4, 4, 4), 32: (2, 4, 4), 16: (2, 2, 4)},
}
"""TILES[rank of the map][tokens of a block] is the extent of a tile along three axes."""
SCRATCH = 2**27
"""SCRATCH is the number of bytes for sums of score gradients: the gradient of the table takes as many tiles at a time
as fit. A program of 64 queries and 64 keys writes 16 KiB; 128 MiB are 8192 of them, more than any GPU runs at once.
"""
ENTRIES = 16
"""ENTRIES is the number of entries of the table that a program of the last step of its gradient makes: with a block of
64 they are 1024 numbers, 8 for each of 128 threads.
"""
IMAGES = 32
"""IMAGES is the most images that a program of the gradient of the table sums up: from there on the sums that it writes
are few beside the tokens that it reads.
"""
PROGRAMS = 512
"""PROGRAMS is the number of programs below which each sums fewer images: about four on each of 132 multiprocessors."""


def geometries(size: int, dilation: int, kernel: int, stride: int, tile: int) -> tuple[Geometries, int, int]:
    """The geometries of an axis, their PERIOD, and how many there are in all."""
    period = stride // math.gcd(stride, tile)
    tiles = ceil_div(ceil_div(size, dilation), tile)
    ends = []
    for length in (ceil_div(size, dilation), size // dilation):
        lead, tail = ceil_div(kernel + stride, tile), max(0, (length - kernel - stride - tile) // tile + 1)
        ends.append(Ends(lead, tail) if tail >= lead + period else Ends(tiles, tiles))
    counts = [tiles if lead == tiles else lead + period + tiles - tail for lead, tail in ends]
    return Geometries(*ends, counts[0]), period, counts[0] + counts[1] * (size % dilation > 0)


class _Neighborhoods(NamedTuple):
    """The arguments of all kernels that do not depend on tiles; three axes, of which leading ones may be missing."""

    BIASED: bool
    RANK: int
    KERNEL: tuple[int, int, int]
    STRIDE: tuple[int, int, int]
    CAUSAL: tuple[bool, bool, bool]


class _Tiles(NamedTuple):
    """The arguments of kernels whose programs own tiles, of queries or BY_KEY.

    Attributes:
        total, PERIOD: see :func:`geometries`.
        TILE, BOX: extents.
        STEPS, BOXES: the most boxes that a tile meets along the last axis, and along all.
    """

    plan: Plan
    total: int
    TILE: tuple[int, int, int]
    BOX: tuple[int, int, int]
    STEPS: int
    BOXES: int
    PERIOD: int
    BY_KEY: bool

    @property
    def count(self) -> int:
        """Tiles of an image and head."""
        return math.prod(self.plan.dilation) * math.prod(self.plan.tiles)


class _Call(Call):
    """The tiles of one call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        is_causal: Sequence[bool],
        relative_position_bias: Optional[Tensor],
        scale: Optional[float],
    ) -> None:
        super().__init__("neighborhood", query, key, value, scale, axes=3)
        self.rank = query.ndim - 3
        options = neighborhood_options(self.rank, kernel_size, stride, dilation, is_causal)
        self.kernel, self.stride, self.dilation = (self.leading(option, 1) for option in options[:3])
        self.table = None if relative_position_bias is None else relative_position_bias.contiguous()
        causal = self.leading(options[3], False)
        self.shared = _Neighborhoods(self.table is not None, self.rank, self.kernel, self.stride, causal)
        self.column_tables = {}

    def start(self, name: str, kernel: Any, by_key: bool = False) -> None:
        """Start a kernel whose programs own tiles."""
        parameters = self.parameters(name)
        tiles, columns = self.tiles(parameters, by_key)
        self.submit(kernel, self.batch * tiles.count * self.heads, parameters, self.shared, tiles, columns=columns)

    def tiles(self, parameters: Parameters, by_key: bool) -> tuple[_Tiles, Tensor]:
        """The tiles of a launch, and the column table for them."""
        tile = TILES[self.rank][parameters.block]
        axes = zip(self.size, self.dilation, tile, strict=True)
        tiles = tuple(ceil_div(ceil_div(size, step), extent) for size, step, extent in axes)
        known, period, total = geometries(self.size[2], self.dilation[2], self.kernel[2], self.stride[2], tile[2])
        box, most = self.box(parameters, tile), self.most_places(tile, by_key)
        made = _Tiles(
            plan=Plan(self.size, self.dilation, tiles, known),
            total=total,
            TILE=tile,
            BOX=box,
            STEPS=ceil_div(most[2], box[2]),
            BOXES=math.prod(ceil_div(extent, other) for extent, other in zip(most, box, strict=True)),
            PERIOD=period,
            BY_KEY=by_key,
        )
        if (parameters.block, by_key) not in self.column_tables:
            self.column_tables[parameters.block, by_key] = self._make_columns(parameters, made)
        return made, self.column_tables[parameters.block, by_key]

    def _make_columns(self, parameters: Parameters, tiles: _Tiles) -> Tensor:
        heads = 1 if self.table is None else self.heads
        rows = (2 * self.kernel[0] - 1) * (2 * self.kernel[1] - 1) + 1
        programs = heads * tiles.total * rows
        columns = self.query.new_empty((programs, tiles.STEPS, tiles.TILE[2], tiles.BOX[2]), dtype=torch.float32)
        self.submit(
            column_table_kernel,
            programs,
            Parameters(parameters.block, 4, 1),
            self.shared,
            tiles,
            query=self.query,
            table=self.table,
            columns=columns,
        )
        return columns

    def most_places(self, tile: Sequence[int], by_key: bool) -> list[int]:
        """At least as many places along each axis as a tile can meet."""
        lengths = map(ceil_div, self.size, self.dilation)
        extents = zip(tile, self.kernel, self.stride, lengths, strict=True)
        # next to a border more queries are taken than see a key
        return [
            min(length, extent + kernel + stride - 2 + by_key * (kernel + 5) // 2)
            for extent, kernel, stride, length in extents
        ]

    def box(self, parameters: Parameters, tile: Sequence[int]) -> tuple[int, int, int]:
        """Extent of the blocks in which a program goes through the tokens that its tile meets."""
        if self.rank == 1:
            return 1, 1, parameters.block
        lengths = map(ceil_div, self.size, self.dilation)
        axes = zip(tile, self.kernel, lengths, strict=True)
        across = [next_power_of_two(min(extent + kernel - 1, length)) for extent, kernel, length in axes]
        columns = min(across[2], max(16, tile[2]))
        rows = parameters.block // columns
        if self.rank == 3:
            rows = min(across[1], rows)
        return parameters.block // (rows * columns), rows, columns

    def backward_bias(self) -> Tensor:
        """The gradient of the table: sums of score gradients over images, then over the pairs of one offset."""
        parameters = self.parameters("backward_bias")
        made, columns = self.tiles(parameters, by_key=False)
        boxes, tiles = made.BOXES, made.count
        images = max(1, min(IMAGES, self.batch, self.batch * tiles * boxes * self.heads // PROGRAMS))
        chunks = ceil_div(self.batch, images)
        size = max(1, chunks) * self.heads * boxes * parameters.block**2 * 4
        most = max(1, min(tiles, SCRATCH // size))
        partial = self.query.new_empty((tiles, *self.table.shape), dtype=torch.float32)
        scratch = self.query.new_empty((most * size // 4,), dtype=torch.float32)
        for first in range(0, tiles, most):
            count = min(most, tiles - first)
            some = {"first_tile": first, "count": count, "sums": scratch}
            programs = chunks * count * boxes * self.heads
            self.submit(
                backward_bias_kernel,
                programs,
                parameters,
                self.shared,
                made,
                columns=columns,
                batch=self.batch,
                images=images,
                **some,
            )
            programs = count * self.heads * ceil_div(math.prod(self.table.shape[1:]), ENTRIES)
            self.submit(
                gather_bias_kernel,
                programs,
                parameters,
                self.shared,
                made,
                grad_table=partial,
                chunks=chunks,
                ENTRIES=ENTRIES,
                **some,
            )
        return partial.sum(0)


def refuse(query: Tensor, key: Tensor, value: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors("neighborhood", query, value)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    outputs = call.start_forward()
    call.start("forward", forward_kernel)
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
    _, needs_key, needs_value, needs_bias = needs_gradient
    call.start("backward_query", backward_query_kernel)
    if needs_key or needs_value:
        call.start("backward_key", backward_key_kernel, by_key=True)
    if needs_bias:
        gradients.append(call.backward_bias())
    return [gradient for gradient in gradients if gradient is not None]
