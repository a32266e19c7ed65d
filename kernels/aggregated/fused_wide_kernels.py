"""Triton kernels of aggregated attention for float32 heads that are too wide for registers (see slices.py).

They stand in for those of the same names in fused_kernels.py. Scores with pooled tokens are computed as often as they
are needed: there are few.
"""

import triton
import triton.language as tl

from ..slices import pair_products, store_weighted
from ..triton_common import LN_2, LOG2_E, load_logsumexp, load_statistics, multiply, softmax_step, token_pointers
from .fused_tiles import (
    box_around,
    load_local_bias,
    load_pooled_bias,
    program_of_tile,
    residues,
    store_sums_by_slot,
    store_windows,
    window_pointers,
    window_slots,
)


@triton.jit
def _score_cells(
    query, pooled_key, pooled_bias, position, cells, seen, head, tokens, token, valid, pooled, scale,
    CELLS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of queries and pooled tokens, -inf for pooled tokens that are none."""
    bias = load_pooled_bias(pooled_bias, head, tokens, token, valid, cells[1], pooled, CELLS)
    products = pair_products(query, position, valid, pooled_key, cells, seen, head, HEAD_DIM, PRECISION)
    return products * (scale * LOG2_E) + bias


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
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, images, corner, tokens, valid = program_of_tile(plan, TILE)
    box, inside = box_around(corner, plan[0], TILE, BOX, WINDOW)
    of_row, of_column, near = window_slots(TILE, BOX, WINDOW)
    local = load_local_bias(local_bias, head, of_column[None, :] - of_row[:, None], near & inside[None, :], WINDOW)
    size = plan[0][0] * plan[0][1]
    token = tokens[0] * plan[0][1] + tokens[1]
    cell = tl.arange(0, STEP)
    for image in range(images[0], images[1]):
        position, around = (image, tokens[0], tokens[1]), (image, box[0], box[1])
        products = pair_products(query, position, valid, key, around, inside, head, HEAD_DIM, PRECISION)
        scores = products * (scale * LOG2_E) + local
        nothing = tl.full([BLOCK], float("-inf"), tl.float32)
        _, largest, total, _ = softmax_step(scores, nothing, tl.zeros([BLOCK], tl.float32))
        for start in range(0, pooled, STEP):
            of_cells = _score_cells(
                query, pooled_key, pooled_bias, position, (image, start + cell), start + cell < pooled,
                head, size, token, valid, pooled, scale, CELLS, HEAD_DIM, PRECISION,
            )  # fmt: skip
            _, largest, total, _ = softmax_step(of_cells, largest, total)
        of_softmax = largest + tl.log2(total)
        tl.store(token_pointers(logsumexp, position, head), of_softmax * LN_2, mask=valid)
        weights = tl.exp2(scores - largest[:, None]) / total[:, None]
        if value_weights is not None:
            pointers, mask = window_pointers(value_weights, position, head, valid, TILE[1], 0, WINDOW, SLOTS)
            slots = residues(tl.arange(0, BOX), TILE[1] + WINDOW - 1, WINDOW, SLOTS)
            more = multiply(tl.load(pointers, mask=mask, other=0.0), tl.trans(slots), PRECISION)
            weights += tl.where(near, more, 0.0)
        store_weighted(output, position, valid, weights, value, around, inside, head, 1.0, False, HEAD_DIM, PRECISION)
        for start in range(0, pooled, STEP):
            cells, seen = (image, start + cell), start + cell < pooled
            of_cells = _score_cells(
                query, pooled_key, pooled_bias, position, cells, seen,
                head, size, token, valid, pooled, scale, CELLS, HEAD_DIM, PRECISION,
            )  # fmt: skip
            weights_of_cells = tl.exp2(of_cells - largest[:, None]) / total[:, None]
            store_weighted(
                output, position, valid, weights_of_cells, pooled_value, cells, seen, head, 1.0, True,
                HEAD_DIM, PRECISION,
            )  # fmt: skip


@triton.jit
def _weigh_cells(
    query, pooled_key, pooled_value, pooled_bias, grad_output, statistics,
    position, cells, seen, head, tokens, token, valid, pooled, scale,
    CELLS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax weights of queries and pooled tokens, and their gradients, (queries, pooled tokens) each."""
    scores = _score_cells(
        query, pooled_key, pooled_bias, position, cells, seen, head, tokens, token, valid, pooled, scale,
        CELLS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    of_weights = pair_products(grad_output, position, valid, pooled_value, cells, seen, head, HEAD_DIM, PRECISION)
    return tl.exp2(scores - statistics), of_weights


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
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, images, corner, tokens, valid = program_of_tile(plan, TILE)
    box, inside = box_around(corner, plan[0], TILE, BOX, WINDOW)
    of_row, of_column, near = window_slots(TILE, BOX, WINDOW)
    local = load_local_bias(local_bias, head, of_column[None, :] - of_row[:, None], near & inside[None, :], WINDOW)
    size = plan[0][0] * plan[0][1]
    token = tokens[0] * plan[0][1] + tokens[1]
    cell = tl.arange(0, STEP)
    for image in range(images[0], images[1]):
        position, around = (image, tokens[0], tokens[1]), (image, box[0], box[1])
        statistics = load_logsumexp(logsumexp, position, head, valid)[:, None]
        products = pair_products(query, position, valid, key, around, inside, head, HEAD_DIM, PRECISION)
        weights = tl.exp2(products * (scale * LOG2_E) + (local - statistics))
        of_weights = pair_products(grad_output, position, valid, value, around, inside, head, HEAD_DIM, PRECISION)
        if grad_value_weights is not None:
            store_windows(
                grad_value_weights, tl.where(near, of_weights, 0.0), position, head, valid, tl.float32,
                TILE, BOX, WINDOW, SLOTS, PRECISION,
            )  # fmt: skip
        deltas = tl.sum(weights * of_weights, 1)
        total = tl.sum(weights, 1)
        for start in range(0, pooled, STEP):
            of_cells, of_their_weights = _weigh_cells(
                query, pooled_key, pooled_value, pooled_bias, grad_output, statistics,
                position, (image, start + cell), start + cell < pooled,
                head, size, token, valid, pooled, scale, CELLS, HEAD_DIM, PRECISION,
            )  # fmt: skip
            deltas += tl.sum(of_cells * of_their_weights, 1)
            total += tl.sum(of_cells, 1)
        deltas = deltas / total
        tl.store(token_pointers(delta, position, head), deltas, mask=valid)
        if grad_query is not None:
            of_scores = weights * (of_weights - deltas[:, None])
            store_weighted(
                grad_query, position, valid, of_scores, key, around, inside, head, scale, False, HEAD_DIM, PRECISION
            )
            for start in range(0, pooled, STEP):
                cells, seen = (image, start + cell), start + cell < pooled
                of_cells, of_their_weights = _weigh_cells(
                    query, pooled_key, pooled_value, pooled_bias, grad_output, statistics, position, cells, seen,
                    head, size, token, valid, pooled, scale, CELLS, HEAD_DIM, PRECISION,
                )  # fmt: skip
                of_their_scores = of_cells * (of_their_weights - deltas[:, None])
                store_weighted(
                    grad_query, position, valid, of_their_scores, pooled_key, cells, seen, head, scale, True,
                    HEAD_DIM, PRECISION,
                )  # fmt: skip


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
    PRECISION: tl.constexpr,
):
    head, images, corner, tokens, valid = program_of_tile(plan, TILE)
    box, inside = box_around(corner, plan[0], TILE, BOX, WINDOW)
    of_row, of_column, near = window_slots(TILE, BOX, WINDOW)
    of_column = WINDOW * WINDOW - 1 - of_column
    visible = near & valid[:, None] & inside[None, :]
    local = load_local_bias(local_bias, head, of_column[None, :] + of_row[:, None], visible, WINDOW)
    of_bias = tl.zeros([BLOCK, BOX], tl.float32)
    for image in range(images[0], images[1]):
        position, asking = (image, tokens[0], tokens[1]), (image, box[0], box[1])
        statistics, deltas = load_statistics(logsumexp, delta, asking, head, inside)
        products = pair_products(key, position, valid, query, asking, inside, head, HEAD_DIM, PRECISION)
        weights = tl.exp2(products * (scale * LOG2_E) + (local - statistics[None, :]))
        of_weights = pair_products(value, position, valid, grad_output, asking, inside, head, HEAD_DIM, PRECISION)
        of_scores = weights * (of_weights - deltas[None, :])
        if partial is not None:
            of_bias += of_scores
        if grad_key is not None:
            store_weighted(
                grad_key, position, valid, of_scores, query, asking, inside, head, scale, False, HEAD_DIM, PRECISION
            )
        if grad_value is not None:
            if value_weights is not None:
                pointers, mask = window_pointers(
                    value_weights, asking, head, inside, TILE[1] + WINDOW - 1, 1, WINDOW, SLOTS
                )
                of_window = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                slots = residues(tl.arange(0, BLOCK), TILE[1], WINDOW, SLOTS)
                weights += tl.where(visible, multiply(slots, tl.trans(of_window), PRECISION), 0.0)
            store_weighted(
                grad_value, position, valid, weights, grad_output, asking, inside, head, 1.0, False,
                HEAD_DIM, PRECISION,
            )  # fmt: skip
    if partial is not None:
        store_sums_by_slot(partial, of_bias, TILE, BOX, WINDOW, SLOTS)
