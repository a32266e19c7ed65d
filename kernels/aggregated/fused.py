"""Aggregated attention in Triton: a tile of queries goes through the pooled keys with matrix products, and through its
neighbours one slot of the window at a time, channel by channel. A product with the box of keys around the tile would
compute fourteen scores for each that counts.

A program owns a tile of queries, or of keys, or a block of pooled keys, for one head. Tiles are read again for each
slot, from the cache; nothing is unfolded. Gradients of pooled keys and of biases are sums over many tiles or images:
programs leave partial sums in float32, which are added in a fixed order. There are no atomics.
"""

from typing import NamedTuple, Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Parameters
from ..triton_common import (
    LOG2_E,
    Call,
    Tokens,
    as_tokens,
    attend,
    gradient_of_pairs,
    gradient_of_scores,
    load_logsumexp,
    load_map,
    load_maps,
    load_statistics,
    multiply,
    refuse_tensors,
    softmax_step,
    start_softmax,
    store_attention,
    store_map,
    token_pointers,
)

PROGRAMS = 1024
"""About seven on each multiprocessor of a large GPU: sums are cut into parts until there are as many programs."""


class Bias(NamedTuple):
    """The pooled bias as kernels take it, with its strides of (heads, tokens, pooled)."""

    pointer: Tensor
    strides: tuple[int, int, int]


@triton.jit
def _program(heads, plan, TILE: tl.constexpr):
    """What a program owns: a head, and the tokens of a tile of an image as positions and whether there is a token."""
    tiles = plan[1]
    index = tl.program_id(0) // heads
    y, x, valid = _tile(index % (tiles[0] * tiles[1]), plan, TILE)
    return tl.program_id(0) % heads, (index // (tiles[0] * tiles[1]), y, x), valid


@triton.jit
def _tile(index, plan, TILE: tl.constexpr):
    """Rows and columns of the tokens of a tile, and which of them the map has."""
    size, tiles = plan
    slot = tl.arange(0, TILE[0] * TILE[1])
    y = index // tiles[1] * TILE[0] + slot // TILE[1]
    x = index % tiles[1] * TILE[1] + slot % TILE[1]
    return y, x, _inside(y, x, size)


@triton.jit
def _inside(y, x, size):
    return (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])


