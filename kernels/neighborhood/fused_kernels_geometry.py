"""Where the tiles and boxes of fused neighborhood attention lie, and which of their tokens see each other.

A "group" is what a program sees of the map: the tokens of one image that lie `dilation` apart. Places, boxes and
lengths count inside it, along three axes.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Ends(NamedTuple):
    """Of a group along the last axis: the first `lead` tiles and those from `tail` on have geometries of their own."""

    lead: int
    tail: int


class Geometries(NamedTuple):
    """Of the tiles of the last axis, in groups of the two lengths that dilation makes.

    Between lead and tail geometries repeat every PERIOD tiles.

    Attributes:
        long, short: of groups of each length.
        count: geometries of groups of the longer length; those of the shorter one follow them.
    """

    long: Ends
    short: Ends
    count: int


class Plan(NamedTuple):
    """The tiles of a map, with a number for each of three axes; tiles are counted for one group."""

    size: tuple[int, int, int]
    dilation: tuple[int, int, int]
    tiles: tuple[int, int, int]
    geometries: Geometries


class Group(NamedTuple):
    """The group of a program, in a kernel: its image, residue and length; the last two along three axes."""

    image: Any
    residue: tuple
    length: tuple


@triton.jit
def program_tile(program, heads, plan, TILE: tl.constexpr):
    """What a program owns: head, group and the first place of its tile."""
    size, dilation, tiles = plan.size, plan.dilation, plan.tiles
    head = program % heads
    rest = program // heads
    x = rest % tiles[2] * TILE[2]
    rest = rest // tiles[2]
    y = rest % tiles[1] * TILE[1]
    rest = rest // tiles[1]
    z = rest % tiles[0] * TILE[0]
    rest = rest // tiles[0]
    residue_x = rest % dilation[2]
    rest = rest // dilation[2]
    residue_y = rest % dilation[1]
    rest = rest // dilation[1]
    residue_z = rest % dilation[0]
    length_z = (size[0] - residue_z + dilation[0] - 1) // dilation[0]
    length_y = (size[1] - residue_y + dilation[1] - 1) // dilation[1]
    length_x = (size[2] - residue_x + dilation[2] - 1) // dilation[2]
    residue = (residue_z, residue_y, residue_x)
    return head, Group(rest // dilation[0], residue, (length_z, length_y, length_x)), (z, y, x)


@triton.jit
def places_of(slot, first, EXTENT: tl.constexpr):
    z = first[0] + slot // (EXTENT[1] * EXTENT[2])
    y = first[1] + slot // EXTENT[2] % EXTENT[1]
    return z, y, first[2] + slot % EXTENT[2]


@triton.jit
def before(places, stop):
    return (places[0] < stop[0]) & (places[1] < stop[1]) & (places[2] < stop[2])


@triton.jit
def position_of(places, group, plan):
    residue, dilation = group.residue, plan.dilation
    z = places[0] * dilation[0] + residue[0]
    y = places[1] * dilation[1] + residue[1]
    return tl.cast(group.image, tl.int64), z, y, places[2] * dilation[2] + residue[2]


@triton.jit
def clamp(places, stop):
    return tl.minimum(places[0], stop[0] - 1), tl.minimum(places[1], stop[1] - 1), tl.minimum(places[2], stop[2] - 1)


@triton.jit
def tile_of_tokens(first, group, plan, EXTENT: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens of a tile: their position in the map, and which of them lie in the group.

    Those that do not are taken for the last ones, so that they can be read and need no mask.
    """
    places = places_of(tl.arange(0, BLOCK), first, EXTENT)
    return position_of(clamp(places, group.length), group, plan), before(places, group.length)


@triton.jit
def box_of_tokens(first, stop, group, plan, EXTENT: tl.constexpr, BLOCK: tl.constexpr):
    """The positions in the map to read a box from, all before stop."""
    return position_of(clamp(places_of(tl.arange(0, BLOCK), first, EXTENT), stop), group, plan)


