"""Kernels of window attention for windows that fit into one block of tokens; small windows blocks_per_program a block.

The bias, with the mask of padding and of torn windows, is made once as tiles of a block with itself. A program goes
through windows that the shift tears in the same way, so it reads one tile and masks nothing.
"""

import triton
import triton.language as tl

from ..triton_common import load_map, load_maps, multiply, score, store_attention, store_map
from .fused_kernels_geometry import bias_of, locate, members, numbers, tear, unravel


@triton.jit
def bias_kernel(
    query,
    table,
    tiles,
    plan,
    heads,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: what is added to the scores of a block, for one head and one way of being torn.

    Args:
        tiles: (heads or 1, 4 or 1, BLOCK, BLOCK), where 4 are no axis, columns, rows and both, see :func:`_load_bias`.
    """
    plan = numbers(plan)
    TEARS: tl.constexpr = 4 if SHIFTED else 1
    head, way = tl.program_id(0) // TEARS, tl.program_id(0) % TEARS
    slot = tl.arange(0, BLOCK)
    bias = bias_of(table, head, slot[:, None], slot[None, :], WINDOW, WINDOW[1], PACK)
    bias += tl.zeros([BLOCK, BLOCK], tl.float32)  # without a table it is the same for all queries
    if SHIFTED:
        window = (0, way // 2 * (plan.counts[0] - 1), way % 2 * (plan.counts[1] - 1))
        bias = tear(bias, slot, slot, window, plan, WINDOW, WINDOW[1], SHIFTED)
    tl.store(tiles + tl.program_id(0) * BLOCK * BLOCK + slot[:, None] * BLOCK + slot[None, :], bias)


@triton.jit
def _load_bias(tiles, head, way, SHIFTED: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of :func:`bias_kernel`."""
    TEARS: tl.constexpr = 4 if SHIFTED else 1
    slot = tl.arange(0, BLOCK)
    start = tiles + ((head if PER_HEAD else 0) * TEARS + way) * (BLOCK * BLOCK)
    return tl.load(start + slot[:, None] * BLOCK + slot[None, :])


@triton.jit
def _blocks_of_program(plan, heads, blocks_per_program, PACK: tl.constexpr, SHIFTED: tl.constexpr):
    """What a program goes through: blocks of windows that the shift tears in the same way.

    Returns:
        head; the way; top, left, rows and columns of the rectangle of windows that are torn so; the first block of the
        program, numbered through the images, and the one behind its last.
    """
    batch, counts, shift = plan.batch, plan.counts, plan.shift
    index, way, rows, columns = tl.program_id(0) // heads, 0, counts[0], counts[1]
    if SHIFTED:
        torn_rows, torn_columns = (shift[0] > 0).to(tl.int32), (shift[1] > 0).to(tl.int32)
        rows, columns = counts[0] - torn_rows, counts[1] - torn_columns
        for following in tl.static_range(1, 4):
            programs = tl.cdiv(batch * rows * columns, blocks_per_program)
            behind = index >= programs
            index = tl.where(behind, index - programs, index)
            way = tl.where(behind, following, way)
            rows = tl.where(behind, torn_rows if following // 2 else counts[0] - torn_rows, rows)
            columns = tl.where(behind, torn_columns if following % 2 else counts[1] - torn_columns, columns)
    rectangle = (way // 2 * (counts[0] - 1), way % 2 * (counts[1] - 1), rows, columns)
    stop = tl.minimum((index + 1) * blocks_per_program, tl.cdiv(batch * rows * columns, PACK))
    return tl.program_id(0) % heads, way, rectangle, index * blocks_per_program, stop


@triton.jit
def _next(window, rectangle):
    """The window behind one in a rectangle, without divisions."""
    image, row, column = window
    top, left, rows, columns = rectangle
    column += 1
    row += (column == left + columns).to(tl.int32)
    column = tl.where(column == left + columns, left, column)
    image += (row == top + rows).to(tl.int32)
    return image, tl.where(row == top + rows, top, row), column


@triton.jit
def _finite(tokens):
    """With zeros for what is no finite number."""
    return tl.where(tokens.to(tl.float32) * 0.0 == 0.0, tokens, 0.0).to(tokens.dtype)


@triton.jit
def _lost(left, right, bias):
    """NaN for the slots of windows that hold a NaN or an infinity in either tensor, else 0: (slots,).

    The windows of a block may be of different images, and their products meet: 0 times NaN would bring it to all.
    """
    bad = tl.sum(left.to(tl.float32) * 0.0, 1) + tl.sum(right.to(tl.float32) * 0.0, 1)
    return tl.sum(tl.where(bias == float("-inf"), 0.0, bad[None, :]), 1)


@triton.jit
def forward_whole_kernel(
    query,
    key,
    value,
    tiles,
    output,
    logsumexp,
    plan,
    blocks_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    SHIFTED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Windows that fit into one block: one program has some blocks of windows, for one head."""
    plan = numbers(plan)
    head, way, rectangle, first, stop = _blocks_of_program(plan, heads, blocks_per_program, PACK, SHIFTED)
    slot = tl.arange(0, BLOCK)
    bias = _load_bias(tiles, head, way, SHIFTED, PER_HEAD, BLOCK)
    following = unravel(first, rectangle)
    for block in range(first, stop):
        window = members(following, block, slot, rectangle, WINDOW, PACK)
        position, valid = locate(slot, window, plan, WINDOW, WINDOW[1], PACK, SHIFTED)
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
        if PACK > 1:
            lost = _lost(keys, values, bias)
            keys, values = _finite(keys), _finite(values)
        scores = score(queries, keys, bias, scale, PRECISION)
        largest = tl.max(scores, 1)
        weights = tl.exp2(scores - largest[:, None])
        total = tl.sum(weights, 1)
        if PACK > 1:
            total += lost
        state = (largest, total, multiply(weights, values, PRECISION))
        store_attention(state, output, logsumexp, position, head, valid, HEAD_DIM, CHANNELS)
        following = _next(following, rectangle)


@triton.jit
def backward_whole_kernel(
    query,
    key,
    value,
    tiles,
    grad_output,
    grad_query,
    grad_key,
    grad_value,
    partial,
    plan,
    blocks_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    SHIFTED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of windows that fit into one block: one program has some blocks of windows, for one head.

    Slots without a token have zeros for query, key, value and gradient, and so add nothing to any sum.
    """
    plan = numbers(plan)
    head, way, rectangle, first, stop = _blocks_of_program(plan, heads, blocks_per_program, PACK, SHIFTED)
    slot = tl.arange(0, BLOCK)
    bias = _load_bias(tiles, head, way, SHIFTED, PER_HEAD, BLOCK)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    following = unravel(first, rectangle)
    for block in range(first, stop):
        window = members(following, block, slot, rectangle, WINDOW, PACK)
        position, valid = locate(slot, window, plan, WINDOW, WINDOW[1], PACK, SHIFTED)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
        if PACK > 1:
            lost = _lost(keys, values, bias) + _lost(queries, grads, bias)
            queries, keys, values, grads = _finite(queries), _finite(keys), _finite(values), _finite(grads)
        scores = score(queries, keys, bias, scale, PRECISION)
        # the maximum and the sum apart: a logsumexp would carry over the rounding of large scores
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights * (1.0 / tl.sum(weights, 1))[:, None]
        if grad_value is not None:
            grad_values = multiply(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
            if PACK > 1:
                grad_values += lost[:, None]
            store_map(grad_value, grad_values, position, head, valid, HEAD_DIM, CHANNELS)
        if grad_query is not None or grad_key is not None or partial is not None:
            grad_weights = multiply(grads, tl.trans(values), PRECISION)
            products = weights * grad_weights
            grad_scores = products - weights * tl.sum(products, 1)[:, None]
            if partial is not None:
                grad_bias += grad_scores
                if PACK > 1:
                    grad_bias += lost[:, None]
            grad_scores = grad_scores.to(keys.dtype)
            if grad_query is not None:
                grad_queries = multiply(grad_scores, keys, PRECISION) * scale
                if PACK > 1:
                    grad_queries += lost[:, None]
                store_map(grad_query, grad_queries, position, head, valid, HEAD_DIM, CHANNELS)
            if grad_key is not None:
                grad_keys = multiply(tl.trans(grad_scores), queries, PRECISION) * scale
                if PACK > 1:
                    grad_keys += lost[:, None]
                store_map(grad_key, grad_keys, position, head, valid, HEAD_DIM, CHANNELS)
        following = _next(following, rectangle)
    if partial is not None:
        pair = tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + slot[:, None] * BLOCK + slot[None, :]
        tl.store(partial + pair, grad_bias)
