"""Tiles and boxes of aggregated attention: what a Triton program owns, which pairs of tokens see each other, biases."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..triton_common import LOG2_E, multiply, token_pointers


class Plan(NamedTuple):
    """Size of the map, tiles along each of its axes, and what programs are made of."""

    size: tuple[int, int]
    tiles: tuple[int, int]
    batch: int
    heads: int
    images_per_program: int


@triton.jit
def program_of_tile(plan, TILE: tl.constexpr):
    """What a program owns: a head, the first and last image, a tile's row and column, its tokens, which exist."""
    tiles, heads, images_per_program = plan.tiles, plan.heads, plan.images_per_program
    index = tl.program_id(0) // heads
    tile = index % (tiles[0] * tiles[1])
    first = index // (tiles[0] * tiles[1]) * images_per_program
    corner = (tile // tiles[1] * TILE[0], tile % tiles[1] * TILE[1])
    slot = tl.arange(0, TILE[0] * TILE[1])
    tokens = (corner[0] + slot // TILE[1], corner[1] + slot % TILE[1])
    images = (first, tl.minimum(first + images_per_program, plan.batch))
    return tl.program_id(0) % heads, images, corner, tokens, _inside(tokens, plan.size)


@triton.jit
def _inside(tokens, size):
    y, x = tokens
    return (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])


@triton.jit
def box_around(corner, size, TILE: tl.constexpr, BOX: tl.constexpr, WINDOW: tl.constexpr):
    """The tokens of the box around a tile, padded to a power of two, and which of them the map has."""
    slot = tl.arange(0, BOX)
    width: tl.constexpr = TILE[1] + WINDOW - 1
    tokens = (corner[0] - WINDOW // 2 + slot // width, corner[1] - WINDOW // 2 + slot % width)
    return tokens, _inside(tokens, size) & (slot // width < TILE[0] + WINDOW - 1)


@triton.jit
def window_slots(TILE: tl.constexpr, BOX: tl.constexpr, WINDOW: tl.constexpr):
    """For tokens of a tile (rows) and of its box: which lie in the window around the row, and in which slot of it.

    Returns:
        row_slot, column_slot: the slot is column_slot - row_slot; two parts take fewer registers than a tile of slots.
    """
    token = tl.arange(0, TILE[0] * TILE[1])
    other = tl.arange(0, BOX)
    width: tl.constexpr = TILE[1] + WINDOW - 1
    y = (other // width)[None, :] - (token // TILE[1])[:, None]
    x = (other % width)[None, :] - (token % TILE[1])[:, None]
    near = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW)
    row_slot = token // TILE[1] * WINDOW + token % TILE[1]
    return row_slot, other // width * WINDOW + other % width, near


@triton.jit
def residues(slot, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr):
    """(tokens, SLOTS), for tokens in rows of WIDTH: 1 in the slot named by their row and column modulo the window.

    In a window all residues are different. So a product with them puts the weights of a window, in the order of
    residues, into the columns of a box, where a load for each pair would take far longer. The product also puts them
    on tokens a multiple of the window away, which a mask takes out.
    """
    own = slot // WIDTH % WINDOW * WINDOW + slot % WIDTH % WINDOW
    return (own[:, None] == tl.arange(0, SLOTS)[None, :]).to(tl.float32)


@triton.jit
def window_slots_by_residue(token, WIDTH: tl.constexpr, SHIFT: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr):
    """(tokens, SLOTS): the slots of the windows of tokens in the order of residues; further ones are WINDOW**2 or more.

    Args:
        WIDTH: tokens of a row.
        SHIFT: 0 for the windows of a tile of tokens, where residues count from the corner of its box; 1 for windows of
            tokens of a box, where residues count from the corner of its tile.
    """
    slot = tl.arange(0, SLOTS)[None, :]
    y = (slot // WINDOW + (2 * WINDOW - SHIFT) - (token // WIDTH % WINDOW)[:, None]) % WINDOW
    x = (slot % WINDOW + (2 * WINDOW - SHIFT) - (token % WIDTH % WINDOW)[:, None]) % WINDOW
    return tl.where(slot < WINDOW * WINDOW, y * WINDOW + x, slot)


@triton.jit
def window_pointers(
    tensor, position, head, valid, WIDTH: tl.constexpr, SHIFT: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr
):
    """Pointers to :func:`window_slots_by_residue` of tokens, and their mask."""
    slot = window_slots_by_residue(tl.arange(0, valid.shape[0]), WIDTH, SHIFT, WINDOW, SLOTS)
    return token_pointers(tensor, position, head)[:, None] + slot, valid[:, None] & (slot < WINDOW * WINDOW)


@triton.jit
def sum_rows(left, right):
    """Sums over the columns of both."""
    together: tl.constexpr = left.shape[1] == right.shape[1]  # one reduction rather than two
    return tl.sum(left + right, 1) if together else tl.sum(left, 1) + tl.sum(right, 1)


@triton.jit
def max_rows(left, right):
    """Largest of the columns of both."""
    together: tl.constexpr = left.shape[1] == right.shape[1]
    return tl.max(tl.maximum(left, right), 1) if together else tl.maximum(tl.max(left, 1), tl.max(right, 1))


@triton.jit
def store_windows(
    windows, values, position, head, valid, DTYPE: tl.constexpr,
    TILE: tl.constexpr, BOX: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write values, rounded to DTYPE, to a tensor of windows (batch, height, width, heads, WINDOW**2).

    Args:
        values: (tokens of a tile, tokens of its box), zeros outside the windows.
    """
    slots = residues(tl.arange(0, BOX), TILE[1] + WINDOW - 1, WINDOW, SLOTS).to(DTYPE)
    pointers, mask = window_pointers(windows, position, head, valid, TILE[1], 0, WINDOW, SLOTS)
    window_sums = multiply(values, slots, PRECISION)
    tl.store(pointers, window_sums.to(windows.pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_sums_by_slot(
    partial, values, TILE: tl.constexpr, BOX: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr
):
    """Write the sums over the pairs of a tile of keys and its box of queries that are the same slot of a window."""
    width: tl.constexpr = TILE[1] + WINDOW - 1
    token = tl.arange(0, TILE[0] * TILE[1])
    sums_by_slot = tl.zeros([TILE[0] * TILE[1], SLOTS], tl.float32)
    for _ in tl.static_range(3):  # of 8 bits each, which make a float32
        bits = values.to(tl.bfloat16)
        sums_by_slot += tl.dot(bits, residues(tl.arange(0, BOX), width, WINDOW, SLOTS).to(tl.bfloat16))
        values -= bits.to(tl.float32)
    slot = window_slots_by_residue(token, TILE[1], 0, WINDOW, SLOTS)
    for index in range(0, WINDOW * WINDOW):
        entry = tl.program_id(0).to(tl.int64) * (WINDOW * WINDOW) + WINDOW * WINDOW - 1 - index
        tl.store(partial + entry, tl.sum(tl.sum(tl.where(slot == index, sums_by_slot, 0.0), 1), 0))


@triton.jit
def load_local_bias(bias, head, slot, visible, WINDOW: tl.constexpr):
    """In base 2, -inf where tokens do not see each other."""
    result = tl.where(visible, 0.0, float("-inf"))
    if bias is not None:
        entry = tl.load(bias + head * (WINDOW * WINDOW) + slot, mask=visible, other=float("-inf"))
        result = entry.to(tl.float32) * LOG2_E
    return result


@triton.jit
def load_pooled_bias(bias, head, tokens, token, valid, slot, pooled, CELLS: tl.constexpr):
    """In base 2, of tokens of the map (rows) and pooled ones: -inf for pooled tokens that are none.

    Args:
        bias: (heads, tokens, CELLS), whose last entries are -inf already, or None.
    """
    result = tl.where(slot < pooled, 0.0, float("-inf"))[None, :]
    if bias is not None:
        row = tl.cast(head, tl.int64) * tokens + tl.where(valid, token, 0)
        result = tl.load(bias + row[:, None] * CELLS + slot[None, :]).to(tl.float32) * LOG2_E
    return result
