"""Neighborhood attention in Triton: a tile of queries attends to the box of keys around it, read from the map in place.

Maps of one and two axes are maps of three with leading axes of size 1. Places count inside a group of tokens `dilation`
apart, so a program knows no dilation beyond the address of a token. A tile of queries, or of keys, is owned by one
program for one head, which goes through the tokens that it meets box by box: gradients of query, key and value are sums
in a fixed order. The gradient of the bias table is added up with atomics; under torch.use_deterministic_algorithms a
kernel of its own goes through the offsets one by one, in a fixed order and with more work.
"""

import math
from typing import Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import neighborhood_options
from ..launch import Parameters, launch_parameters, submit
from ..triton_common import (
    LN_2,
    LOG2_E,
    adjacent_channels,
    gradient_of_scores,
    load_logsumexp,
    load_tokens,
    masked_scores,
    multiply,
    padded_channels,
    precision,
    refuse_tensors,
    softmax_step,
    store_tokens,
)

TILES = {
    1: {64: (1, 1, 64), 32: (1, 1, 32), 16: (1, 1, 16)},
    2: {64: (1, 8, 8), 32: (1, 4, 8), 16: (1, 4, 4)},
    3: {64: (4, 4, 4), 32: (2, 4, 4), 16: (2, 2, 4)},
}
"""Extent of a tile by the rank of the map and the tokens of a block."""
SLICES = 32
"""Copies of the table that atomics go to, so that fewer of them meet at one address."""


@triton.jit
def _program(heads, plan, TILE: tl.constexpr):
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
def _before(places, stop):
    return (places[0] < stop[0]) & (places[1] < stop[1]) & (places[2] < stop[2])


@triton.jit
def _position(places, group, plan):
    image, residue, _ = group
    dilation = plan[1]
    z = places[0] * dilation[0] + residue[0]
    y = places[1] * dilation[1] + residue[1]
    return tl.cast(image, tl.int64), z, y, places[2] * dilation[2] + residue[2]


@triton.jit
def _rows(position, head, strides):
    image, z, y, x = position
    offset = z.to(tl.int64) * strides[1] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return image * strides[0] + tl.cast(head, tl.int64) * strides[4] + offset


