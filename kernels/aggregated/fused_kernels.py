"""Triton kernels of aggregated attention. A tile of tokens meets the box of tokens around it, and the pooled tokens, in
matrix products: of the 64 columns of a box around 4x8 tokens nine count for each row, yet a product with them costs a
fraction of nine passes over channels. Which count, and the biases, is the same for all images: a program keeps it in
registers and goes through images. The last two kernels own pooled tokens or their biases.
"""

import triton
import triton.language as tl

from ..triton_common import (
    LN_2,
    accumulate,
    load_lse,
    load_lse_and_delta,
    load_map,
    load_maps,
    multiply,
    score,
    softmax_step,
    start_softmax,
    store_map,
    token_pointers,
    weigh,
)
from .fused_kernels_geometry import (
    box_around,
    load_local_bias,
    load_pooled_bias,
    max_rows,
    program_of_tile,
    residues,
    store_sums_by_slot,
    store_windows,
    sum_rows,
    window_pointers,
    window_slots,
)


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
    SLOTS: tl.constexpr,
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
    head, images, corner, tokens, valid = program_of_tile(plan, TILE)
    box, inside = box_around(corner, plan.size, TILE, BOX, WINDOW)
    row_slot, column_slot, near = window_slots(TILE, BOX, WINDOW)
    local = load_local_bias(local_bias, head, column_slot[None, :] - row_slot[:, None], near & inside[None, :], WINDOW)
    token = tokens[0] * plan.size[1] + tokens[1]
    cell = tl.arange(0, STEP)
    for image in range(images[0], images[1]):
        position = (image, tokens[0], tokens[1])
        # loads in the order that keeps the fewest registers in use, which Hopper's entry of the table needs
        around = (image, box[0], box[1])
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        keys = load_map(key, around, head, inside, HEAD_DIM, CHANNELS)
        if value_weights is not None:
            pointers, mask = window_pointers(value_weights, position, head, valid, TILE[1], 0, WINDOW, SLOTS)
            window_weights = tl.load(pointers, mask=mask, other=0.0)
        scores = score(queries, keys, local, scale, PRECISION)
        if WHOLE:
            bias = load_pooled_bias(pooled_bias, head, plan.size[0] * plan.size[1], token, valid, cell, pooled, CELLS)
            pooled_keys, pooled_values = load_maps(
                pooled_key, pooled_value, (image, cell), head, cell < pooled, HEAD_DIM, CHANNELS
            )
            pooled_scores = score(queries, pooled_keys, bias, scale, PRECISION)
            largest = max_rows(scores, pooled_scores)
            weights = tl.exp2(scores - largest[:, None])
            pooled_weights = tl.exp2(pooled_scores - largest[:, None])
            total = sum_rows(weights, pooled_weights)
            sums = multiply(pooled_weights, pooled_values, PRECISION)
        else:
            state = start_softmax(BLOCK, CHANNELS)
            for start in range(0, pooled, STEP):
                block = start + cell
                pooled_keys, pooled_values = load_maps(
                    pooled_key, pooled_value, (image, block), head, block < pooled, HEAD_DIM, CHANNELS
                )
                bias = load_pooled_bias(
                    pooled_bias, head, plan.size[0] * plan.size[1], token, valid, block, pooled, CELLS
                )
                pooled_scores = score(queries, pooled_keys, bias, scale, PRECISION)
                state = accumulate(state, pooled_scores, pooled_values, PRECISION)
            largest, total, sums = state
            weights, largest, total, decay = softmax_step(scores, largest, total)
            sums *= decay[:, None]
        values = load_map(value, around, head, inside, HEAD_DIM, CHANNELS)
        if value_weights is None:
            sums = (sums + multiply(weights, values, PRECISION)) * (1 / total)[:, None]
        else:
            slots = residues(tl.arange(0, BOX), TILE[1] + WINDOW - 1, WINDOW, SLOTS)
            more = multiply(window_weights, tl.trans(slots.to(keys.dtype)), PRECISION)
            weights = weights * (1 / total)[:, None] + tl.where(near, more, 0.0)
            sums = sums * (1 / total)[:, None] + multiply(weights, values, PRECISION)
        store_map(output, sums, position, head, valid, HEAD_DIM, CHANNELS)
        tl.store(token_pointers(logsumexp, position, head), (largest + tl.log2(total)) * LN_2, mask=valid)


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
    SLOTS: tl.constexpr,
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
    head, images, corner, tokens, valid = program_of_tile(plan, TILE)
    box, inside = box_around(corner, plan.size, TILE, BOX, WINDOW)
    row_slot, column_slot, near = window_slots(TILE, BOX, WINDOW)
    local = load_local_bias(local_bias, head, column_slot[None, :] - row_slot[:, None], near & inside[None, :], WINDOW)
    token = tokens[0] * plan.size[1] + tokens[1]
    cell = tl.arange(0, STEP)
    for image in range(images[0], images[1]):
        position = (image, tokens[0], tokens[1])
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        lse = load_lse(logsumexp, position, head, valid)[:, None]
        keys, values = load_maps(key, value, (image, box[0], box[1]), head, inside, HEAD_DIM, CHANNELS)
        weights, grad_weights = weigh(queries, keys, grads, values, local - lse, scale, PRECISION)
        if grad_value_weights is not None:
            store_windows(
                grad_value_weights, tl.where(near, grad_weights, 0.0), position, head, valid, keys.dtype,
                TILE, BOX, WINDOW, SLOTS, PRECISION,
            )  # fmt: skip
        if WHOLE:
            bias = load_pooled_bias(pooled_bias, head, plan.size[0] * plan.size[1], token, valid, cell, pooled, CELLS)
            pooled_keys, pooled_values = load_maps(
                pooled_key, pooled_value, (image, cell), head, cell < pooled, HEAD_DIM, CHANNELS
            )
            pooled_weights, grad_pooled_weights = weigh(
                queries, pooled_keys, grads, pooled_values, bias - lse, scale, PRECISION
            )
            deltas = sum_rows(weights * grad_weights, pooled_weights * grad_pooled_weights)
            total = sum_rows(weights, pooled_weights)
        else:
            deltas = tl.sum(weights * grad_weights, 1)
            total = tl.sum(weights, 1)
            for start in range(0, pooled, STEP):
                block = start + cell
                pooled_keys, pooled_values = load_maps(
                    pooled_key, pooled_value, (image, block), head, block < pooled, HEAD_DIM, CHANNELS
                )
                bias = load_pooled_bias(
                    pooled_bias, head, plan.size[0] * plan.size[1], token, valid, block, pooled, CELLS
                )
                pooled_weights, grad_pooled_weights = weigh(
                    queries, pooled_keys, grads, pooled_values, bias - lse, scale, PRECISION
                )
                deltas += tl.sum(pooled_weights * grad_pooled_weights, 1)
                total += tl.sum(pooled_weights, 1)
        deltas = deltas / total
        tl.store(token_pointers(delta, position, head), deltas, mask=valid)
        if grad_query is not None:
            sums = multiply(weights * (grad_weights - deltas[:, None]), keys, PRECISION)
            if WHOLE:
                sums += multiply(pooled_weights * (grad_pooled_weights - deltas[:, None]), pooled_keys, PRECISION)
            else:
                for start in range(0, pooled, STEP):
                    block = start + cell
                    pooled_keys, pooled_values = load_maps(
                        pooled_key, pooled_value, (image, block), head, block < pooled, HEAD_DIM, CHANNELS
                    )
                    bias = load_pooled_bias(
                        pooled_bias, head, plan.size[0] * plan.size[1], token, valid, block, pooled, CELLS
                    )
                    pooled_weights, grad_pooled_weights = weigh(
                        queries, pooled_keys, grads, pooled_values, bias - lse, scale, PRECISION
                    )
                    sums += multiply(pooled_weights * (grad_pooled_weights - deltas[:, None]), pooled_keys, PRECISION)
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
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of keys and values of the map, and its part of that of the local bias.

    Keys are the rows, the box of queries around them the columns: a window is as wide to either side, so the slot of a
    key in the window of a query is that of the query in the window of the key, counted from the end.
    """
    width: tl.constexpr = TILE[1] + WINDOW - 1
    head, images, corner, tokens, valid = program_of_tile(plan, TILE)
    box, inside = box_around(corner, plan.size, TILE, BOX, WINDOW)
    row_slot, column_slot, near = window_slots(TILE, BOX, WINDOW)
    column_slot = WINDOW * WINDOW - 1 - column_slot
    visible = near & valid[:, None] & inside[None, :]
    local = load_local_bias(local_bias, head, column_slot[None, :] + row_slot[:, None], visible, WINDOW)
    grad_bias = tl.zeros([BLOCK, BOX], tl.float32)
    for image in range(images[0], images[1]):
        position, asking = (image, tokens[0], tokens[1]), (image, box[0], box[1])
        if value_weights is not None and grad_value is not None:
            pointers, mask = window_pointers(value_weights, asking, head, inside, width, 1, WINDOW, SLOTS)
            window_weights = tl.load(pointers, mask=mask, other=0.0).to(query.pointer.dtype.element_ty)
        keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
        queries, grads = load_maps(query, grad_output, asking, head, inside, HEAD_DIM, CHANNELS)
        lse, deltas = load_lse_and_delta(logsumexp, delta, asking, head, inside)
        weights, grad_weights = weigh(keys, queries, values, grads, local - lse[None, :], scale, PRECISION)
        grad_scores = weights * (grad_weights - deltas[None, :])
        if partial is not None:
            grad_bias += grad_scores
        if grad_key is not None:
            grad_keys = multiply(grad_scores, queries, PRECISION) * scale
            store_map(grad_key, grad_keys, position, head, valid, HEAD_DIM, CHANNELS)
        if grad_value is not None:
            if value_weights is not None:
                slots = residues(tl.arange(0, BLOCK), TILE[1], WINDOW, SLOTS)
                weights += tl.where(visible, multiply(slots, tl.trans(window_weights), PRECISION), 0.0)
            store_map(grad_value, multiply(weights, grads, PRECISION), position, head, valid, HEAD_DIM, CHANNELS)
    if partial is not None:
        store_sums_by_slot(partial, grad_bias, TILE, BOX, WINDOW, SLOTS)


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
    """What some runs of queries, which follow each other row by row, add to the gradients of pooled tokens."""
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(pooled, STEP)
    image = tl.program_id(0) // (heads * blocks) % batch
    part = tl.program_id(0) // (heads * blocks * batch)
    slot = tl.program_id(0) // heads % blocks * STEP + tl.arange(0, STEP)
    seen = slot < pooled
    keys, values = load_maps(pooled_key, pooled_value, (image, slot), head, seen, HEAD_DIM, CHANNELS)
    grad_keys = tl.zeros([STEP, CHANNELS], tl.float32)
    grad_values = tl.zeros([STEP, CHANNELS], tl.float32)
    first = part * runs_per_program
    for index in range(first, tl.minimum(first + runs_per_program, tl.cdiv(tokens, BLOCK))):
        token = index * BLOCK + tl.arange(0, BLOCK)
        valid = token < tokens
        queries, grads = load_maps(query, grad_output, (image, token), head, valid, HEAD_DIM, CHANNELS)
        lse, deltas = load_lse_and_delta(logsumexp, delta, (image, token), head, valid)
        lse = tl.where(valid, lse, float("inf"))[:, None]  # a weight of 0 where there is no query
        bias = load_pooled_bias(pooled_bias, head, tokens, token, valid, slot, pooled, CELLS)
        weights, grad_weights = weigh(queries, keys, grads, values, bias - lse, scale, PRECISION)
        if partial_key is not None:
            grad_scores = (weights * (grad_weights - deltas[:, None])).to(queries.dtype)
            grad_keys += multiply(tl.trans(grad_scores), queries, PRECISION)
        if partial_value is not None:
            grad_values += multiply(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
    position = (tl.program_id(0) // (heads * blocks), slot)  # each part of the runs has an image of its own
    if partial_key is not None:
        store_map(partial_key, grad_keys * scale, position, head, seen, HEAD_DIM, CHANNELS)
    if partial_value is not None:
        store_map(partial_value, grad_values, position, head, seen, HEAD_DIM, CHANNELS)


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
        lse, deltas = load_lse_and_delta(logsumexp, delta, (image, token), head, valid)
        weights, grad_weights = weigh(queries, keys, grads, values, bias - lse[:, None], scale, PRECISION)
        sums += weights * (grad_weights - deltas[:, None])
    row = (part * heads + head).to(tl.int64) * tokens + token
    tl.store(partial + row[:, None] * pooled + slot[None, :], sums, mask=valid[:, None] & seen[None, :])
