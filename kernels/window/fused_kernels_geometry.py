"""Where the tokens of fused window attention lie, which of them see each other, and what is added to their scores.

A "slot" is a place in a block of tokens: a block has some windows, or a part of one.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..triton_common import LOG2_E


class Plan(NamedTuple):
    """How a map is cut into windows; pairs have a number for each axis.

    Attributes:
        counts: windows.
        size: of the map.
        step, spacing: distance of the first tokens of windows, and of the tokens of a window.
    """

    batch: int
    counts: tuple[int, int]
    size: tuple[int, int]
    step: tuple[int, int]
    spacing: tuple[int, int]
    shift: tuple[int, int]


@triton.jit
def numbers(plan):
    """The plan without constants: Triton 3.6 loses those of a tuple inside a loop."""
    zero = tl.program_id(1)
    counts, size = (plan.counts[0] + zero, plan.counts[1] + zero), (plan.size[0] + zero, plan.size[1] + zero)
    step = (plan.step[0] + zero, plan.step[1] + zero)
    spacing = (plan.spacing[0] + zero, plan.spacing[1] + zero)
    return Plan(plan.batch + zero, counts, size, step, spacing, (plan.shift[0] + zero, plan.shift[1] + zero))


@triton.jit
def unravel(index, rectangle):
    """The window (image, row, column) with a number in a rectangle (top, left, rows, columns) of windows."""
    top, left, rows, columns = rectangle
    return index // (rows * columns), top + index // columns % rows, left + index % columns


@triton.jit
def cell(slot, WINDOW: tl.constexpr, WIDTH: tl.constexpr):
    """Row and column of slots in their window, whose rows take WIDTH slots, and which slots hold a token."""
    slot = slot % (WINDOW[0] * WIDTH)
    column = slot % WIDTH
    return slot // WIDTH, column, column < WINDOW[1]


@triton.jit
def members(window, block, slot, rectangle, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """The window of each slot where a block has several windows, else the one that is given."""
    if PACK > 1:
        window = unravel(block * PACK + slot // (WINDOW[0] * WINDOW[1]), rectangle)
    return window


@triton.jit
def _place(slot, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr):
    """Row and column of the slots of windows in the map, before the shift."""
    step, spacing = plan.step, plan.spacing
    row, column, _ = cell(slot, WINDOW, WIDTH)
    return window[1] * step[0] + row * spacing[0], window[2] * step[1] + column * spacing[1]


@triton.jit
def locate(slot, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr, SHIFTED: tl.constexpr):
    """Positions (image, row, column) in the map of the slots of a block of windows, and which have a token."""
    y, x = _place(slot, window, plan, WINDOW, WIDTH)
    if SHIFTED:
        size, shift = plan.size, plan.shift
        y = tl.where(y >= size[0] - shift[0], y - size[0], y) + shift[0]
        x = tl.where(x >= size[1] - shift[1], x - size[1], x) + shift[1]
    valid = slot < PACK * WINDOW[0] * WIDTH
    if WINDOW[1] < WIDTH:
        valid = valid & cell(slot, WINDOW, WIDTH)[2]
    if PACK > 1:
        valid = valid & (window[0] < plan.batch)
    return (window[0], y, x), valid


@triton.jit
def _region(slot, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr):
    """The part of a torn window that a slot lies in: tokens of two parts do not see each other."""
    y, x = _place(slot, window, plan, WINDOW, WIDTH)
    size, shift = plan.size, plan.shift
    return (y >= size[0] - shift[0]).to(tl.int32) * 2 + (x >= size[1] - shift[1]).to(tl.int32)


@triton.jit
def torn(window, plan, AXIS: tl.constexpr):
    """Whether the shift tears a window apart along an axis: it does so to the last one."""
    return (window[1 + AXIS] == plan.counts[AXIS] - 1) & (plan.shift[AXIS] > 0)


@triton.jit
def tear(scores, rows, columns, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr):
    """Scores with -inf where the shift has torn two tokens of a window apart."""
    border = False
    if SHIFTED:
        border = torn(window, plan, 0) | torn(window, plan, 1)
    if border:
        row_regions = _region(rows, window, plan, WINDOW, WIDTH)
        column_regions = _region(columns, window, plan, WINDOW, WIDTH)
        scores = tl.where(row_regions[:, None] == column_regions[None, :], scores, float("-inf"))
    return scores


@triton.jit
def bias_of(table, head, query, key, WINDOW: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr):
    """What is added to scores in base 2, for slots of queries and keys that come with the other's axis put in.

    Entries of the table, and -inf where the slots belong to two windows of the block or the key's has no token. Queries
    without a token see some keys: what they compute stays finite, and nobody reads it.
    """
    SLOTS: tl.constexpr = WINDOW[0] * WIDTH
    ROW: tl.constexpr = 2 * WINDOW[1] - 1
    key_row, key_column, visible = cell(key, WINDOW, WIDTH)
    row, column, asked = cell(query, WINDOW, WIDTH)
    visible = visible & (key < PACK * SLOTS)
    if PACK > 1:
        visible = visible & ((query // SLOTS == key // SLOTS) | (query >= PACK * SLOTS))
    bias = 0.0
    if table is not None:
        entry = key_row * ROW + key_column - (row * ROW + column) + (WINDOW[0] - 1) * ROW + WINDOW[1] - 1
        start = table + head * ((2 * WINDOW[0] - 1) * ROW)
        taken = visible & asked & (query < PACK * SLOTS)
        bias = tl.load(start + entry, mask=taken, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(visible, bias, float("-inf"))
