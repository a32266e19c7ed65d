"""Halo attention in Triton: blocks of queries read their windows from the map in place, without a copy of the halo.

Forward and gradient of the query: a program owns queries of one block, for one head, and goes through the cells of its
window. Cells outside the map are zeros, or have no weight. Gradient of key and value: a program owns a tile of the map
and goes through the queries of all blocks whose windows meet it. So every sum has a fixed order, without atomics.
"""

from typing import Optional, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    LARGEST_HEAD_DIM,
    LOG2_E,
    Call,
    attend,
    gradient_of_pairs,
    load_logsumexp,
    load_map,
    load_statistics,
    multiply,
    refuse_tensors,
    start_softmax,
    store_attention,
    store_delta,
    store_map,
)

TILES = {64: (8, 8), 32: (4, 8), 16: (4, 4)}
"""Extent of a tile of keys by its number of tokens."""
MOST_QUERIES = 64


@triton.jit
def _program(heads, blocks, PARTS: tl.constexpr):
    """What a program owns: head, part of a block, and block (image, row, column)."""
    rest = tl.program_id(0) // (heads * PARTS)
    block = (rest // (blocks[0] * blocks[1]), rest // blocks[1] % blocks[0], rest % blocks[1])
    return tl.program_id(0) % heads, tl.program_id(0) // heads % PARTS, block


@triton.jit
def _queries(slot, block, SIDES: tl.constexpr):
    """Positions of the queries of a block, and which slots hold one."""
    side: tl.constexpr = SIDES[0]
    image, row, column = block
    return (image, row * side + slot // side, column * side + slot % side), slot < side * side


@triton.jit
def _window(slot, block, size, SIDES: tl.constexpr, MASK_PADDING: tl.constexpr):
    """Cells of a window: row and column in it, position in the map, which lie inside the map, which take part."""
    side: tl.constexpr = SIDES[1] + 2 * SIDES[2]
    image, row, column = block
    cell = (slot // side, slot % side)
    y = row * SIDES[1] - SIDES[2] + cell[0]
    x = column * SIDES[1] - SIDES[2] + cell[1]
    visible = slot < side * side
    inside = visible & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    if MASK_PADDING:
        visible = inside
    return cell, (image, y, x), inside, visible


@triton.jit
def _load_logits(logits, position, head, valid, SIDES: tl.constexpr, LOGITS: tl.constexpr):
    """(queries, LOGITS), padded with zeros, or 0.0 where there are none."""
    tile = 0.0
    if logits is not None:
        tile = load_map(logits, position, head, valid, SIDES[1] + 2 * SIDES[2], LOGITS)
        dtype: tl.constexpr = tl.float32 if tile.dtype == tl.float64 else tile.dtype
        # minus infinity would become nan in a matrix product
        lowest: tl.constexpr = -65504.0 if dtype == tl.float16 else -3.0e38
        tile = tl.maximum(tile.to(tl.float32), lowest).to(dtype)
    return tile


@triton.jit
def _load_both(height, width, position, head, valid, SIDES: tl.constexpr, LOGITS: tl.constexpr):
    of_rows = _load_logits(height, position, head, valid, SIDES, LOGITS)
    return of_rows, _load_logits(width, position, head, valid, SIDES, LOGITS)


@triton.jit
def _member(cell, dtype: tl.constexpr, LOGITS: tl.constexpr):
    """One where a cell lies in a row of the window, or a column, (cells, LOGITS): to select and to sum as a product."""
    member = cell[:, None] == tl.arange(0, LOGITS)[None, :]
    return member.to(tl.float32).to(dtype)  # the interpreter knows no conversion of bool to bfloat16


@triton.jit
def _bias(height, width, tiles, cell, BY_KEY: tl.constexpr, LOGITS: tl.constexpr):
    """Relative logits in base 2 of the queries of two tiles and the cells; cells are rows if BY_KEY.

    They are selected by products with zeros and ones, which are exact and cheaper than a gather for each pair.
    """
    bias = 0.0
    if height is not None:
        bias += _select(tiles[0], cell[0], BY_KEY, LOGITS)
    if width is not None:
        bias += _select(tiles[1], cell[1], BY_KEY, LOGITS)
    return bias * LOG2_E


@triton.jit
def _select(tile, cell, BY_KEY: tl.constexpr, LOGITS: tl.constexpr):
    member = _member(cell, tile.dtype, LOGITS)
    return multiply(member, tl.trans(tile), "ieee") if BY_KEY else multiply(tile, tl.trans(member), "ieee")


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    height,
    width,
    output,
    logsumexp,
    plan,
    heads,
    scale,
    SIDES: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    LOGITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one part of the queries of a block, for one head."""
    CELLS: tl.constexpr = (SIDES[1] + 2 * SIDES[2]) * (SIDES[1] + 2 * SIDES[2])
    size, blocks = plan
    head, part, block = _program(heads, blocks, PARTS)
    position, valid = _queries(part * QUERIES + tl.arange(0, QUERIES), block, SIDES)
    logits = _load_both(height, width, position, head, valid, SIDES, LOGITS)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    state = start_softmax(QUERIES, VALUE_CHANNELS)
    for start in range(0, CELLS, BLOCK):
        cell, key_position, inside, taken = _window(start + tl.arange(0, BLOCK), block, size, SIDES, MASK_PADDING)
        keys = load_map(key, key_position, head, inside, HEAD_DIM, CHANNELS)
        values = load_map(value, key_position, head, inside, VALUE_DIM, VALUE_CHANNELS)
        visible = valid[:, None] & taken[None, :]
        bias = _bias(height, width, logits, cell, False, LOGITS)
        state = attend(state, queries, keys, values, visible, bias, scale, PRECISION)
    store_attention(state, output, logsumexp, position, head, valid, VALUE_DIM, VALUE_CHANNELS)


@triton.jit
def backward_query_kernel(
    query,
    key,
    value,
    height,
    width,
    grad_output,
    output,
    logsumexp,
    delta,
    grad_query,
    grad_height,
    grad_width,
    plan,
    heads,
    scale,
    SIDES: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    LOGITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of a part of the queries of a block and of their logits, and delta."""
    SIDE: tl.constexpr = SIDES[1] + 2 * SIDES[2]
    size, blocks = plan
    head, part, block = _program(heads, blocks, PARTS)
    position, valid = _queries(part * QUERIES + tl.arange(0, QUERIES), block, SIDES)
    grads = load_map(grad_output, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
    deltas = store_delta(delta, output, grads, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
    if grad_query is not None or grad_height is not None or grad_width is not None:
        logits = _load_both(height, width, position, head, valid, SIDES, LOGITS)
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        statistics = (load_logsumexp(logsumexp, position, head, valid)[:, None], deltas[:, None])
        of_queries = tl.zeros([QUERIES, CHANNELS], tl.float32)
        of_height = tl.zeros([QUERIES, LOGITS], tl.float32)
        of_width = tl.zeros([QUERIES, LOGITS], tl.float32)
        for start in range(0, SIDE * SIDE, BLOCK):
            cell, key_position, inside, taken = _window(start + tl.arange(0, BLOCK), block, size, SIDES, MASK_PADDING)
            keys = load_map(key, key_position, head, inside, HEAD_DIM, CHANNELS)
            values = load_map(value, key_position, head, inside, VALUE_DIM, VALUE_CHANNELS)
            visible = valid[:, None] & taken[None, :]
            bias = _bias(height, width, logits, cell, False, LOGITS)
            _, of_scores = gradient_of_pairs(queries, keys, grads, values, statistics, visible, bias, scale, PRECISION)
            if grad_query is not None:
                of_queries += multiply(of_scores, keys, PRECISION)
            if grad_height is not None:
                of_height += multiply(of_scores, _member(cell[0], keys.dtype, LOGITS), PRECISION)
            if grad_width is not None:
                of_width += multiply(of_scores, _member(cell[1], keys.dtype, LOGITS), PRECISION)
        if grad_query is not None:
            store_map(grad_query, of_queries * scale, position, head, valid, HEAD_DIM, CHANNELS)
        if grad_height is not None:
            store_map(grad_height, of_height, position, head, valid, SIDE, LOGITS)
        if grad_width is not None:
            store_map(grad_width, of_width, position, head, valid, SIDE, LOGITS)


@triton.jit
def _meeting(first, extent, length, count, SIDES: tl.constexpr):
    """The first block, along one axis, whose window meets the tokens from `first` on, and the one behind the last."""
    last = tl.minimum(first + extent, length) - 1
    # a quotient that rounds towards zero must not see a negative number
    start = tl.maximum(first - SIDES[2], 0) // SIDES[1]
    return start, tl.minimum((last + SIDES[2]) // SIDES[1] + 1, count)


@triton.jit
def backward_key_kernel(
    query,
    key,
    value,
    height,
    width,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    plan,
    tiles,
    heads,
    scale,
    SIDES: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    LOGITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of a tile of keys and values. Scores have keys as rows."""
    SIDE: tl.constexpr = SIDES[1] + 2 * SIDES[2]
    size, blocks = plan
    head, _, tile = _program(heads, tiles, 1)
    image = tile[0]
    slot = tl.arange(0, BLOCK)
    y = tile[1] * TILE[0] + slot // TILE[1]
    x = tile[2] * TILE[1] + slot % TILE[1]
    valid = (y < size[0]) & (x < size[1])
    keys = load_map(key, (image, y, x), head, valid, HEAD_DIM, CHANNELS)
    values = load_map(value, (image, y, x), head, valid, VALUE_DIM, VALUE_CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, VALUE_CHANNELS], tl.float32)
    top, bottom = _meeting(tile[1] * TILE[0], TILE[0], size[0], blocks[0], SIDES)
    left, right = _meeting(tile[2] * TILE[1], TILE[1], size[1], blocks[1], SIDES)
    for step in range(0, (bottom - top) * (right - left) * PARTS):
        block = (image, top + step // PARTS // (right - left), left + step // PARTS % (right - left))
        position, query_valid = _queries(step % PARTS * QUERIES + tl.arange(0, QUERIES), block, SIDES)
        row = y - block[1] * SIDES[1] + SIDES[2]
        column = x - block[2] * SIDES[1] + SIDES[2]
        seen = valid & (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
        queries = load_map(query, position, head, query_valid, HEAD_DIM, CHANNELS)
        grads = load_map(grad_output, position, head, query_valid, VALUE_DIM, VALUE_CHANNELS)
        of_rows, deltas = load_statistics(logsumexp, delta, position, head, query_valid)
        visible = seen[:, None] & query_valid[None, :]
        logits = _load_both(height, width, position, head, query_valid, SIDES, LOGITS)
        bias = _bias(height, width, logits, (row, column), True, LOGITS)
        weights, of_scores = gradient_of_pairs(
            keys, queries, values, grads, (of_rows[None, :], deltas[None, :]), visible, bias, scale, PRECISION
        )
        if grad_key is not None:
            of_keys += multiply(of_scores, queries, PRECISION)
        if grad_value is not None:
            of_values += multiply(weights, grads, PRECISION)
    if grad_key is not None:
        store_map(grad_key, of_keys * scale, (image, y, x), head, valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, of_values, (image, y, x), head, valid, VALUE_DIM, VALUE_CHANNELS)


class _Call(Call):
    """The blocks of one call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_size: int,
        halo_size: int,
        relative_height_logits: Optional[Tensor],
        relative_width_logits: Optional[Tensor],
        mask_padding: bool,
        scale: Optional[float],
    ) -> None:
        super().__init__("halo", query, key, value, scale)
        self.key_size = tuple(key.shape[1:3])
        self.blocks = tuple(size // block_size for size in self.key_size)
        self.side = self.size[0] // self.blocks[0]
        self.logits = (relative_height_logits, relative_width_logits)
        height, width = (None if tensor is None else self.tokens(tensor) for tensor in self.logits)
        self.arguments.update(
            height=height,
            width=width,
            plan=(self.key_size, self.blocks),
            SIDES=(self.side, block_size, halo_size),
            LOGITS=max(16, triton.next_power_of_2(block_size + 2 * halo_size)),
            MASK_PADDING=mask_padding,
        )

    def start(self, name: str, kernel, **arguments) -> None:
        """Start a kernel whose programs own queries."""
        parameters = self.parameters(name)
        queries, parts = self._share(parameters.block)
        programs = self.batch * self.blocks[0] * self.blocks[1] * parts * self.heads
        self.submit(kernel, programs, parameters, QUERIES=queries, PARTS=parts, **arguments)

    def start_by_key(self) -> None:
        parameters = self.parameters("backward_key")
        queries, parts = self._share(2 * parameters.block)
        tile = TILES[parameters.block]
        tiles = tuple(triton.cdiv(size, extent) for size, extent in zip(self.key_size, tile, strict=True))
        programs = self.batch * tiles[0] * tiles[1] * self.heads
        self.submit(backward_key_kernel, programs, parameters, tiles=tiles, TILE=tile, QUERIES=queries, PARTS=parts)

    def _share(self, most: int) -> tuple[int, int]:
        """Queries that a program takes at a time, and parts of a block that they make."""
        queries = min(most, MOST_QUERIES, max(16, triton.next_power_of_2(self.side**2)))
        return queries, triton.cdiv(self.side**2, queries)


def refuse(query: Tensor, key: Tensor, value: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    if value.shape[-1] > LARGEST_HEAD_DIM:
        return f"value_dim {value.shape[-1]} is above {LARGEST_HEAD_DIM}"
    return refuse_tensors(query)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    outputs = call.start_forward()
    call.start("forward", forward_kernel)
    return outputs


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], *arguments
) -> list[Tensor]:
    """Gradients of query, key, value and the relative logits, those that are needed."""
    call = _Call(*arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient)
    _, needs_key, needs_value, *of_logits = needs_gradient
    for name, logits, needed in zip(("grad_height", "grad_width"), call.logits, of_logits, strict=True):
        gradients.append(logits.new_empty(logits.shape) if needed else None)
        call.arguments[name] = call.tokens(gradients[-1]) if needed else None
    call.start("backward_query", backward_query_kernel)
    if needs_key or needs_value:
        call.start_by_key()
    return [gradient for gradient in gradients if gradient is not None]
