"""Window attention in Triton: windows are read from the map and written back in place, without a partition.

A program serves one head. Windows that fit into one block of tokens are attended to whole: small ones share a block,
several blocks share a program, and the backward recomputes the softmax and reads each tensor once. Larger windows go
through an online softmax over blocks of keys, and their gradients are summed by the tokens that own them.

The gradient of the bias table is summed over windows in registers, then over programs and offsets in a fixed order.
"""

from typing import Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import per_axis
from ..triton_common import (
    LOG2_E,
    Call,
    attend,
    gradient_of_pairs,
    load_logsumexp,
    load_map,
    load_maps,
    load_statistics,
    masked_scores,
    multiply,
    refuse_tensors,
    start_softmax,
    store_attention,
    store_delta,
    store_map,
)
from .geometry import sum_by_offset

PROGRAMS = 1024
"""About seven on each multiprocessor of a large GPU: enough to fill it, few enough to sum their bias gradients."""


@triton.jit
def _locate(slot, block, plan, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """The tokens behind the slots of a block of PACK windows.

    Returns:
        position (image, row, column) in the map; a label, equal for tokens of the block that see each other; and
        whether there is a token.
    """
    windows, counts, size, step, spacing, shift = plan
    tokens: tl.constexpr = WINDOW[0] * WINDOW[1]
    member = slot // tokens
    token = slot % tokens
    window = block * PACK + member
    y = window // counts[1] % counts[0] * step[0] + token // WINDOW[1] * spacing[0] + shift[0]
    x = window % counts[1] * step[1] + token % WINDOW[1] * spacing[1] + shift[1]
    wrapped_y = y >= size[0]
    wrapped_x = x >= size[1]
    y = tl.where(wrapped_y, y - size[0], y)
    x = tl.where(wrapped_x, x - size[1], x)
    label = member * 4 + wrapped_y.to(tl.int32) * 2 + wrapped_x.to(tl.int32)
    image = window // (counts[0] * counts[1])
    return (image, y, x), label, (slot < PACK * tokens) & (window < windows)


@triton.jit
def _bias(table, head, query, key, WINDOW: tl.constexpr):
    """Entries of the table in base 2 for slots of queries and keys, which come with the other's axis put in."""
    tokens: tl.constexpr = WINDOW[0] * WINDOW[1]
    row = key % tokens // WINDOW[1] - query % tokens // WINDOW[1] + WINDOW[0] - 1
    column = key % tokens % WINDOW[1] - query % tokens % WINDOW[1] + WINDOW[1] - 1
    entry = (head * (2 * WINDOW[0] - 1) + row) * (2 * WINDOW[1] - 1) + column
    return tl.load(table + entry).to(tl.float32) * LOG2_E


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    table,
    output,
    logsumexp,
    plan,
    blocks,
    blocks_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the queries of one part of some blocks of windows, for one head."""
    SLOTS: tl.constexpr = PACK * WINDOW[0] * WINDOW[1]
    PARTS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // (heads * PARTS) * blocks_per_program
    query_slot = tl.program_id(0) // heads % PARTS * BLOCK + tl.arange(0, BLOCK)
    bias = 0.0
    if table is not None and PARTS == 1:
        bias = _bias(table, head, query_slot[:, None], query_slot[None, :], WINDOW)
    for block in range(first, tl.minimum(first + blocks_per_program, blocks)):
        position, label, valid = _locate(query_slot, block, plan, WINDOW, PACK)
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        state = start_softmax(BLOCK, CHANNELS)
        for start in range(0, SLOTS, BLOCK):
            key_slot = start + tl.arange(0, BLOCK)
            key_position, key_label, key_valid = _locate(key_slot, block, plan, WINDOW, PACK)
            keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
            visible = (label[:, None] == key_label[None, :]) & key_valid[None, :]
            part_bias = bias
            if table is not None and PARTS > 1:
                part_bias = _bias(table, head, query_slot[:, None], key_slot[None, :], WINDOW)
            state = attend(state, queries, keys, values, visible, part_bias, scale, PRECISION)
        store_attention(state, output, logsumexp, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def backward_whole_kernel(
    query,
    key,
    value,
    table,
    grad_output,
    grad_query,
    grad_key,
    grad_value,
    partial,
    plan,
    blocks,
    blocks_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of windows that fit into one block: one program has some blocks of windows, for one head."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * blocks_per_program
    slot = tl.arange(0, BLOCK)
    bias = 0.0
    if table is not None:
        bias = _bias(table, head, slot[:, None], slot[None, :], WINDOW)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block in range(first, tl.minimum(first + blocks_per_program, blocks)):
        position, label, valid = _locate(slot, block, plan, WINDOW, PACK)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
        visible = (label[:, None] == label[None, :]) & valid[:, None] & valid[None, :]
        scores = masked_scores(queries, keys, visible, bias, scale, PRECISION)
        # the maximum and the sum apart: a logsumexp would carry over the rounding of large scores
        largest = tl.where(valid, tl.max(scores, 1), 0.0)
        weights = tl.where(visible, tl.exp2(scores - largest[:, None]), 0.0)
        weights = weights / tl.where(valid, tl.sum(weights, 1), 1.0)[:, None]
        if grad_value is not None:
            of_values = multiply(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
            store_map(grad_value, of_values, position, head, valid, HEAD_DIM, CHANNELS)
        if grad_query is not None or grad_key is not None or partial is not None:
            of_weights = multiply(grads, tl.trans(values), PRECISION)
            of_scores = weights * (of_weights - tl.sum(weights * of_weights, 1)[:, None])
            if partial is not None:
                grad_bias += of_scores
            of_scores = of_scores.to(keys.dtype)
            if grad_query is not None:
                of_queries = multiply(of_scores, keys, PRECISION) * scale
                store_map(grad_query, of_queries, position, head, valid, HEAD_DIM, CHANNELS)
            if grad_key is not None:
                of_keys = multiply(tl.trans(of_scores), queries, PRECISION) * scale
                store_map(grad_key, of_keys, position, head, valid, HEAD_DIM, CHANNELS)
    if partial is not None:
        pair = tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + slot[:, None] * BLOCK + slot[None, :]
        tl.store(partial + pair, grad_bias)


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
    plan,
    heads,
    scale,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of one part of the queries of a window, and delta, the sum of output times gradient."""
    SLOTS: tl.constexpr = WINDOW[0] * WINDOW[1]
    PARTS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // (heads * PARTS)
    query_slot = tl.program_id(0) // heads % PARTS * BLOCK + tl.arange(0, BLOCK)
    position, label, valid = _locate(query_slot, window, plan, WINDOW, 1)
    grads = load_map(grad_output, position, head, valid, HEAD_DIM, CHANNELS)
    deltas = store_delta(delta, output, grads, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_query is not None:
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        statistics = (load_logsumexp(logsumexp, position, head, valid)[:, None], deltas[:, None])
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        for start in range(0, SLOTS, BLOCK):
            key_slot = start + tl.arange(0, BLOCK)
            key_position, key_label, key_valid = _locate(key_slot, window, plan, WINDOW, 1)
            keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
            visible = (label[:, None] == key_label[None, :]) & valid[:, None] & key_valid[None, :]
            bias = 0.0
            if table is not None:
                bias = _bias(table, head, query_slot[:, None], key_slot[None, :], WINDOW)
            _, of_scores = gradient_of_pairs(queries, keys, grads, values, statistics, visible, bias, scale, PRECISION)
            sums += multiply(of_scores, keys, PRECISION)
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
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of one part of the keys and values of a window. Scores have keys as rows."""
    SLOTS: tl.constexpr = WINDOW[0] * WINDOW[1]
    PARTS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // (heads * PARTS)
    key_slot = tl.program_id(0) // heads % PARTS * BLOCK + tl.arange(0, BLOCK)
    key_position, key_label, key_valid = _locate(key_slot, window, plan, WINDOW, 1)
    keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for start in range(0, SLOTS, BLOCK):
        query_slot = start + tl.arange(0, BLOCK)
        position, label, valid = _locate(query_slot, window, plan, WINDOW, 1)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        of_rows, deltas = load_statistics(logsumexp, delta, position, head, valid)
        visible = (key_label[:, None] == label[None, :]) & key_valid[:, None] & valid[None, :]
        bias = 0.0
        if table is not None:
            bias = _bias(table, head, query_slot[None, :], key_slot[:, None], WINDOW)
        weights, of_scores = gradient_of_pairs(
            keys, queries, values, grads, (of_rows[None, :], deltas[None, :]), visible, bias, scale, PRECISION
        )
        if grad_key is not None:
            of_keys += multiply(of_scores, queries, PRECISION)
        if grad_value is not None:
            of_values += multiply(weights, grads, PRECISION)
    if grad_key is not None:
        store_map(grad_key, of_keys * scale, key_position, head, key_valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, of_values, key_position, head, key_valid, HEAD_DIM, CHANNELS)


@triton.jit
def backward_bias_kernel(
    query,
    key,
    value,
    table,
    grad_output,
    logsumexp,
    delta,
    partial,
    plan,
    windows_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of the scores of a part of queries with a part of keys, summed over some windows."""
    PARTS: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    parts = tl.program_id(0) // heads % (PARTS * PARTS)
    chunk = tl.program_id(0) // (heads * PARTS * PARTS)
    query_slot = parts // PARTS * BLOCK + tl.arange(0, BLOCK)
    key_slot = parts % PARTS * BLOCK + tl.arange(0, BLOCK)
    bias = _bias(table, head, query_slot[:, None], key_slot[None, :], WINDOW)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = chunk * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, plan[0])):
        position, label, valid = _locate(query_slot, window, plan, WINDOW, 1)
        key_position, key_label, key_valid = _locate(key_slot, window, plan, WINDOW, 1)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
        of_rows, deltas = load_statistics(logsumexp, delta, position, head, valid)
        visible = (label[:, None] == key_label[None, :]) & valid[:, None] & key_valid[None, :]
        sums += gradient_of_pairs(
            queries, keys, grads, values, (of_rows[:, None], deltas[:, None]), visible, bias, scale, PRECISION
        )[1]
    pair = (chunk * heads + head).to(tl.int64) * (PARTS * BLOCK) + query_slot[:, None]
    tl.store(partial + pair * (PARTS * BLOCK) + key_slot[None, :], sums)


