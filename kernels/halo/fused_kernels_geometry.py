"""Where the tokens of blocks, and the cells of their windows, lie in the map of fused halo attention."""

from typing import NamedTuple

import triton
import triton.language as tl


class Plan(NamedTuple):
    """Size of the map of keys, and blocks along each of its axes."""

    size: tuple[int, int]
    blocks: tuple[int, int]


class Sides(NamedTuple):
    """Tokens along a side: of a block of queries, of a block of keys, and of the halo around it."""

    queries: int
    keys: int
    halo: int


@triton.jit
def program_of_block(heads, blocks, PARTS: tl.constexpr):
    """What a program owns: head, part of a block, and block (image, row, column)."""
    rest = tl.program_id(0) // (heads * PARTS)
    block = (rest // (blocks[0] * blocks[1]), rest // blocks[1] % blocks[0], rest % blocks[1])
    return tl.program_id(0) % heads, tl.program_id(0) // heads % PARTS, block


@triton.jit
def tokens_of_block(slot, block, SIDE: tl.constexpr):
    """Positions of the tokens of a block of SIDE x SIDE, and which slots hold one."""
    image, row, column = block
    return (image, row * SIDE + slot // SIDE, column * SIDE + slot % SIDE), slot < SIDE * SIDE


@triton.jit
def within(place, length):
    """Whether 0 <= place < length, in one comparison."""
    return place.to(tl.uint32, bitcast=True) < tl.cast(length, tl.uint32)


@triton.jit
def cells_of_window(row, column, block, size, SIDES: tl.constexpr):
    """Position in the map of cells of a window, and which of them are cells of it that lie inside the map."""
    side: tl.constexpr = SIDES.keys + 2 * SIDES.halo
    image, block_row, block_column = block
    y = block_row * SIDES.keys - SIDES.halo + row
    x = block_column * SIDES.keys - SIDES.halo + column
    return (image, y, x), within(y, size[0]) & within(x, size[1]) & (row < side) & (column < side)
