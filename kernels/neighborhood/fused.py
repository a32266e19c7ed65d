"""Neighborhood attention in Triton: a tile of queries attends to the box of keys around it, read from the map in place.

Maps of one and two axes are maps of three with leading axes of size 1. Places count inside a group of tokens `dilation`
apart, so a program knows no dilation beyond the address of a token. A tile of queries, or of keys, is owned by one
program for one head, which goes through the tokens that it meets box by box: gradients of query, key and value are sums
in a fixed order. The gradient of the bias table is added up with atomics; under torch.use_deterministic_algorithms a
kernel of its own goes through the offsets one by one, in a fixed order and with more work.
"""

import math
from typing import Any, Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import neighborhood_options
from ..launch import Parameters
from ..triton_common import (
    LOG2_E,
    Call,
    attend,
    gradient_of_pairs,
    gradient_of_scores,
    load_logsumexp,
    load_map,
    load_maps,
    load_statistics,
    multiply,
    refuse_tensors,
    start_softmax,
    store_attention,
    store_delta,
    store_map,
)
from .tiles import (
    as_columns,
    as_rows,
    before,
    block_of_tokens,
    box_at,
    box_of_keys,
    box_of_queries,
    box_steps,
    position_of,
    program_tile,
    table_entry,
    visible_pairs,
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
def _bias(table, query, key, head, visible, KERNEL: tl.constexpr, RANK: tl.constexpr):
    """In base 2."""
    bias = 0.0
    if table is not None:
        entry = table_entry(query, key, head, KERNEL, RANK)
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
    PRECISION: tl.constexpr,
):
    head, group, first = program_tile(heads, plan, TILE)
    length = group[2]
    if not before(first, length):
        return
    places, position, valid = block_of_tokens(first, length, group, plan, TILE, BLOCK)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    state = start_softmax(BLOCK, CHANNELS)
    start, stop = box_of_keys(first, length, TILE, KERNEL, STRIDE, CAUSAL)
    steps = box_steps(start, stop, BOX)
    for step in range(0, steps[0] * steps[1] * steps[2]):
        box = box_at(step, steps, start, BOX)
        key_places, key_position, key_valid = block_of_tokens(box, stop, group, plan, BOX, BLOCK)
        keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
        of_query, of_key = as_rows(places), as_columns(key_places)
        visible = visible_pairs(of_query, of_key, length, KERNEL, STRIDE, CAUSAL, RANK) & valid[:, None]
        bias = _bias(table, of_query, of_key, head, visible, KERNEL, RANK)
        state = attend(state, queries, keys, values, visible, bias, scale, PRECISION)
    store_attention(state, output, logsumexp, position, head, valid, HEAD_DIM, CHANNELS)


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
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of queries, and delta, the sum of output times its gradient.

    grad_table has SLICES copies of the table, to one of which a program adds.
    """
    head, group, first = program_tile(heads, plan, TILE)
    length = group[2]
    if not before(first, length):
        return
    places, position, valid = block_of_tokens(first, length, group, plan, TILE, BLOCK)
    grads = load_map(grad_output, position, head, valid, HEAD_DIM, CHANNELS)
    deltas = store_delta(delta, output, grads, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_query is not None or grad_table is not None:
        copy = tl.program_id(0) // heads % SLICES * heads + head
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        statistics = (load_logsumexp(logsumexp, position, head, valid)[:, None], deltas[:, None])
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        start, stop = box_of_keys(first, length, TILE, KERNEL, STRIDE, CAUSAL)
        steps = box_steps(start, stop, BOX)
        for step in range(0, steps[0] * steps[1] * steps[2]):
            box = box_at(step, steps, start, BOX)
            key_places, key_position, key_valid = block_of_tokens(box, stop, group, plan, BOX, BLOCK)
            keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
            of_query, of_key = as_rows(places), as_columns(key_places)
            visible = visible_pairs(of_query, of_key, length, KERNEL, STRIDE, CAUSAL, RANK) & valid[:, None]
            bias = _bias(table, of_query, of_key, head, visible, KERNEL, RANK)
            _, of_scores = gradient_of_pairs(queries, keys, grads, values, statistics, visible, bias, scale, PRECISION)
            if grad_table is not None:
                entry = table_entry(of_query, of_key, copy, KERNEL, RANK)
                tl.atomic_add(grad_table + entry, of_scores, mask=visible, sem="relaxed")
            if grad_query is not None:
                sums += multiply(of_scores, keys, PRECISION)
        if grad_query is not None:
            store_map(grad_query, sums * scale, position, head, valid, HEAD_DIM, CHANNELS)


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
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of keys and values. Scores have keys as rows."""
    head, group, first = program_tile(heads, plan, TILE)
    length = group[2]
    if not before(first, length):
        return
    places, position, valid = block_of_tokens(first, length, group, plan, TILE, BLOCK)
    keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    start, stop = box_of_queries(first, length, TILE, KERNEL, STRIDE, CAUSAL)
    steps = box_steps(start, stop, BOX)
    for step in range(0, steps[0] * steps[1] * steps[2]):
        box = box_at(step, steps, start, BOX)
        query_places, query_position, query_valid = block_of_tokens(box, stop, group, plan, BOX, BLOCK)
        queries, grads = load_maps(query, grad_output, query_position, head, query_valid, HEAD_DIM, CHANNELS)
        of_rows, deltas = load_statistics(logsumexp, delta, query_position, head, query_valid)
        of_query, of_key = as_columns(query_places), as_rows(places)
        visible = visible_pairs(of_query, of_key, length, KERNEL, STRIDE, CAUSAL, RANK)
        visible = visible & query_valid[None, :] & valid[:, None]
        bias = _bias(table, of_query, of_key, head, visible, KERNEL, RANK)
        weights, of_scores = gradient_of_pairs(
            keys, queries, values, grads, (of_rows[None, :], deltas[None, :]), visible, bias, scale, PRECISION
        )
        if grad_key is not None:
            of_keys += multiply(of_scores, queries, PRECISION)
        if grad_value is not None:
            of_values += multiply(weights, grads, PRECISION)
    if grad_key is not None:
        store_map(grad_key, of_keys * scale, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, of_values, position, head, valid, HEAD_DIM, CHANNELS)


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
    head, group, first = program_tile(heads, plan, TILE)
    length = group[2]
    places, position, valid = block_of_tokens(first, length, group, plan, TILE, BLOCK)
    queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
    queries, grads = queries.to(tl.float32), grads.to(tl.float32)
    of_rows, deltas = load_statistics(logsumexp, delta, position, head, valid)
    for entry in range(0, ENTRIES):
        z = places[0] + entry // (ROWS * COLUMNS) - (KERNEL[0] - 1)
        y = places[1] + entry // COLUMNS % ROWS - (KERNEL[1] - 1)
        key_places = (z, y, places[2] + entry % COLUMNS - (KERNEL[2] - 1))
        visible = visible_pairs(places, key_places, length, KERNEL, STRIDE, CAUSAL, RANK) & valid
        key_position = position_of(key_places, group, plan)
        keys, values = load_maps(key, value, key_position, head, visible, HEAD_DIM, CHANNELS)
        bias = tl.load(table + head * ENTRIES + entry).to(tl.float32)
        scores = (tl.sum(queries * keys.to(tl.float32), 1) * scale + bias) * LOG2_E
        of_weights = tl.sum(grads * values.to(tl.float32), 1)
        _, of_scores = gradient_of_scores(scores, of_rows, visible, of_weights, deltas)
        tl.store(grad_table + tl.program_id(0).to(tl.int64) * ENTRIES + entry, tl.sum(of_scores, 0))


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
        self.kernel, strides, self.dilation = (self.leading(option, 1) for option in options[:3])
        self.table = None if relative_position_bias is None else relative_position_bias.contiguous()
        causal = self.leading(options[3], False)
        self.arguments.update(table=self.table, RANK=self.rank, KERNEL=self.kernel, STRIDE=strides, CAUSAL=causal)

    def tiling(self, parameters: Parameters) -> tuple[tuple, tuple]:
        """Extent of a tile, and number of tiles along each axis of the longest group."""
        tile = TILES[self.rank][parameters.block]
        axes = zip(self.size, self.dilation, tile, strict=True)
        return tile, tuple(triton.cdiv(triton.cdiv(size, step), extent) for size, step, extent in axes)

    def programs(self, parameters: Parameters) -> int:
        return self.batch * math.prod(self.dilation) * math.prod(self.tiling(parameters)[1]) * self.heads

    def start(self, name: str, kernel: Any, **arguments: Any) -> None:
        parameters = self.parameters(name)
        tile, tiles = self.tiling(parameters)
        self.arguments.update(plan=(self.size, self.dilation, tiles), TILE=tile, BOX=self.box(parameters, tile))
        self.submit(kernel, self.programs(parameters), parameters, **arguments)

    def box(self, parameters: Parameters, tile: Sequence[int]) -> tuple[int, int, int]:
        """Extent of the blocks in which a program goes through the tokens that its tile meets."""
        across = [triton.next_power_of_2(extent + size - 1) for extent, size in zip(tile, self.kernel, strict=True)]
        columns = min(across[2], max(16, tile[2]))
        rows = min(across[1], parameters.block // columns)
        return parameters.block // (rows * columns), rows, columns


def refuse(query: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors(query)


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
    atomic = needs_bias and not torch.are_deterministic_algorithms_enabled()
    of_table = call.query.new_zeros((SLICES, *call.table.shape), dtype=torch.float32) if atomic else None
    call.start("backward_query", backward_query_kernel, grad_table=of_table, SLICES=SLICES)
    if needs_key or needs_value:
        call.start("backward_key", backward_key_kernel)
    if needs_bias:
        gradients.append(of_table.sum(0) if atomic else _backward_bias(call))
    return [gradient for gradient in gradients if gradient is not None]


def _backward_bias(call: _Call) -> Tensor:
    groups = call.programs(call.parameters("backward_bias")) // call.heads
    partial = call.query.new_empty((groups, *call.table.shape), dtype=torch.float32)
    call.start("backward_bias", backward_bias_kernel, grad_table=partial)
    return partial.sum(0)
