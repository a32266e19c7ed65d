"""Triton kernels of aggregated attention. A tile of tokens meets the box of tokens around it, and the pooled tokens, in
matrix products: of the 64 columns of a box around 4x8 tokens nine count for each row, yet a product with them costs a
fraction of nine passes over channels. Which count, and the biases, is the same for all images: a program keeps it in
registers and goes through images.
"""

import triton
import triton.language as tl

from ..triton_common import (
    LN_2,
    LOG2_E,
    load_logsumexp,
    load_map,
    load_maps,
    load_statistics,
    multiply,
    softmax_step,
    store_map,
    token_pointers,
)


@triton.jit
def _program(plan, TILE: tl.constexpr):
    """What a program owns: a head, the first and last image, a tile's row and column, its tokens, which exist."""
    size, tiles, batch, heads, share = plan
    index = tl.program_id(0) // heads
    tile = index % (tiles[0] * tiles[1])
    first = index // (tiles[0] * tiles[1]) * share
    corner = (tile // tiles[1] * TILE[0], tile % tiles[1] * TILE[1])
    slot = tl.arange(0, TILE[0] * TILE[1])
    tokens = (corner[0] + slot // TILE[1], corner[1] + slot % TILE[1])
    return tl.program_id(0) % heads, (first, tl.minimum(first + share, batch)), corner, tokens, _inside(tokens, size)


@triton.jit
def _inside(tokens, size):
    y, x = tokens
    return (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])


@triton.jit
def _box(corner, size, TILE: tl.constexpr, BOX: tl.constexpr, WINDOW: tl.constexpr):
    """The tokens of the box around a tile, padded to a power of two, and which of them the map has."""
    slot = tl.arange(0, BOX)
    width: tl.constexpr = TILE[1] + WINDOW - 1
    tokens = (corner[0] - WINDOW // 2 + slot // width, corner[1] - WINDOW // 2 + slot % width)
    return tokens, _inside(tokens, size) & (slot // width < TILE[0] + WINDOW - 1)


@triton.jit
def _slots(TILE: tl.constexpr, BOX: tl.constexpr, WINDOW: tl.constexpr):
    """For tokens of a tile (rows) and of its box: which lie in the window around the row, and in which slot of it.

    Returns:
        of_row, of_column: the slot is of_column - of_row, in two parts that take fewer registers than a tile of slots.
    """
    token = tl.arange(0, TILE[0] * TILE[1])
    other = tl.arange(0, BOX)
    width: tl.constexpr = TILE[1] + WINDOW - 1
    y = (other // width)[None, :] - (token // TILE[1])[:, None]
    x = (other % width)[None, :] - (token % TILE[1])[:, None]
    near = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW)
    of_row = token // TILE[1] * WINDOW + token % TILE[1]
    return of_row, other // width * WINDOW + other % width, near


@triton.jit
def _local_bias(bias, head, slot, visible, WINDOW: tl.constexpr):
    """In base 2, -inf where tokens do not see each other."""
    result = tl.where(visible, 0.0, float("-inf"))
    if bias is not None:
        entry = tl.load(bias + head * (WINDOW * WINDOW) + slot, mask=visible, other=float("-inf"))
        result = entry.to(tl.float32) * LOG2_E
    return result


@triton.jit
def _pooled_bias(bias, head, tokens, token, valid, slot, pooled, CELLS: tl.constexpr):
    """In base 2, of tokens of the map (rows) and pooled ones: -inf for pooled tokens that are none.

    Args:
        bias: (heads, tokens, CELLS), whose last entries are -inf already, or None.
    """
    result = tl.where(slot < pooled, 0.0, float("-inf"))[None, :]
    if bias is not None:
        row = tl.cast(head, tl.int64) * tokens + tl.where(valid, token, 0)
        result = tl.load(bias + row[:, None] * CELLS + slot[None, :]).to(tl.float32) * LOG2_E
    return result


@triton.jit
def _scores(queries, keys, bias, scale, PRECISION: tl.constexpr):
    """In base 2."""
    return tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E) + bias


@triton.jit
def _attend(state, queries, keys, values, bias, scale, PRECISION: tl.constexpr):
    """The online softmax with one more block of keys."""
    largest, total, sums = state
    scores = _scores(queries, keys, bias, scale, PRECISION)
    weights, largest, total, decay = softmax_step(scores, largest, total)
    return largest, total, sums * decay[:, None] + multiply(weights, values, PRECISION)


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
    scale,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    STEP: tl.constexpr,
    CELLS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, images, corner, tokens, valid = _program(plan, TILE)
    box, inside = _box(corner, plan[0], TILE, BOX, WINDOW)
    of_row, of_column, near = _slots(TILE, BOX, WINDOW)
    local = _local_bias(local_bias, head, of_column[None, :] - of_row[:, None], near & inside[None, :], WINDOW)
    token = tokens[0] * plan[0][1] + tokens[1]
    cell = tl.arange(0, STEP)
    for image in range(images[0], images[1]):
        position = (image, tokens[0], tokens[1])
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, (image, box[0], box[1]), head, inside, HEAD_DIM, CHANNELS)
        scores = _scores(queries, keys, local, scale, PRECISION)
        nothing = tl.full([BLOCK], float("-inf"), tl.float32)
        weights, largest, total, _ = softmax_step(scores, nothing, tl.zeros([BLOCK], tl.float32))
        state = (largest, total, multiply(weights, values, PRECISION))
        if WHOLE:
            bias = _pooled_bias(pooled_bias, head, plan[0][0] * plan[0][1], token, valid, cell, pooled, CELLS)
            keys_of_cells, values_of_cells = load_maps(
                pooled_key, pooled_value, (image, cell), head, cell < pooled, HEAD_DIM, CHANNELS
            )
            state = _attend(state, queries, keys_of_cells, values_of_cells, bias, scale, PRECISION)
        else:
            for start in range(0, pooled, STEP):
                block = start + cell
                keys_of_cells, values_of_cells = load_maps(
                    pooled_key, pooled_value, (image, block), head, block < pooled, HEAD_DIM, CHANNELS
                )
                bias = _pooled_bias(pooled_bias, head, plan[0][0] * plan[0][1], token, valid, block, pooled, CELLS)
                state = _attend(state, queries, keys_of_cells, values_of_cells, bias, scale, PRECISION)
        largest, total, sums = state
        sums = sums * (1 / total)[:, None]
        if value_weights is not None:
            pointers = (token_pointers(value_weights, position, head) - of_row)[:, None] + of_column[None, :]
            more = tl.load(pointers, mask=near & valid[:, None], other=0.0)
            sums += multiply(more, values, PRECISION)
        store_map(output, sums, position, head, valid, HEAD_DIM, CHANNELS)
        tl.store(token_pointers(logsumexp, position, head), (largest + tl.log2(total)) * LN_2, mask=valid)


@triton.jit
def _weigh(queries, keys, grads, values, bias, statistics, scale, PRECISION: tl.constexpr):
    """Softmax weights of pairs, and their gradients; -inf in the bias gives a weight of 0."""
    weights = tl.exp2(_scores(queries, keys, bias - statistics, scale, PRECISION))
    return weights, multiply(grads, tl.trans(values), PRECISION)


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
    plan,
    pooled,
    scale,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    STEP: tl.constexpr,
    CELLS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of queries and of its value weights.

    Also delta, the mean of the gradients of the softmax weights. The sum of output times gradient would not do: with
    value_weights it is another number, and the rounding of the output does not cancel where a weight is near 1. The sum
    of the weights, which delta is divided by, is 1 but for the rounding of the logsumexp.
    """
    head, images, corner, tokens, valid = _program(plan, TILE)
    box, inside = _box(corner, plan[0], TILE, BOX, WINDOW)
    of_row, of_column, near = _slots(TILE, BOX, WINDOW)
    local = _local_bias(local_bias, head, of_column[None, :] - of_row[:, None], near & inside[None, :], WINDOW)
    token = tokens[0] * plan[0][1] + tokens[1]
    cell = tl.arange(0, STEP)
    for image in range(images[0], images[1]):
        position = (image, tokens[0], tokens[1])
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        statistics = load_logsumexp(logsumexp, position, head, valid)[:, None]
        keys, values = load_maps(key, value, (image, box[0], box[1]), head, inside, HEAD_DIM, CHANNELS)
        weights, of_weights = _weigh(queries, keys, grads, values, local, statistics, scale, PRECISION)
        deltas = tl.sum(weights * of_weights, 1)
        total = tl.sum(weights, 1)
        if grad_value_weights is not None:
            pointers = (token_pointers(grad_value_weights, position, head) - of_row)[:, None] + of_column[None, :]
            element = grad_value_weights.pointer.dtype.element_ty
            tl.store(pointers, of_weights.to(element), mask=near & valid[:, None])
        if WHOLE:
            bias = _pooled_bias(pooled_bias, head, plan[0][0] * plan[0][1], token, valid, cell, pooled, CELLS)
            keys_of_cells, values_of_cells = load_maps(
                pooled_key, pooled_value, (image, cell), head, cell < pooled, HEAD_DIM, CHANNELS
            )
            of_cells, of_their_weights = _weigh(
                queries, keys_of_cells, grads, values_of_cells, bias, statistics, scale, PRECISION
            )
            deltas += tl.sum(of_cells * of_their_weights, 1)
            total += tl.sum(of_cells, 1)
        else:
            for start in range(0, pooled, STEP):
                block = start + cell
                keys_of_cells, values_of_cells = load_maps(
                    pooled_key, pooled_value, (image, block), head, block < pooled, HEAD_DIM, CHANNELS
                )
                bias = _pooled_bias(pooled_bias, head, plan[0][0] * plan[0][1], token, valid, block, pooled, CELLS)
                of_cells, of_their_weights = _weigh(
                    queries, keys_of_cells, grads, values_of_cells, bias, statistics, scale, PRECISION
                )
                deltas += tl.sum(of_cells * of_their_weights, 1)
                total += tl.sum(of_cells, 1)
        deltas = deltas / total
        tl.store(token_pointers(delta, position, head), deltas, mask=valid)
        if grad_query is not None:
            sums = multiply(weights * (of_weights - deltas[:, None]), keys, PRECISION)
            if WHOLE:
                sums += multiply(of_cells * (of_their_weights - deltas[:, None]), keys_of_cells, PRECISION)
            else:
                for start in range(0, pooled, STEP):
                    block = start + cell
                    keys_of_cells, values_of_cells = load_maps(
                        pooled_key, pooled_value, (image, block), head, block < pooled, HEAD_DIM, CHANNELS
                    )
                    bias = _pooled_bias(pooled_bias, head, plan[0][0] * plan[0][1], token, valid, block, pooled, CELLS)
                    of_cells, of_their_weights = _weigh(
                        queries, keys_of_cells, grads, values_of_cells, bias, statistics, scale, PRECISION
                    )
                    sums += multiply(of_cells * (of_their_weights - deltas[:, None]), keys_of_cells, PRECISION)
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
    partial,
    plan,
    scale,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of keys and values of the map, and its share in that of the local bias.

    Keys are the rows, the box of queries around them the columns: a window is as wide to either side, so the slot of a
    key in the window of a query is that of the query in the window of the key, counted from the end.
    """
    head, images, corner, tokens, valid = _program(plan, TILE)
    box, inside = _box(corner, plan[0], TILE, BOX, WINDOW)
    of_row, of_column, near = _slots(TILE, BOX, WINDOW)
    of_column = WINDOW * WINDOW - 1 - of_column
    visible = near & valid[:, None] & inside[None, :]
    local = _local_bias(local_bias, head, of_column[None, :] + of_row[:, None], visible, WINDOW)
    of_bias = tl.zeros([BLOCK, BOX], tl.float32)
    for image in range(images[0], images[1]):
        position, asking = (image, tokens[0], tokens[1]), (image, box[0], box[1])
        keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
        queries, grads = load_maps(query, grad_output, asking, head, inside, HEAD_DIM, CHANNELS)
        statistics, deltas = load_statistics(logsumexp, delta, asking, head, inside)
        weights, of_weights = _weigh(keys, queries, values, grads, local, statistics[None, :], scale, PRECISION)
        of_scores = weights * (of_weights - deltas[None, :])
        if partial is not None:
            of_bias += of_scores
        if grad_key is not None:
            of_keys = multiply(of_scores, queries, PRECISION) * scale
            store_map(grad_key, of_keys, position, head, valid, HEAD_DIM, CHANNELS)
        if grad_value is not None:
            if value_weights is not None:
                pointers = (token_pointers(value_weights, asking, head) + of_column)[None, :] + of_row[:, None]
                weights += tl.load(pointers, mask=visible, other=0.0).to(tl.float32)
            store_map(grad_value, multiply(weights, grads, PRECISION), position, head, valid, HEAD_DIM, CHANNELS)
    if partial is not None:
        token = tl.arange(0, BLOCK)
        width: tl.constexpr = TILE[1] + WINDOW - 1
        for index in range(0, WINDOW * WINDOW):
            other = (token // TILE[1] + index // WINDOW) * width + token % TILE[1] + index % WINDOW
            share = tl.where(other[:, None] == tl.arange(0, BOX)[None, :], of_bias, 0.0)
            entry = tl.program_id(0).to(tl.int64) * (WINDOW * WINDOW) + WINDOW * WINDOW - 1 - index
            tl.store(partial + entry, tl.sum(tl.sum(share, 1), 0))


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
        bias = _pooled_bias(pooled_bias, head, tokens, token, valid, slot, pooled, CELLS)
        weights, of_weights = _weigh(queries, keys, grads, values, bias, statistics, scale, PRECISION)
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
    bias = _pooled_bias(pooled_bias, head, tokens, token, valid, slot, pooled, CELLS)
    sums = tl.zeros([BLOCK, STEP], tl.float32)
    first = part * images_per_program
    for image in range(first, tl.minimum(first + images_per_program, batch)):
        queries, grads = load_maps(query, grad_output, (image, token), head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(pooled_key, pooled_value, (image, slot), head, seen, HEAD_DIM, CHANNELS)
        statistics, deltas = load_statistics(logsumexp, delta, (image, token), head, valid)
        weights, of_weights = _weigh(queries, keys, grads, values, bias, statistics[:, None], scale, PRECISION)
        sums += weights * (of_weights - deltas[:, None])
    row = (part * heads + head).to(tl.int64) * tokens + token
    tl.store(partial + row[:, None] * pooled + slot[None, :], sums, mask=valid[:, None] & seen[None, :])