@triton.jit
def _window(place, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key that a query sees along one axis, and the one behind the last."""
    if CAUSAL:
        leader = tl.minimum(place // STRIDE * STRIDE + STRIDE - 1, length - 1)
        start = tl.maximum(leader - KERNEL + 1, 0)
        stop = place + 1
    else:
        leader = tl.minimum(place // STRIDE * STRIDE + STRIDE // 2, length - 1)
        start = tl.minimum(tl.maximum(leader - KERNEL // 2, 0), length - KERNEL)
        stop = start + KERNEL
    return start, stop


@triton.jit
def _seen_by(first, last, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first query that sees any of the keys `first` to `last` along one axis, and the one behind the last.

    Both solve the inequalities of :func:`_window` for the query; a few queries too many do no harm.
    """
    if CAUSAL:
        start = first
        stop = ((last + KERNEL - STRIDE) // STRIDE + 1) * STRIDE
        stop = tl.where(last + KERNEL >= length, length, stop)
    else:
        leader = tl.maximum(first - KERNEL + 1 + KERNEL // 2 - STRIDE // 2, 0)
        start = tl.where(first < KERNEL, 0, (leader + STRIDE - 1) // STRIDE * STRIDE)
        stop = ((last + KERNEL // 2 - STRIDE // 2) // STRIDE + 1) * STRIDE
        stop = tl.where(last >= length - KERNEL, length, stop)
    return start, tl.minimum(stop, length)


@triton.jit
def axis_box(
    first,
    length,
    TILE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """All keys that a tile of queries sees along one axis, or all queries that see a tile of keys if BY_KEY.

    As the first place and the one behind the last.
    """
    last = tl.minimum(first + TILE, length) - 1
    if BY_KEY:
        start, stop = _seen_by(first, last, length, KERNEL, STRIDE, CAUSAL)
    else:
        start, _ = _window(first, length, KERNEL, STRIDE, CAUSAL)
        _, stop = _window(last, length, KERNEL, STRIDE, CAUSAL)
    return start, stop


@triton.jit
def box_of(
    first,
    length,
    TILE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """:func:`axis_box` of all axes."""
    start_z, stop_z = axis_box(first[0], length[0], TILE[0], KERNEL[0], STRIDE[0], CAUSAL[0], BY_KEY)
    start_y, stop_y = axis_box(first[1], length[1], TILE[1], KERNEL[1], STRIDE[1], CAUSAL[1], BY_KEY)
    start_x, stop_x = axis_box(first[2], length[2], TILE[2], KERNEL[2], STRIDE[2], CAUSAL[2], BY_KEY)
    return (start_z, start_y, start_x), (stop_z, stop_y, stop_x)


@triton.jit
def box_steps(start, stop, BOX: tl.constexpr):
    """How many boxes lie along each axis from start to stop."""
    z = (stop[0] - start[0] + BOX[0] - 1) // BOX[0]
    y = (stop[1] - start[1] + BOX[1] - 1) // BOX[1]
    return z, y, (stop[2] - start[2] + BOX[2] - 1) // BOX[2]


@triton.jit
def next_box(step, steps):
    """The number of the next box along each axis; the last axis runs fastest. It saves divisions in a loop."""
    z, y, x = step
    x += 1
    y += tl.where(x == steps[2], 1, 0)
    x = tl.where(x == steps[2], 0, x)
    z += tl.where(y == steps[1], 1, 0)
    return z, tl.where(y == steps[1], 0, y), x


@triton.jit
def box_at(step, start, BOX: tl.constexpr):
    """The first place of a box."""
    return start[0] + step[0] * BOX[0], start[1] + step[1] * BOX[1], start[2] + step[2] * BOX[2]


@triton.jit
def axis_sees(
    query, key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, LIMIT: tl.constexpr
):
    """Whether queries see keys along one axis. LIMIT: queries may lie behind the group, and see nothing then."""
    start, stop = _window(query, length, KERNEL, STRIDE, CAUSAL)
    # one comparison, as a negative number is a large one without its sign
    visible = (key - start).to(tl.uint32, bitcast=True) < (stop - start).to(tl.uint32, bitcast=True)
    if LIMIT:
        visible &= query < length
    return visible


@triton.jit
def row_offset(
    query,
    key,
    length,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """The offset of keys from queries along all axes but the last, as one number; the largest if not visible."""
    row = 0
    if RANK > 1:
        visible = axis_sees(query[1], key[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1], LIMIT)
        row = key[1] - query[1] + KERNEL[1] - 1
        if RANK > 2:
            visible &= axis_sees(query[0], key[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0], LIMIT)
            row += (key[0] - query[0] + KERNEL[0] - 1) * (2 * KERNEL[1] - 1)
        row = tl.where(visible, row, (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1))
    return row
