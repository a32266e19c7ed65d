"""Where the tiles and boxes of fused neighborhood attention lie, and which of their tokens see each other.

A "group" is what a program sees of the map: the tokens of one image that lie `dilation` apart. Places, boxes and
lengths count inside it, along three axes.
"""

import triton
import triton.language as tl


@triton.jit
def program_tile(heads, plan, TILE: tl.constexpr):
    """What a program owns: head, group (image, residues, lengths of its axes) and the first place of its tile."""
    size, dilation, tiles = plan
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
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
    return head, (rest // dilation[0], residue, (length_z, length_y, length_x)), (z, y, x)


@triton.jit
def _places(slot, first, EXTENT: tl.constexpr):
    z = first[0] + slot // (EXTENT[1] * EXTENT[2])
    y = first[1] + slot // EXTENT[2] % EXTENT[1]
    return z, y, first[2] + slot % EXTENT[2]


@triton.jit
def before(places, stop):
    return (places[0] < stop[0]) & (places[1] < stop[1]) & (places[2] < stop[2])


@triton.jit
def position_of(places, group, plan):
    image, residue, _ = group
    dilation = plan[1]
    z = places[0] * dilation[0] + residue[0]
    y = places[1] * dilation[1] + residue[1]
    return tl.cast(image, tl.int64), z, y, places[2] * dilation[2] + residue[2]


@triton.jit
def block_of_tokens(first, stop, group, plan, EXTENT: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens of a tile or box: their places, their position in the map, and which of them lie before stop."""
    places = _places(tl.arange(0, BLOCK), first, EXTENT)
    return places, position_of(places, group, plan), before(places, stop)


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
def box_of_keys(first, length, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """All keys that a tile of queries sees, as the first place and the one behind the last of each axis."""
    start_z, _ = _window(first[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    start_y, _ = _window(first[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    start_x, _ = _window(first[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    _, stop_z = _window(tl.minimum(first[0] + TILE[0], length[0]) - 1, length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    _, stop_y = _window(tl.minimum(first[1] + TILE[1], length[1]) - 1, length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    _, stop_x = _window(tl.minimum(first[2] + TILE[2], length[2]) - 1, length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (start_z, start_y, start_x), (stop_z, stop_y, stop_x)


@triton.jit
def box_of_queries(first, length, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """All queries that see a tile of keys, as the first place and the one behind the last of each axis."""
    last_z = tl.minimum(first[0] + TILE[0], length[0]) - 1
    last_y = tl.minimum(first[1] + TILE[1], length[1]) - 1
    last_x = tl.minimum(first[2] + TILE[2], length[2]) - 1
    start_z, stop_z = _seen_by(first[0], last_z, length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    start_y, stop_y = _seen_by(first[1], last_y, length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    start_x, stop_x = _seen_by(first[2], last_x, length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (start_z, start_y, start_x), (stop_z, stop_y, stop_x)


@triton.jit
def box_steps(start, stop, BOX: tl.constexpr):
    """How many boxes lie along each axis from start to stop."""
    z = (stop[0] - start[0] + BOX[0] - 1) // BOX[0]
    y = (stop[1] - start[1] + BOX[1] - 1) // BOX[1]
    return z, y, (stop[2] - start[2] + BOX[2] - 1) // BOX[2]


@triton.jit
def box_at(step, steps, start, BOX: tl.constexpr):
    """The first place of a box."""
    z = start[0] + step // (steps[1] * steps[2]) * BOX[0]
    y = start[1] + step // steps[2] % steps[1] * BOX[1]
    return z, y, start[2] + step % steps[2] * BOX[2]


@triton.jit
def _sees(query, key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    start, stop = _window(query, length, KERNEL, STRIDE, CAUSAL)
    return (key >= start) & (key < stop)


@triton.jit
def visible_pairs(
    query, key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, RANK: tl.constexpr
):
    """Whether queries see keys, both with the other's axis put in. Places outside the group are not looked at."""
    visible = _sees(query[2], key[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    if RANK > 1:
        visible &= _sees(query[1], key[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    if RANK > 2:
        visible &= _sees(query[0], key[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    return visible


@triton.jit
def as_rows(places):
    return places[0][:, None], places[1][:, None], places[2][:, None]


@triton.jit
def as_columns(places):
    return places[0][None, :], places[1][None, :], places[2][None, :]


@triton.jit
def table_entry(query, key, head, KERNEL: tl.constexpr, RANK: tl.constexpr):
    """Where the table has the bias of pairs that see each other."""
    entry = head
    if RANK > 2:
        entry = entry * (2 * KERNEL[0] - 1) + key[0] - query[0] + KERNEL[0] - 1
    if RANK > 1:
        entry = entry * (2 * KERNEL[1] - 1) + key[1] - query[1] + KERNEL[1] - 1
    return entry * (2 * KERNEL[2] - 1) + key[2] - query[2] + KERNEL[2] - 1