@triton.jit
def _move(position, slot, size, valid, DIRECTION: tl.constexpr, WINDOW: tl.constexpr):
    """From queries to their keys in a slot of the window (DIRECTION 1), or back (-1); which of them the map has."""
    y = position[1] + (slot // WINDOW - WINDOW // 2) * DIRECTION
    x = position[2] + (slot % WINDOW - WINDOW // 2) * DIRECTION
    return (position[0], y, x), valid & _inside(y, x, size)


@triton.jit
def _local_scores(queries, keys, visible, bias, head, slot, scale, WINDOW: tl.constexpr):
    """Scores in base 2 of each query with one key, -inf where it does not see it."""
    scores = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1) * (scale * LOG2_E)
    if bias is not None:
        scores += tl.load(bias + head * (WINDOW * WINDOW) + slot).to(tl.float32) * LOG2_E
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _value_weights(value_weights, position, head, slot, valid):
    pointers = token_pointers(value_weights, position, head) + slot
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _load_pooled(
    first, second, block, pooled, image, head, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr
):
    """A block of pooled keys and values, with their slots and whether there is a token."""
    slot = block * BLOCK + tl.arange(0, BLOCK)
    keys, values = load_maps(first, second, (image, slot), head, slot < pooled, HEAD_DIM, CHANNELS)
    return slot, slot < pooled, keys, values


@triton.jit
def _pooled_bias(bias, head, token, slot, visible):
    """In base 2, of tokens of the map and pooled tokens, which come with the other's axis put in."""
    result = 0.0
    if bias is not None:
        offset = tl.cast(head, tl.int64) * bias.strides[0] + token.to(tl.int64) * bias.strides[1]
        offset += slot.to(tl.int64) * bias.strides[2]
        result = tl.load(bias.pointer + offset, mask=visible, other=0.0).to(tl.float32) * LOG2_E
    return result


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    pooled_key,
    pooled_value,
    local_bias,
    pooled_bias,
    value_weights,
    output,
    logsumexp,
    plan,
    pooled,
    heads,
    scale,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    size = plan[0]
    head, position, valid = _program(heads, plan, TILE)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    token = position[1] * size[1] + position[2]
    state = start_softmax(BLOCK, CHANNELS)
    for block in range(0, tl.cdiv(pooled, BLOCK)):
        cell, seen, keys, values = _load_pooled(
            pooled_key, pooled_value, block, pooled, position[0], head, BLOCK, HEAD_DIM, CHANNELS
        )
        visible = valid[:, None] & seen[None, :]
        bias = _pooled_bias(pooled_bias, head, token[:, None], cell[None, :], visible)
        state = attend(state, queries, keys, values, visible, bias, scale, PRECISION)
    largest, total, sums = state
    beside = tl.zeros([BLOCK, CHANNELS], tl.float32)  # what value_weights add, outside the softmax
    for slot in range(0, WINDOW * WINDOW):
        neighbour, inside = _move(position, slot, size, valid, 1, WINDOW)
        keys, values = load_maps(key, value, neighbour, head, inside, HEAD_DIM, CHANNELS)
        scores = _local_scores(queries, keys, inside, local_bias, head, slot, scale, WINDOW)
        weights, largest, total, decay = softmax_step(scores[:, None], largest, total)
        sums = sums * decay[:, None] + weights * values.to(tl.float32)
        if value_weights is not None:
            more = _value_weights(value_weights, position, head, slot, inside)
            beside += more[:, None] * values.to(tl.float32)
    sums += beside * total[:, None]
    store_attention((largest, total, sums), output, logsumexp, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def backward_query_kernel(
    query,
    key,
    value,
    pooled_key,
    pooled_value,
    local_bias,
    pooled_bias,
    grad_output,
    logsumexp,
    delta,
    grad_query,
    grad_value_weights,
    partial,
    plan,
    pooled,
    heads,
    scale,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of queries and of its value weights, and its share in that of the local bias.

    Also delta, the mean of the gradients of the softmax weights. The sum of output times gradient would not do: with
    value_weights it is another number, and the rounding of the output does not cancel where a weight is near 1. The sum
    of the weights, which delta is divided by, is 1 but for the rounding of the logsumexp.
    """
    size = plan[0]
    head, position, valid = _program(heads, plan, TILE)
    queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
    statistics = load_logsumexp(logsumexp, position, head, valid)
    token = position[1] * size[1] + position[2]
    deltas = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(0, tl.cdiv(pooled, BLOCK)):
        cell, seen, keys, values = _load_pooled(
            pooled_key, pooled_value, block, pooled, position[0], head, BLOCK, HEAD_DIM, CHANNELS
        )
        visible = valid[:, None] & seen[None, :]
        bias = _pooled_bias(pooled_bias, head, token[:, None], cell[None, :], visible)
        weights, products = gradient_of_pairs(
            queries, keys, grads, values, (statistics[:, None], 0.0), visible, bias, scale, PRECISION
        )
        deltas += tl.sum(products, 1)
        total += tl.sum(weights, 1)
    for slot in range(0, WINDOW * WINDOW):
        neighbour, inside = _move(position, slot, size, valid, 1, WINDOW)
        keys, values = load_maps(key, value, neighbour, head, inside, HEAD_DIM, CHANNELS)
        scores = _local_scores(queries, keys, inside, local_bias, head, slot, scale, WINDOW)
        of_weights = tl.sum(grads.to(tl.float32) * values.to(tl.float32), 1)
        weight, product = gradient_of_scores(scores, statistics, inside, of_weights, 0.0)
        deltas += product
        total += weight
        if grad_value_weights is not None:
            element = grad_value_weights.pointer.dtype.element_ty
            tl.store(token_pointers(grad_value_weights, position, head) + slot, of_weights.to(element), mask=valid)
    deltas = deltas / tl.where(total > 0, total, 1.0)
    tl.store(token_pointers(delta, position, head), deltas, mask=valid)
    sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
    if grad_query is not None:
        for block in range(0, tl.cdiv(pooled, BLOCK)):
            cell, seen, keys, values = _load_pooled(
                pooled_key, pooled_value, block, pooled, position[0], head, BLOCK, HEAD_DIM, CHANNELS
            )
            visible = valid[:, None] & seen[None, :]
            bias = _pooled_bias(pooled_bias, head, token[:, None], cell[None, :], visible)
            _, of_scores = gradient_of_pairs(
                queries, keys, grads, values, (statistics[:, None], deltas[:, None]), visible, bias, scale, PRECISION
            )
            sums += multiply(of_scores, keys, PRECISION)
    if grad_query is not None or partial is not None:
        for slot in range(0, WINDOW * WINDOW):
            neighbour, inside = _move(position, slot, size, valid, 1, WINDOW)
            keys, values = load_maps(key, value, neighbour, head, inside, HEAD_DIM, CHANNELS)
            scores = _local_scores(queries, keys, inside, local_bias, head, slot, scale, WINDOW)
            of_weights = tl.sum(grads.to(tl.float32) * values.to(tl.float32), 1)
            _, of_scores = gradient_of_scores(scores, statistics, inside, of_weights, deltas)
            sums += of_scores[:, None] * keys.to(tl.float32)
            if partial is not None:
                share = tl.program_id(0).to(tl.int64) * (WINDOW * WINDOW) + slot
                tl.store(partial + share, tl.sum(of_scores, 0))
    if grad_query is not None:
        store_map(grad_query, sums * scale, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def backward_key_kernel(
    query,
    key,
    value,
    local_bias,
    value_weights,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    plan,
    heads,
    scale,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of a tile of keys and values of the map: in each slot of the windows a key has one query."""
    size = plan[0]
    head, position, valid = _program(heads, plan, TILE)
    keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for slot in range(0, WINDOW * WINDOW):
        asking, inside = _move(position, slot, size, valid, -1, WINDOW)
        queries, grads = load_maps(query, grad_output, asking, head, inside, HEAD_DIM, CHANNELS)
        statistics, deltas = load_statistics(logsumexp, delta, asking, head, inside)
        scores = _local_scores(queries, keys, inside, local_bias, head, slot, scale, WINDOW)
        of_weights = tl.sum(grads.to(tl.float32) * values.to(tl.float32), 1)
        weights, of_scores = gradient_of_scores(scores, statistics, inside, of_weights, deltas)
        if grad_key is not None:
            of_keys += of_scores[:, None] * queries.to(tl.float32)
        if grad_value is not None:
            if value_weights is not None:
                weights += _value_weights(value_weights, asking, head, slot, inside)
            of_values += weights[:, None] * grads.to(tl.float32)
    if grad_key is not None:
        store_map(grad_key, of_keys * scale, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, of_values, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def backward_pooled_kernel(
    query,
    pooled_key,
    pooled_value,
    pooled_bias,
    grad_output,
    logsumexp,
    delta,
    partial_key,
    partial_value,
    plan,
    batch,
    pooled,
    tiles_per_program,
    heads,
    scale,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The share of some tiles of queries in the gradients of a block of pooled keys and values. Keys are the rows."""
    size, tiles = plan
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(pooled, BLOCK)
    image = tl.program_id(0) // (heads * blocks) % batch
    first = tl.program_id(0) // (heads * blocks * batch) * tiles_per_program
    slot, seen, keys, values = _load_pooled(
        pooled_key, pooled_value, tl.program_id(0) // heads % blocks, pooled, image, head, BLOCK, HEAD_DIM, CHANNELS
    )
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for index in range(first, tl.minimum(first + tiles_per_program, tiles[0] * tiles[1])):
        y, x, valid = _tile(index, plan, TILE)
        position = (image, y, x)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        statistics, deltas = load_statistics(logsumexp, delta, position, head, valid)
        token = y * size[1] + x
        visible = seen[:, None] & valid[None, :]
        bias = _pooled_bias(pooled_bias, head, token[None, :], slot[:, None], visible)
        weights, of_scores = gradient_of_pairs(
            keys, queries, values, grads, (statistics[None, :], deltas[None, :]), visible, bias, scale, PRECISION
        )
        if partial_key is not None:
            of_keys += multiply(of_scores, queries, PRECISION)
        if partial_value is not None:
            of_values += multiply(weights, grads, PRECISION)
    position = (tl.program_id(0) // (heads * blocks), slot)  # each part of the tiles has an image of its own
    if partial_key is not None:
        store_map(partial_key, of_keys * scale, position, head, seen, HEAD_DIM, CHANNELS)
    if partial_value is not None:
        store_map(partial_value, of_values, position, head, seen, HEAD_DIM, CHANNELS)


@triton.jit
def backward_bias_kernel(
    query,
    pooled_key,
    pooled_value,
    pooled_bias,
    grad_output,
    logsumexp,
    delta,
    partial,
    plan,
    batch,
    pooled,
    images_per_program,
    heads,
    scale,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the scores of a tile of queries with a block of pooled keys, summed over some images."""
    size, tiles = plan
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(pooled, BLOCK)
    block = tl.program_id(0) // heads % blocks
    y, x, valid = _tile(tl.program_id(0) // (heads * blocks) % (tiles[0] * tiles[1]), plan, TILE)
    chunk = tl.program_id(0) // (heads * blocks * tiles[0] * tiles[1])
    token = y * size[1] + x
    slot = block * BLOCK + tl.arange(0, BLOCK)
    visible = valid[:, None] & (slot < pooled)[None, :]
    bias = _pooled_bias(pooled_bias, head, token[:, None], slot[None, :], visible)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = chunk * images_per_program
    for image in range(first, tl.minimum(first + images_per_program, batch)):
        position = (tl.cast(image, tl.int64), y, x)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        _, _, keys, values = _load_pooled(
            pooled_key, pooled_value, block, pooled, position[0], head, BLOCK, HEAD_DIM, CHANNELS
        )
        statistics, deltas = load_statistics(logsumexp, delta, position, head, valid)
        _, of_scores = gradient_of_pairs(
            queries, keys, grads, values, (statistics[:, None], deltas[:, None]), visible, bias, scale, PRECISION
        )
        sums += of_scores
    row = (chunk * heads + head).to(tl.int64) * (size[0] * size[1]) + token
    tl.store(partial + row[:, None] * pooled + slot[None, :], sums, mask=visible)


class _Call(Call):
    """What the launches of one call share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        window_size: int,
        local_bias: Optional[Tensor],
        pooled_bias: Optional[Tensor],
        value_weights: Optional[Tensor],
        scale: Optional[float],
    ) -> None:
        super().__init__("aggregated", query, key, value, scale)
        self.window, self.tokens_of_map = window_size, self.size[0] * self.size[1]
        self.arguments.update(
            pooled_key=self.pooled_tokens(pooled_key),
            pooled_value=self.pooled_tokens(pooled_value),
            local_bias=None if local_bias is None else local_bias.contiguous(),
            pooled_bias=None,
            value_weights=None if value_weights is None else self.tokens(value_weights),
            WINDOW=window_size,
            batch=self.batch,
        )
        self.pooled = self.arguments["pooled"] = self.arguments["pooled_key"].pointer.shape[1]
        if pooled_bias is not None:
            pooled_bias = pooled_bias.expand(self.heads, self.tokens_of_map, self.pooled)
            self.arguments["pooled_bias"] = Bias(pooled_bias, pooled_bias.stride())

    def pooled_tokens(self, tensor: Tensor) -> Tokens:
        return as_tokens(tensor.flatten(1, -3), 1)

    def tiling(self, parameters: Parameters) -> tuple[tuple[int, int], tuple[int, int]]:
        """Extent of a tile, nearly a square where the map allows it, and number of tiles along each axis."""
        rows = min(2 ** ((parameters.block.bit_length() - 1) // 2), triton.next_power_of_2(self.size[0]))
        tile = (rows, parameters.block // rows)
        return tile, tuple(triton.cdiv(size, extent) for size, extent in zip(self.size, tile, strict=True))

    def tiles(self, parameters: Parameters) -> int:
        """Of one image."""
        rows, columns = self.tiling(parameters)[1]
        return rows * columns

    def blocks(self, parameters: Parameters) -> int:
        """Of pooled keys."""
        return triton.cdiv(self.pooled, parameters.block)

    def submit(self, kernel, programs: int, parameters: Parameters, **arguments) -> None:
        tile, tiles = self.tiling(parameters)
        super().submit(kernel, programs, parameters, plan=(self.size, tiles), TILE=tile, **arguments)

    def partial(self, *shape: int) -> Tensor:
        """Space for sums that are added later."""
        return self.query.new_empty(shape, dtype=torch.float32)


def _share(items: int, programs: int) -> tuple[int, int]:
    """Items that one program sums, where each item takes `programs` of them, and the number of parts that makes."""
    share = min(items, max(1, items * programs // PROGRAMS))
    return share, triton.cdiv(items, share)


def refuse(query: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors(query)


def forward(query: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    call = _Call(query, *arguments)
    outputs = call.start_forward()
    parameters = call.parameters("forward")
    call.submit(forward_kernel, call.batch * call.tiles(parameters) * call.heads, parameters)
    return outputs


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], query: Tensor, *arguments
) -> list[Tensor]:
    """Gradients of the tensor arguments in their order, those that are needed."""
    call = _Call(query, *arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient)
    pooled_shape, pooled_bias, value_weights = arguments[2].shape, arguments[6], arguments[7]
    of_value_weights = value_weights.new_empty(value_weights.shape) if needs_gradient[7] else None
    of_local_bias = _backward_query(call, of_value_weights, needs_gradient[5])
    if needs_gradient[1] or needs_gradient[2]:
        parameters = call.parameters("backward_key")
        call.submit(backward_key_kernel, call.batch * call.tiles(parameters) * call.heads, parameters)
    for of_pooled in _backward_pooled(call, *needs_gradient[3:5]):
        gradients.append(None if of_pooled is None else of_pooled.view(pooled_shape))
    gradients.append(of_local_bias)
    gradients.append(_backward_bias(call).sum_to_size(pooled_bias.shape) if needs_gradient[6] else None)
    gradients.append(of_value_weights)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_query(call: _Call, of_value_weights: Optional[Tensor], needs_bias: bool) -> Optional[Tensor]:
    """Fills delta and the gradients of query and value weights; returns that of the local bias, if it is needed."""
    parameters = call.parameters("backward_query")
    tiles = call.batch * call.tiles(parameters)
    partial = call.partial(tiles, call.heads, call.window**2) if needs_bias else None
    of_weights = None if of_value_weights is None else call.tokens(of_value_weights)
    call.submit(backward_query_kernel, tiles * call.heads, parameters, grad_value_weights=of_weights, partial=partial)
    return partial.sum(0) if needs_bias else None


def _backward_pooled(call: _Call, needs_key: bool, needs_value: bool) -> list[Optional[Tensor]]:
    """Gradients (batch, pooled, heads, head_dim) of the pooled keys and values, those that are needed."""
    if not (needs_key or needs_value):
        return [None, None]
    parameters = call.parameters("backward_pooled")
    programs = call.batch * call.blocks(parameters) * call.heads
    share, chunks = _share(call.tiles(parameters), programs)
    shape = (chunks, call.batch, call.pooled, call.heads, call.head_dim)
    partials = [call.partial(*shape) if needed else None for needed in (needs_key, needs_value)]
    sums = (None if partial is None else as_tokens(partial.flatten(0, 1), 1) for partial in partials)
    outputs = dict(zip(("partial_key", "partial_value"), sums, strict=True))
    call.submit(backward_pooled_kernel, chunks * programs, parameters, tiles_per_program=share, **outputs)
    return [None if partial is None else partial.sum(0) for partial in partials]


def _backward_bias(call: _Call) -> Tensor:
    """Gradient (heads, tokens, pooled) of the pooled bias."""
    parameters = call.parameters("backward_bias")
    programs = call.tiles(parameters) * call.blocks(parameters) * call.heads
    share, chunks = _share(call.batch, programs)
    partial = call.partial(chunks, call.heads, call.tokens_of_map, call.pooled)
    call.submit(backward_bias_kernel, chunks * programs, parameters, partial=partial, images_per_program=share)
    return partial.sum(0)
