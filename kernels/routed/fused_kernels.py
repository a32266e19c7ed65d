"""Triton kernels of routed attention (see fused.py): attention, its gradients, and the inversion of routes."""

import triton
import triton.language as tl

from ..triton_common import (
    attend,
    load_lse,
    load_lse_and_delta,
    load_map,
    multiply,
    start_softmax,
    store_attention,
    store_map,
    token_pointers,
    weigh,
)


@triton.jit
def _position(image, region, token, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Of tokens of regions in the map, for regions of WIDTH tokens across in COLUMNS columns."""
    return image, region // COLUMNS, token // WIDTH, region % COLUMNS, token % WIDTH


@triton.jit
def _program(heads, regions, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What a program owns: a head of an image, a region, and its tokens as positions and whether there is a token."""
    parts: tl.constexpr = tl.cdiv(TOKENS, BLOCK)
    index = tl.program_id(0) // heads
    token = index % parts * BLOCK + tl.arange(0, BLOCK)
    image, region = index // parts // regions, index // parts % regions
    return tl.program_id(0) % heads, image, region, _position(image, region, token, COLUMNS, WIDTH), token < TOKENS


@triton.jit
def _listed(
    regions_of_list,
    count,
    start,
    image,
    regions,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """Tokens of a list of regions from a slot on, as positions and whether there is a token."""
    slot = start + tl.arange(0, STEP)
    if TOKENS % STEP == 0:
        region = tl.zeros([STEP], tl.int32) + tl.load(regions_of_list + start // TOKENS)
    else:
        region = tl.load(regions_of_list + slot // TOKENS, mask=slot < count * TOKENS, other=-1)
    seen = (region >= 0) & (region < regions)
    region = tl.where(seen, region, 0).to(tl.int32)
    return _position(image, region, slot % TOKENS, COLUMNS, WIDTH), seen


@triton.jit
def _load_keys(
    key,
    value,
    routes,
    start,
    image,
    regions,
    head,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
):
    """Keys and values that routes lead to, from a slot of their list on, and what masks those that are none."""
    position, seen = _listed(routes, TOPK, start, image, regions, TOKENS, COLUMNS, WIDTH, STEP)
    keys = load_map(key, position, head, seen, HEAD_DIM, CHANNELS)
    values = load_map(value, position, head, seen, VALUE_DIM, VALUE_CHANNELS)
    return keys, values, tl.where(seen, 0.0, float("-inf"))[None, :]


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    routes,
    output,
    logsumexp,
    regions,
    heads,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, image, region, position, valid = _program(heads, regions, TOKENS, COLUMNS, WIDTH, BLOCK)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    routes += (image.to(tl.int64) * regions + region) * TOPK
    state = start_softmax(BLOCK, VALUE_CHANNELS)
    for start in range(0, TOPK * TOKENS, STEP):
        keys, values, mask = _load_keys(
            key, value, routes, start, image, regions, head, TOKENS,
            COLUMNS, WIDTH, TOPK, STEP, HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS,
        )  # fmt: skip
        state = attend(state, queries, keys, values, mask, scale, PRECISION)
    store_attention(state, output, logsumexp, position, head, valid, VALUE_DIM, VALUE_CHANNELS)


@triton.jit
def backward_query_kernel(
    query,
    key,
    value,
    routes,
    grad_output,
    logsumexp,
    delta,
    grad_query,
    regions,
    heads,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of queries of one region, and delta, the mean of the gradients of their weights.

    Delta is also the sum of output times gradient, but the rounding of the output does not cancel against the gradient
    of a weight near 1, and with few keys such weights are common. So it takes a pass of its own where the keys do not
    fit into one block, and is divided by the sum of the weights, which is 1 but for the rounding of the logsumexp.
    """
    head, image, region, position, valid = _program(heads, regions, TOKENS, COLUMNS, WIDTH, BLOCK)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    grads = load_map(grad_output, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
    lse = load_lse(logsumexp, position, head, valid)[:, None]
    routes += (image.to(tl.int64) * regions + region) * TOPK
    if TOPK * TOKENS <= STEP:
        keys, values, mask = _load_keys(
            key, value, routes, 0, image, regions, head, TOKENS,
            COLUMNS, WIDTH, TOPK, STEP, HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS,
        )  # fmt: skip
        weights, grad_weights = weigh(queries, keys, grads, values, mask - lse, scale, PRECISION)
        deltas = tl.sum(weights * grad_weights, 1)
        total = tl.sum(weights, 1)
    else:
        deltas = tl.zeros([BLOCK], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, TOPK * TOKENS, STEP):
            keys, values, mask = _load_keys(
                key, value, routes, start, image, regions, head, TOKENS,
                COLUMNS, WIDTH, TOPK, STEP, HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS,
            )  # fmt: skip
            weights, grad_weights = weigh(queries, keys, grads, values, mask - lse, scale, PRECISION)
            deltas += tl.sum(weights * grad_weights, 1)
            total += tl.sum(weights, 1)
    deltas = deltas / total
    tl.store(token_pointers(delta, position, head), deltas, mask=valid)
    if grad_query is not None:
        if TOPK * TOKENS <= STEP:
            sums = multiply(weights * (grad_weights - deltas[:, None]), keys, PRECISION)
        else:
            sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
            for start in range(0, TOPK * TOKENS, STEP):
                keys, values, mask = _load_keys(
                    key, value, routes, start, image, regions, head, TOKENS,
                    COLUMNS, WIDTH, TOPK, STEP, HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS,
                )  # fmt: skip
                weights, grad_weights = weigh(queries, keys, grads, values, mask - lse, scale, PRECISION)
                sums += multiply(weights * (grad_weights - deltas[:, None]), keys, PRECISION)
        store_map(grad_query, sums * scale, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def invert_kernel(
    query, routes, askers, sections, regions, TOPK: tl.constexpr, ROUTES: tl.constexpr, BLOCK: tl.constexpr
):
    """A region's section of the list of those who are routed to it; one who is routed to it twice is there twice.

    Args:
        askers: (batch, regions * k): the list, regions of queries.
        sections: (batch, regions + 1): where the section of a region begins, and the end of the last.
        ROUTES: k, padded to a power of two.
    """
    image = tl.program_id(0) // (regions + 1)
    region = tl.program_id(0) % (regions + 1)
    routes += image.to(tl.int64) * regions * TOPK
    askers += image.to(tl.int64) * regions * TOPK
    slot = tl.arange(0, ROUTES)[None, :]
    first = 0
    for start in range(0, regions, BLOCK):
        asker = start + tl.arange(0, BLOCK)[:, None]
        route = tl.load(routes + asker * TOPK + slot, mask=(asker < regions) & (slot < TOPK), other=-1)
        first += tl.sum(tl.sum(((route >= 0) & (route < region)).to(tl.int32), 1), 0)
    tl.store(sections + image.to(tl.int64) * (regions + 1) + region, first)
    if region < regions:
        for start in range(0, regions, BLOCK):
            asker = start + tl.arange(0, BLOCK)
            inside = (asker < regions)[:, None] & (slot < TOPK)
            route = tl.load(routes + asker[:, None] * TOPK + slot, mask=inside, other=-1)
            times = tl.sum((route == region).to(tl.int32), 1)
            place = first + tl.cumsum(times, 0) - times
            for again in range(0, tl.max(times, 0)):
                tl.store(askers + place + again, asker, mask=again < times)
            first += tl.sum(times, 0)


@triton.jit
def backward_key_kernel(
    query,
    key,
    value,
    askers,
    sections,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    regions,
    heads,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of keys and values of one region. Scores have keys as rows."""
    head, image, region, position, valid = _program(heads, regions, TOKENS, COLUMNS, WIDTH, BLOCK)
    keys = load_map(key, position, head, valid, HEAD_DIM, CHANNELS)
    values = load_map(value, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
    grad_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    grad_values = tl.zeros([BLOCK, VALUE_CHANNELS], tl.float32)
    section = sections + image.to(tl.int64) * (regions + 1) + region
    first = tl.load(section)
    count = tl.load(section + 1) - first
    askers += image.to(tl.int64) * regions * TOPK + first
    for start in range(0, count * TOKENS, STEP):
        asking, asked = _listed(askers, count, start, image, regions, TOKENS, COLUMNS, WIDTH, STEP)
        queries = load_map(query, asking, head, asked, HEAD_DIM, CHANNELS)
        grads = load_map(grad_output, asking, head, asked, VALUE_DIM, VALUE_CHANNELS)
        lse, deltas = load_lse_and_delta(logsumexp, delta, asking, head, asked)
        offset = tl.where(asked, -lse, float("-inf"))[None, :]
        weights, grad_weights = weigh(keys, queries, values, grads, offset, scale, PRECISION)
        if grad_key is not None:
            grad_keys += multiply(weights * (grad_weights - deltas[None, :]), queries, PRECISION)
        if grad_value is not None:
            grad_values += multiply(weights, grads, PRECISION)
    if grad_key is not None:
        store_map(grad_key, grad_keys * scale, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, grad_values, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