class _Call(Call):
    """The windows of one call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: Sequence[int],
        partition: str,
        shift: Sequence[int],
        relative_position_bias: Optional[Tensor],
        scale: Optional[float],
    ) -> None:
        super().__init__("window", query, key, value, scale)
        self.window = per_axis("window_size", window_size, 2)
        self.tokens_per_window = self.window[0] * self.window[1]
        counts = tuple(size // extent for size, extent in zip(self.size, self.window, strict=True))
        self.windows = self.batch * counts[0] * counts[1]
        step, spacing = ((1, 1), counts) if partition == "grid" else (self.window, (1, 1))
        shifts = zip(per_axis("shift", shift, 2), counts, strict=True)
        shifts = tuple(offset if count > 1 else 0 for offset, count in shifts)
        self.arguments.update(
            table=None if relative_position_bias is None else relative_position_bias.contiguous(),
            plan=(self.windows, counts, self.size, step, spacing, shifts),
            WINDOW=self.window,
        )

    def spread(self, blocks: int) -> tuple[int, int]:
        """Blocks of one program, and the number of programs of a head."""
        share = max(1, blocks * self.heads // PROGRAMS)
        return share, triton.cdiv(blocks, share)


def refuse(query: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors(query)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    outputs = call.start_forward()
    parameters = call.parameters("forward_whole")
    if call.tokens_per_window > parameters.block:
        parameters = call.parameters("forward")
    pack = max(1, parameters.block // call.tokens_per_window)
    blocks = triton.cdiv(call.windows, pack)
    share, groups = call.spread(blocks)
    programs = groups * triton.cdiv(pack * call.tokens_per_window, parameters.block) * call.heads
    call.submit(forward_kernel, programs, parameters, blocks=blocks, blocks_per_program=share, PACK=pack)
    return outputs


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], *arguments
) -> list[Tensor]:
    """Gradients of query, key, value and the bias table, those that are needed."""
    call = _Call(*arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient)
    whole = call.tokens_per_window <= call.parameters("backward_whole").block
    of_pairs = (_backward_whole if whole else _backward_parts)(call, needs_gradient)
    if of_pairs is not None:
        gradients.append(sum_by_offset(of_pairs, call.window))
    return [gradient for gradient in gradients if gradient is not None]


def _backward_whole(call: _Call, needs_gradient: Sequence[bool]) -> Optional[Tensor]:
    """Fills the gradients; returns that of the bias by pairs of tokens, (heads, tokens, tokens), if it is needed."""
    parameters = call.parameters("backward_whole")
    block = parameters.block
    pack = block // call.tokens_per_window
    blocks = triton.cdiv(call.windows, pack)
    share, groups = call.spread(blocks)
    shape = (groups, call.heads, block, block)
    partial = call.query.new_empty(shape, dtype=torch.float32) if needs_gradient[3] else None
    sizes = {"blocks": blocks, "blocks_per_program": share, "PACK": pack}
    call.submit(backward_whole_kernel, groups * call.heads, parameters, partial=partial, **sizes)
    if partial is None:
        return None
    used = pack * call.tokens_per_window
    members = partial.sum(0)[:, :used, :used].unflatten(2, (pack, -1)).unflatten(1, (pack, -1))
    return members.diagonal(dim1=1, dim2=3).sum(-1)


def _backward_parts(call: _Call, needs_gradient: Sequence[bool]) -> Optional[Tensor]:
    """As :func:`_backward_whole`, for windows of several blocks."""
    _, needs_key, needs_value, needs_bias = needs_gradient
    kernels = {"backward_query": backward_query_kernel}
    if needs_key or needs_value:
        kernels["backward_key"] = backward_key_kernel
    for name, kernel in kernels.items():
        parameters = call.parameters(name)
        programs = call.windows * call.heads * triton.cdiv(call.tokens_per_window, parameters.block)
        call.submit(kernel, programs, parameters)
    return _backward_bias(call) if needs_bias else None


def _backward_bias(call: _Call) -> Tensor:
    parameters = call.parameters("backward_bias")
    parts = triton.cdiv(call.tokens_per_window, parameters.block)
    share = max(1, call.windows * call.heads * parts**2 // PROGRAMS)
    chunks = triton.cdiv(call.windows, share)
    shape = (chunks, call.heads, parts * parameters.block, parts * parameters.block)
    partial = call.query.new_empty(shape, dtype=torch.float32)
    programs = chunks * parts**2 * call.heads
    call.submit(backward_bias_kernel, programs, parameters, partial=partial, windows_per_program=share)
    return partial.sum(0)[:, : call.tokens_per_window, : call.tokens_per_window]
