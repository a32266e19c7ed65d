"""Triton kernels of aggregated attention that own pooled keys or their biases, and go through the map or images."""

import triton
import triton.language as tl

from ..triton_common import load_maps, load_statistics, multiply, store_map
from .fused_tiles import load_pooled_bias, weigh


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
    tokens,
    batch,
    pooled,
    runs_per_program,
    heads,
    scale,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The share of some runs of queries, which follow each other row by row, in the gradients of pooled tokens."""
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(pooled, STEP)
    image = tl.program_id(0) // (heads * blocks) % batch
    part = tl.program_id(0) // (heads * blocks * batch)
    slot = tl.program_id(0) // heads % blocks * STEP + tl.arange(0, STEP)
    seen = slot < pooled
    keys, values = load_maps(pooled_key, pooled_value, (image, slot), head, seen, HEAD_DIM, CHANNELS)
    of_keys = tl.zeros([STEP, CHANNELS], tl.float32)
    of_values = tl.zeros([STEP, CHANNELS], tl.float32)
    first = part * runs_per_program
    for index in range(first, tl.minimum(first + runs_per_program, tl.cdiv(tokens, BLOCK))):
        token = index * BLOCK + tl.arange(0, BLOCK)
        valid = token < tokens
        queries, grads = load_maps(query, grad_output, (image, token), head, valid, HEAD_DIM, CHANNELS)
        statistics, deltas = load_statistics(logsumexp, delta, (image, token), head, valid)
        statistics = tl.where(valid, statistics, float("inf"))[:, None]  # a weight of 0 where there is no query
        bias = load_pooled_bias(pooled_bias, head, tokens, token, valid, slot, pooled, CELLS)
        weights, of_weights = weigh(queries, keys, grads, values, bias, statistics, scale, PRECISION)
        if partial_key is not None:
            of_scores = (weights * (of_weights - deltas[:, None])).to(queries.dtype)
            of_keys += multiply(tl.trans(of_scores), queries, PRECISION)
        if partial_value is not None:
            of_values += multiply(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
    position = (tl.program_id(0) // (heads * blocks), slot)  # each part of the runs has an image of its own
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
    tokens,
    batch,
    pooled,
    images_per_program,
    heads,
    scale,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the scores of a run of queries with some pooled tokens, summed over some images."""
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(pooled, STEP)
    runs = tl.cdiv(tokens, BLOCK)
    slot = tl.program_id(0) // heads % blocks * STEP + tl.arange(0, STEP)
    seen = slot < pooled
    token = tl.program_id(0) // (heads * blocks) % runs * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    part = tl.program_id(0) // (heads * blocks * runs)
    bias = load_pooled_bias(pooled_bias, head, tokens, token, valid, slot, pooled, CELLS)
    sums = tl.zeros([BLOCK, STEP], tl.float32)
    first = part * images_per_program
    for image in range(first, tl.minimum(first + images_per_program, batch)):
        queries, grads = load_maps(query, grad_output, (image, token), head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(pooled_key, pooled_value, (image, slot), head, seen, HEAD_DIM, CHANNELS)
        statistics, deltas = load_statistics(logsumexp, delta, (image, token), head, valid)
        weights, of_weights = weigh(queries, keys, grads, values, bias, statistics[:, None], scale, PRECISION)
        sums += weights * (of_weights - deltas[:, None])
    row = (part * heads + head).to(tl.int64) * tokens + token
    tl.store(partial + row[:, None] * pooled + slot[None, :], sums, mask=valid[:, None] & seen[None, :])
