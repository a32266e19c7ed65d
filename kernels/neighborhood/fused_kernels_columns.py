"""The column table of fused neighborhood attention: what a pair of tokens adds to its score, laid out for reading.

Which keys of the last axis a query sees depends on where its tile lies only near the borders: tiles have few
geometries. The column table has, for each head, geometry and row offset, the bias in base 2 of the places of the tile
against those of each box, and -inf where a pair is not seen. A row offset stands for the offsets of a pair along all
axes but the last; one more row, all -inf, is for pairs that one of these axes hides. So a program finds bias and
visibility together, by one row for each place of its tile and each row of a box.

A thread holds the products of a tensor core in pairs of columns, 8 columns apart; four threads share a row. Of 16
columns, the two pairs of one thread lie next to each other in the table: a thread reads what it adds to its products,
16 bytes at a time, and nothing changes threads through shared memory.
"""

import triton
import triton.language as tl

from ..triton_common import LOG2_E
from .fused_kernels_geometry import axis_box, axis_sees, clamp, places_of, row_offset


@triton.jit
def geometry_of(first, group, plan, PERIOD: tl.constexpr):
    """Number of the geometry of a tile that begins at `first`, which counts tiles."""
    known = plan.geometries
    short = group.length[2] * plan.dilation[2] < plan.size[2]
    lead = tl.where(short, known.short.lead, known.long.lead)
    tail = tl.where(short, known.short.tail, known.long.tail)
    number = tl.where(first < tail, lead + (first - lead) % PERIOD, lead + PERIOD + first - tail)
    return tl.where(first < lead, first, number) + tl.where(short, known.count, 0)


@triton.jit
def _cell(own, other, BOX: tl.constexpr):
    """Where the table has a place of the tile and one of a box: the pairs of a thread's fragment are neighbours."""
    if BOX[2] % 16 == 0:
        pair = other // 2 % 4 * 2 + other // 8 % 2
        other = other // 16 * 16 + pair * 2 + other % 2
    return own * BOX[2] + other


@triton.jit
def column_table_kernel(
    query,
    table,
    columns,
    plan,
    total,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    STEPS: tl.constexpr,
    PERIOD: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """One program: a row of the column table, for one geometry and head."""
    ROWS: tl.constexpr = (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1)
    size, dilation, known = plan.size, plan.dilation, plan.geometries
    row = tl.program_id(0) % (ROWS + 1)
    number = tl.program_id(0) // (ROWS + 1) % total
    head = tl.program_id(0) // (ROWS + 1) // total
    short = number >= known.count
    number -= tl.where(short, known.count, 0)
    lead = tl.where(short, known.short.lead, known.long.lead)
    tail = tl.where(short, known.short.tail, known.long.tail)
    length = tl.where(short, size[2] // dilation[2], (size[2] + dilation[2] - 1) // dilation[2])
    first = tl.where(number < lead + PERIOD, number, tail + number - lead - PERIOD) * TILE[2]
    start, _ = axis_box(first, length, TILE[2], KERNEL[2], STRIDE[2], CAUSAL[2], BY_KEY)
    own = tl.minimum(first + tl.arange(0, TILE[2]), length - 1)[:, None]
    cell = _cell(tl.arange(0, TILE[2])[:, None], tl.arange(0, BOX[2])[None, :], BOX)
    for step in range(0, STEPS):
        other = start + step * BOX[2] + tl.arange(0, BOX[2])[None, :]
        query_places, key_places = (other, own) if BY_KEY else (own, other)
        visible = axis_sees(query_places, key_places, length, KERNEL[2], STRIDE[2], CAUSAL[2], BY_KEY) & (row < ROWS)
        bias = tl.where(visible, 0.0, float("-inf"))
        if table is not None:
            entry = (head * ROWS + row) * (2 * KERNEL[2] - 1) + key_places - query_places + KERNEL[2] - 1
            bias += tl.load(table + entry, mask=visible, other=0.0).to(tl.float32) * LOG2_E
        tl.store(columns + (tl.program_id(0) * STEPS + step).to(tl.int64) * (TILE[2] * BOX[2]) + cell, bias)


@triton.jit
def _load_rows(
    columns, begin, tile, box, own, other, within, length,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, RANK: tl.constexpr,
    TILE: tl.constexpr, BOX: tl.constexpr, STEPS: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """What the table has of slots `own` of the tile and `other` of the box, at `within` in the part of a place."""
    tile_places, box_places = clamp(places_of(own, tile, TILE), length), places_of(other, box, BOX)
    query_places, key_places = (box_places, tile_places) if BY_KEY else (tile_places, box_places)
    row = row_offset(query_places, key_places, length, KERNEL, STRIDE, CAUSAL, RANK, BY_KEY)
    row = row * (STEPS * TILE[2] * BOX[2]) + own % TILE[2] * BOX[2]
    offset = row + within
    if len(offset.shape) > 2:
        offset = tl.multiple_of(offset, (1, 1, 1, 1, 1, 4))  # more than the compiler finds out
    return tl.load(columns + begin + offset)


@triton.jit
def load_columns(
    columns, number, tile, box, step, length,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, RANK: tl.constexpr,
    TILE: tl.constexpr, BOX: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """What the pairs of a tile (rows) and a box add to their scores in base 2, -inf where they do not see each other.

    Args:
        number: of the geometry, counted over heads.
        tile, box: the first places of both.
        step: number of the box along the last axis.
    """
    ROWS: tl.constexpr = (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1)
    CELLS: tl.constexpr = TILE[2] * BOX[2]
    PARTS: tl.constexpr = BLOCK // 16
    begin = number.to(tl.int64) * ((ROWS + 1) * STEPS * CELLS) + step * CELLS
    if BOX[2] % 16 == 0:
        # axes: threads of a row, rows, warps, two halves of the rows of a warp, fragments along a row, their columns
        thread = tl.arange(0, 4)[:, None, None, None, None, None] * 4
        own = tl.arange(0, 8)[None, :, None, None, None, None]
        own += tl.arange(0, PARTS)[None, None, :, None, None, None] * 16
        own += tl.arange(0, 2)[None, None, None, :, None, None] * 8
        part = tl.arange(0, PARTS)[None, None, None, None, :, None] * 16
        within = thread + part % BOX[2] + tl.arange(0, 4)[None, None, None, None, None, :]
        values = tl.zeros([4, 8, PARTS, 2, PARTS, 4], tl.float32)
        if length[2] > 0:  # always; a load inside a condition is left out of the software pipeline
            values = _load_rows(
                columns, begin, tile, box, own, part, within, length,
                KERNEL, STRIDE, CAUSAL, RANK, TILE, BOX, STEPS, BY_KEY,
            )  # fmt: skip
        values = tl.reshape(values, [4, 8, PARTS, 2, PARTS, 2, 2])
        values = tl.reshape(tl.permute(values, (2, 3, 1, 4, 5, 0, 6)), [BLOCK, BLOCK])
    else:
        slot = tl.arange(0, BLOCK)
        values = _load_rows(
            columns, begin, tile, box, slot[:, None], slot[None, :], (slot % BOX[2])[None, :], length,
            KERNEL, STRIDE, CAUSAL, RANK, TILE, BOX, STEPS, BY_KEY,
        )  # fmt: skip
    return values
