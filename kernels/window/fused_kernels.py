"""Kernels of window attention for windows of several blocks: an online softmax over blocks of keys, and gradients that
are summed by the tokens that own them. The gradient of the table is a sum over the pairs of an offset.
"""

import triton
import triton.language as tl

from ..triton_common import (
    accumulate,
    load_lse,
    load_lse_and_delta,
    load_map,
    load_maps,
    multiply,
    score,
    start_softmax,
    store_attention,
    store_delta,
    store_map,
)
from .fused_kernels_geometry import bias_of, cell, locate, numbers, tear, unravel


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
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the queries of one part of a window, for one head."""
    SLOTS: tl.constexpr = WINDOW[0] * WIDTH
    plan = numbers(plan)
    head, window, slot = _part(heads, plan, WINDOW, WIDTH, BLOCK)
    position, valid = locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    state = start_softmax(BLOCK, CHANNELS)
    for start in range(0, SLOTS, BLOCK):
        key_slot = start + tl.arange(0, BLOCK)
        key_position, key_valid = locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
        scores = score(
            queries, keys, bias_of(table, head, slot[:, None], key_slot[None, :], WINDOW, WIDTH, 1), scale, PRECISION
        )
        scores = tear(scores, slot, key_slot, window, plan, WINDOW, WIDTH, SHIFTED)
        state = accumulate(state, scores, values, PRECISION)
    store_attention(state, output, logsumexp, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def _part(heads, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What a program owns: head, window and the slots of a part of it."""
    PARTS: tl.constexpr = (WINDOW[0] * WIDTH + BLOCK - 1) // BLOCK
    part = tl.program_id(0) // heads % PARTS
    window = unravel(tl.program_id(0) // (heads * PARTS), (0, 0, plan.counts[0], plan.counts[1]))
    return tl.program_id(0) % heads, window, part * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _softmax_gradient(scores, left_values, right_values, lse, delta, PRECISION: tl.constexpr):
    """Weights of pairs of tokens, and the gradient of their scores in base e.

    Args:
        scores: in base 2, -inf where tokens do not see each other.
        left_values, right_values: as for :func:`weigh` of triton_common.py.
        lse, delta: of the queries, lse in base 2, with the axis of the keys put in.
    """
    weights = tl.exp2(scores - lse)
    return weights, weights * (multiply(left_values, tl.trans(right_values), PRECISION) - delta)


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
    WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of one part of the queries of a window, and delta, the sum of output times gradient."""
    SLOTS: tl.constexpr = WINDOW[0] * WIDTH
    plan = numbers(plan)
    head, window, slot = _part(heads, plan, WINDOW, WIDTH, BLOCK)
    position, valid = locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
    grads = load_map(grad_output, position, head, valid, HEAD_DIM, CHANNELS)
    deltas = store_delta(delta, output, grads, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_query is not None:
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        lse = load_lse(logsumexp, position, head, valid)[:, None]
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        for start in range(0, SLOTS, BLOCK):
            key_slot = start + tl.arange(0, BLOCK)
            key_position, key_valid = locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
            keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
            bias = bias_of(table, head, slot[:, None], key_slot[None, :], WINDOW, WIDTH, 1)
            scores = score(queries, keys, bias, scale, PRECISION)
            scores = tear(scores, slot, key_slot, window, plan, WINDOW, WIDTH, SHIFTED)
            _, grad_scores = _softmax_gradient(scores, grads, values, lse, deltas[:, None], PRECISION)
            sums += multiply(grad_scores, keys, PRECISION)
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
    WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of one part of the keys and values of a window. Scores have keys as rows."""
    SLOTS: tl.constexpr = WINDOW[0] * WIDTH
    plan = numbers(plan)
    head, window, key_slot = _part(heads, plan, WINDOW, WIDTH, BLOCK)
    key_position, key_valid = locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
    keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
    grad_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    grad_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        position, valid = locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        lse, deltas = load_lse_and_delta(logsumexp, delta, position, head, valid)
        bias = bias_of(table, head, slot[None, :], key_slot[:, None], WINDOW, WIDTH, 1)
        scores = score(keys, queries, bias, scale, PRECISION)
        scores = tear(scores, key_slot, slot, window, plan, WINDOW, WIDTH, SHIFTED)
        weights, grad_scores = _softmax_gradient(scores, values, grads, lse[None, :], deltas[None, :], PRECISION)
        if grad_key is not None:
            grad_keys += multiply(grad_scores, queries, PRECISION)
        if grad_value is not None:
            grad_values += multiply(weights, grads, PRECISION)
    if grad_key is not None:
        store_map(grad_key, grad_keys * scale, key_position, head, key_valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, grad_values, key_position, head, key_valid, HEAD_DIM, CHANNELS)


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
    WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of the scores of a part of queries with a part of keys, summed over some windows."""
    PARTS: tl.constexpr = (WINDOW[0] * WIDTH + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    plan = numbers(plan)
    parts = tl.program_id(0) // heads % (PARTS * PARTS)
    chunk = tl.program_id(0) // (heads * PARTS * PARTS)
    slot = parts // PARTS * BLOCK + tl.arange(0, BLOCK)
    key_slot = parts % PARTS * BLOCK + tl.arange(0, BLOCK)
    bias = bias_of(table, head, slot[:, None], key_slot[None, :], WINDOW, WIDTH, 1)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = chunk * windows_per_program
    for index in range(first, tl.minimum(first + windows_per_program, plan.batch * plan.counts[0] * plan.counts[1])):
        window = unravel(index, (0, 0, plan.counts[0], plan.counts[1]))
        position, valid = locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        key_position, key_valid = locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
        lse, deltas = load_lse_and_delta(logsumexp, delta, position, head, valid)
        scores = score(queries, keys, bias, scale, PRECISION)
        scores = tear(scores, slot, key_slot, window, plan, WINDOW, WIDTH, SHIFTED)
        sums += _softmax_gradient(scores, grads, values, lse[:, None], deltas[:, None], PRECISION)[1]
    pair = (chunk * heads + head).to(tl.int64) * (PARTS * BLOCK) + slot[:, None]
    tl.store(partial + pair * (PARTS * BLOCK) + key_slot[None, :], sums)


@triton.jit
def sum_by_offset_kernel(
    query,
    grad_scores,
    grad_table,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    PACK: tl.constexpr,
    EXTENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one entry of the gradient of the table, from the gradients of the scores of all pairs of slots.

    Args:
        grad_scores: (heads, EXTENT, EXTENT), the slots of a block of PACK windows.
    """
    ROW: tl.constexpr = 2 * WINDOW[1] - 1
    ENTRIES: tl.constexpr = (2 * WINDOW[0] - 1) * ROW
    head, entry = tl.program_id(0) // ENTRIES, tl.program_id(0) % ENTRIES
    down, across = entry // ROW - WINDOW[0] + 1, entry % ROW - WINDOW[1] + 1
    slot = tl.arange(0, BLOCK)
    row, column, valid = cell(slot, WINDOW, WIDTH)
    y, x = row + down, column + across
    seen = valid & (slot < PACK * WINDOW[0] * WIDTH) & (y >= 0) & (y < WINDOW[0]) & (x >= 0) & (x < WINDOW[1])
    pairs = grad_scores + (head * EXTENT + slot) * EXTENT + slot + down * WIDTH + across
    tl.store(grad_table + tl.program_id(0), tl.sum(tl.load(pairs, mask=seen, other=0.0), 0))