@triton.jit
def _number(position, head, heads, size):
    """Of the (token, head) pair in a contiguous tensor."""
    image, z, y, x = position
    return (((image * size[0] + z) * size[1] + y) * size[2] + x) * heads + head


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
def _box_of_keys(first, length, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """All keys that a tile of queries sees, as the first place and the one behind the last of each axis."""
    start_z, _ = _window(first[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    start_y, _ = _window(first[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    start_x, _ = _window(first[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    _, stop_z = _window(tl.minimum(first[0] + TILE[0], length[0]) - 1, length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    _, stop_y = _window(tl.minimum(first[1] + TILE[1], length[1]) - 1, length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    _, stop_x = _window(tl.minimum(first[2] + TILE[2], length[2]) - 1, length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (start_z, start_y, start_x), (stop_z, stop_y, stop_x)


@triton.jit
def _box_of_queries(
    first, length, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    """All queries that see a tile of keys, as the first place and the one behind the last of each axis."""
    last_z = tl.minimum(first[0] + TILE[0], length[0]) - 1
    last_y = tl.minimum(first[1] + TILE[1], length[1]) - 1
    last_x = tl.minimum(first[2] + TILE[2], length[2]) - 1
    start_z, stop_z = _seen_by(first[0], last_z, length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    start_y, stop_y = _seen_by(first[1], last_y, length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    start_x, stop_x = _seen_by(first[2], last_x, length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (start_z, start_y, start_x), (stop_z, stop_y, stop_x)


@triton.jit
def _steps(start, stop, BOX: tl.constexpr):
    """How many boxes lie along each axis from start to stop."""
    z = (stop[0] - start[0] + BOX[0] - 1) // BOX[0]
    y = (stop[1] - start[1] + BOX[1] - 1) // BOX[1]
    return z, y, (stop[2] - start[2] + BOX[2] - 1) // BOX[2]


@triton.jit
def _box(step, steps, start, BOX: tl.constexpr):
    """The first place of a box."""
    z = start[0] + step // (steps[1] * steps[2]) * BOX[0]
    y = start[1] + step // steps[2] % steps[1] * BOX[1]
    return z, y, start[2] + step % steps[2] * BOX[2]


@triton.jit
def _sees(query, key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    start, stop = _window(query, length, KERNEL, STRIDE, CAUSAL)
    return (key >= start) & (key < stop)


@triton.jit
def _visible(query, key, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, RANK: tl.constexpr):
    """Whether queries see keys, both with the other's axis put in. Places outside the group are not looked at."""
    visible = _sees(query[2], key[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    if RANK > 1:
        visible &= _sees(query[1], key[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    if RANK > 2:
        visible &= _sees(query[0], key[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    return visible


@triton.jit
def _rows_of(places):
    return places[0][:, None], places[1][:, None], places[2][:, None]


@triton.jit
def _columns_of(places):
    return places[0][None, :], places[1][None, :], places[2][None, :]


@triton.jit
def _entry(query, key, head, KERNEL: tl.constexpr, RANK: tl.constexpr):
    """Where the table has the bias of pairs that see each other."""
    entry = head
    if RANK > 2:
        entry = entry * (2 * KERNEL[0] - 1) + key[0] - query[0] + KERNEL[0] - 1
    if RANK > 1:
        entry = entry * (2 * KERNEL[1] - 1) + key[1] - query[1] + KERNEL[1] - 1
    return entry * (2 * KERNEL[2] - 1) + key[2] - query[2] + KERNEL[2] - 1


@triton.jit
def _bias(table, entry, visible, HAS_BIAS: tl.constexpr):
    """In base 2."""
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(table + entry, mask=visible, other=0.0).to(tl.float32) * LOG2_E
    return bias


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    table,
    output,
    logsumexp,
    query_strides,
    key_strides,
    value_strides,
    plan,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, group, first = _program(heads, plan, TILE)
    length = group[2]
    if not _before(first, length):
        return
    places = _places(tl.arange(0, BLOCK), first, TILE)
    valid = _before(places, length)
    position = _position(places, group, plan)
    queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
    start, stop = _box_of_keys(first, length, TILE, KERNEL, STRIDE, CAUSAL)
    steps = _steps(start, stop, BOX)
    for step in range(0, steps[0] * steps[1] * steps[2]):
        key_places = _places(tl.arange(0, BLOCK), _box(step, steps, start, BOX), BOX)
        key_valid = _before(key_places, stop)
        key_position = _position(key_places, group, plan)
        keys = load_tokens(key, _rows(key_position, head, key_strides), key_valid, HEAD_DIM, CHANNELS)
        values = load_tokens(value, _rows(key_position, head, value_strides), key_valid, HEAD_DIM, CHANNELS)
        of_query, of_key = _rows_of(places), _columns_of(key_places)
        visible = _visible(of_query, of_key, length, KERNEL, STRIDE, CAUSAL, RANK) & valid[:, None]
        bias = _bias(table, _entry(of_query, of_key, head, KERNEL, RANK), visible, HAS_BIAS)
        scores = masked_scores(queries, keys, visible, bias, scale, PRECISION)
        weights, largest, total, decay = softmax_step(scores, largest, total)
        sums = sums * decay[:, None] + multiply(weights, values, PRECISION)
    total = tl.where(valid, total, 1.0)
    number = _number(position, head, heads, plan[0])
    store_tokens(output, number * HEAD_DIM, valid, sums / total[:, None], HEAD_DIM, CHANNELS)
    tl.store(logsumexp + number, (largest + tl.log2(total)) * LN_2, mask=valid)


@triton.jit
def backward_query_kernel(
    query,
    key,
    value,
    table,
    grad_output,
    output,
    logsumexp,
    delta,
    grad_query,
    grad_table,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    plan,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of queries, and delta, the sum of output times its gradient.

    NEEDS[3] adds the gradient of the table to one of SLICES copies.
    """
    head, group, first = _program(heads, plan, TILE)
    length = group[2]
    if not _before(first, length):
        return
    places = _places(tl.arange(0, BLOCK), first, TILE)
    valid = _before(places, length)
    position = _position(places, group, plan)
    number = _number(position, head, heads, plan[0])
    grads = load_tokens(grad_output, _rows(position, head, grad_strides), valid, HEAD_DIM, CHANNELS)
    outputs = load_tokens(output, number * HEAD_DIM, valid, HEAD_DIM, CHANNELS)
    deltas = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + number, deltas, mask=valid)
    if NEEDS[0] or NEEDS[3]:
        copy = tl.program_id(0) // heads % SLICES * heads + head
        queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS)
        statistics = load_logsumexp(logsumexp, number, valid)
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        start, stop = _box_of_keys(first, length, TILE, KERNEL, STRIDE, CAUSAL)
        steps = _steps(start, stop, BOX)
        for step in range(0, steps[0] * steps[1] * steps[2]):
            key_places = _places(tl.arange(0, BLOCK), _box(step, steps, start, BOX), BOX)
            key_valid = _before(key_places, stop)
            key_position = _position(key_places, group, plan)
            keys = load_tokens(key, _rows(key_position, head, key_strides), key_valid, HEAD_DIM, CHANNELS)
            values = load_tokens(value, _rows(key_position, head, value_strides), key_valid, HEAD_DIM, CHANNELS)
            of_query, of_key = _rows_of(places), _columns_of(key_places)
            visible = _visible(of_query, of_key, length, KERNEL, STRIDE, CAUSAL, RANK) & valid[:, None]
            bias = _bias(table, _entry(of_query, of_key, head, KERNEL, RANK), visible, HAS_BIAS)
            scores = masked_scores(queries, keys, visible, bias, scale, PRECISION)
            of_weights = multiply(grads, tl.trans(values), PRECISION)
            _, of_scores = gradient_of_scores(scores, statistics[:, None], visible, of_weights, deltas[:, None])
            if NEEDS[3]:
                entry = _entry(of_query, of_key, copy, KERNEL, RANK)
                tl.atomic_add(grad_table + entry, of_scores, mask=visible, sem="relaxed")
            if NEEDS[0]:
                sums += multiply(of_scores, keys, PRECISION)
        if NEEDS[0]:
            store_tokens(grad_query, number * HEAD_DIM, valid, sums * scale, HEAD_DIM, CHANNELS)


@triton.jit
def backward_key_kernel(
    query,
    key,
    value,
    table,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    plan,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of keys and values. Scores have keys as rows."""
    head, group, first = _program(heads, plan, TILE)
    length = group[2]
    if not _before(first, length):
        return
    places = _places(tl.arange(0, BLOCK), first, TILE)
    valid = _before(places, length)
    position = _position(places, group, plan)
    keys = load_tokens(key, _rows(position, head, key_strides), valid, HEAD_DIM, CHANNELS)
    values = load_tokens(value, _rows(position, head, value_strides), valid, HEAD_DIM, CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    start, stop = _box_of_queries(first, length, TILE, KERNEL, STRIDE, CAUSAL)
    steps = _steps(start, stop, BOX)
    for step in range(0, steps[0] * steps[1] * steps[2]):
        query_places = _places(tl.arange(0, BLOCK), _box(step, steps, start, BOX), BOX)
        query_valid = _before(query_places, stop)
        query_position = _position(query_places, group, plan)
        number = _number(query_position, head, heads, plan[0])
        queries = load_tokens(query, _rows(query_position, head, query_strides), query_valid, HEAD_DIM, CHANNELS)
        grads = load_tokens(grad_output, _rows(query_position, head, grad_strides), query_valid, HEAD_DIM, CHANNELS)
        statistics = load_logsumexp(logsumexp, number, query_valid)
        deltas = tl.load(delta + number, mask=query_valid, other=0.0)
        of_query, of_key = _columns_of(query_places), _rows_of(places)
        visible = (
            _visible(of_query, of_key, length, KERNEL, STRIDE, CAUSAL, RANK) & query_valid[None, :] & valid[:, None]
        )
        bias = _bias(table, _entry(of_query, of_key, head, KERNEL, RANK), visible, HAS_BIAS)
        scores = masked_scores(keys, queries, visible, bias, scale, PRECISION)
        of_weights = multiply(values, tl.trans(grads), PRECISION)
        weights, of_scores = gradient_of_scores(scores, statistics[None, :], visible, of_weights, deltas[None, :])
        if NEEDS[1]:
            of_keys += multiply(of_scores, queries, PRECISION)
        if NEEDS[2]:
            of_values += multiply(weights, grads, PRECISION)
    row = _number(position, head, heads, plan[0]) * HEAD_DIM
    if NEEDS[1]:
        store_tokens(grad_key, row, valid, of_keys * scale, HEAD_DIM, CHANNELS)
    if NEEDS[2]:
        store_tokens(grad_value, row, valid, of_values, HEAD_DIM, CHANNELS)


@triton.jit
def backward_bias_kernel(
    query,
    key,
    value,
    table,
    grad_output,
    logsumexp,
    delta,
    grad_table,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    plan,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The share of a tile of queries in the gradient of the table, offset by offset and without atomics."""
    ROWS: tl.constexpr = 2 * KERNEL[1] - 1
    COLUMNS: tl.constexpr = 2 * KERNEL[2] - 1
    ENTRIES: tl.constexpr = (2 * KERNEL[0] - 1) * ROWS * COLUMNS
    head, group, first = _program(heads, plan, TILE)
    length = group[2]
    places = _places(tl.arange(0, BLOCK), first, TILE)
    valid = _before(places, length)
    position = _position(places, group, plan)
    number = _number(position, head, heads, plan[0])
    queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS).to(tl.float32)
    grads = load_tokens(grad_output, _rows(position, head, grad_strides), valid, HEAD_DIM, CHANNELS).to(tl.float32)
    statistics = load_logsumexp(logsumexp, number, valid)
    deltas = tl.load(delta + number, mask=valid, other=0.0)
    for entry in range(0, ENTRIES):
        z = places[0] + entry // (ROWS * COLUMNS) - (KERNEL[0] - 1)
        y = places[1] + entry // COLUMNS % ROWS - (KERNEL[1] - 1)
        key_places = (z, y, places[2] + entry % COLUMNS - (KERNEL[2] - 1))
        visible = _visible(places, key_places, length, KERNEL, STRIDE, CAUSAL, RANK) & valid
        key_position = _position(key_places, group, plan)
        keys = load_tokens(key, _rows(key_position, head, key_strides), visible, HEAD_DIM, CHANNELS)
        values = load_tokens(value, _rows(key_position, head, value_strides), visible, HEAD_DIM, CHANNELS)
        bias = tl.load(table + head * ENTRIES + entry).to(tl.float32)
        scores = (tl.sum(queries * keys.to(tl.float32), 1) * scale + bias) * LOG2_E
        of_weights = tl.sum(grads * values.to(tl.float32), 1)
        _, of_scores = gradient_of_scores(scores, statistics, visible, of_weights, deltas)
        tl.store(grad_table + tl.program_id(0).to(tl.int64) * ENTRIES + entry, tl.sum(of_scores, 0))


class _Call:
    """What the launches of one call share."""

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
        self.query = query
        self.batch, *size, self.heads, self.head_dim = query.shape
        self.rank = len(size)
        options = neighborhood_options(self.rank, kernel_size, stride, dilation, is_causal)
        self.size = self._three(size, 1)
        self.kernel, self.stride, self.dilation = (self._three(option, 1) for option in options[:3])
        self.table = None if relative_position_bias is None else relative_position_bias.contiguous()
        self.arguments = {
            "table": self.table,
            "heads": self.heads,
            "scale": float(self.head_dim**-0.5 if scale is None else scale),
            "RANK": self.rank,
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "CAUSAL": self._three(options[3], False),
            "HEAD_DIM": self.head_dim,
            "CHANNELS": padded_channels(self.head_dim),
        }
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            self.add_map(name, f"{name}_strides", tensor)

    def _three(self, values: Sequence, filling) -> tuple:
        return (filling,) * (3 - self.rank) + tuple(values)

    def add_map(self, name: str, strides_name: str, tensor: Tensor) -> None:
        tensor = adjacent_channels(tensor)
        batch, *spatial, heads, _ = tensor.stride()
        self.arguments[name] = tensor
        self.arguments[strides_name] = (batch, *self._three(spatial, 0), heads)

    def parameters(self, name: str) -> Parameters:
        return launch_parameters(f"neighborhood_{name}", self.query, padded_channels(self.head_dim))

    def tiling(self, parameters: Parameters) -> tuple[tuple, tuple]:
        """Extent of a tile, and number of tiles along each axis of the longest group."""
        tile = TILES[self.rank][parameters.block]
        axes = zip(self.size, self.dilation, tile, strict=True)
        return tile, tuple(triton.cdiv(triton.cdiv(size, step), extent) for size, step, extent in axes)

    def programs(self, parameters: Parameters) -> int:
        return self.batch * math.prod(self.dilation) * math.prod(self.tiling(parameters)[1]) * self.heads

    def submit(self, kernel, parameters: Parameters, **arguments) -> None:
        tile, tiles = self.tiling(parameters)
        plan = (self.size, self.dilation, tiles)
        programs = self.programs(parameters)
        submit(
            kernel, programs, parameters, **self.arguments, plan=plan, TILE=tile, BLOCK=parameters.block, **arguments
        )

    def products(self, parameters: Parameters) -> dict:
        """Arguments of the kernels that go through boxes with matrix products."""
        tile, _ = self.tiling(parameters)
        across = [triton.next_power_of_2(extent + size - 1) for extent, size in zip(tile, self.kernel, strict=True)]
        columns = min(across[2], max(16, tile[2]))
        rows = min(across[1], parameters.block // columns)
        box = (parameters.block // (rows * columns), rows, columns)
        return {"BOX": box, "HAS_BIAS": self.table is not None, "PRECISION": precision(self.query.dtype)}


def refuse(query: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors(query)


def forward(query: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    call = _Call(query, *arguments)
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    parameters = call.parameters("forward")
    call.submit(forward_kernel, parameters, output=output, logsumexp=logsumexp, **call.products(parameters))
    return output, logsumexp


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], query: Tensor, *arguments
) -> list[Tensor]:
    """Gradients of query, key, value and the bias table, those that are needed."""
    call = _Call(query, *arguments)
    call.add_map("grad_output", "grad_strides", grad_output)
    gradients = [query.new_empty(query.shape) if needed else None for needed in needs_gradient[:3]]
    of_query, of_key, of_value = gradients
    statistics = {"logsumexp": logsumexp, "delta": torch.empty_like(logsumexp)}
    needs_query, needs_key, needs_value, needs_bias = needs_gradient
    atomic = needs_bias and not torch.are_deterministic_algorithms_enabled()
    of_table = query.new_zeros((SLICES, *call.table.shape), dtype=torch.float32) if atomic else None
    parameters = call.parameters("backward_query")
    call.submit(
        backward_query_kernel,
        parameters,
        output=output.contiguous(),
        grad_query=of_query,
        grad_table=of_table,
        NEEDS=(needs_query, False, False, atomic),
        SLICES=SLICES,
        **statistics,
        **call.products(parameters),
    )
    if needs_key or needs_value:
        parameters = call.parameters("backward_key")
        products = call.products(parameters)
        needs = (False, needs_key, needs_value, False)
        call.submit(
            backward_key_kernel, parameters, grad_key=of_key, grad_value=of_value, NEEDS=needs, **statistics, **products
        )
    if needs_bias:
        gradients.append(of_table.sum(0) if atomic else _backward_bias(call, statistics))
    return [gradient for gradient in gradients if gradient is not None]


def _backward_bias(call: _Call, statistics: dict[str, Tensor]) -> Tensor:
    parameters = call.parameters("backward_bias")
    groups = call.programs(parameters) // call.heads
    partial = call.query.new_empty((groups, *call.table.shape), dtype=torch.float32)
    call.submit(backward_bias_kernel, parameters, grad_table=partial, **statistics)
    return partial.sum(0)
