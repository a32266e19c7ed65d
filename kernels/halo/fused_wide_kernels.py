"""Triton kernel of halo attention for float32 heads that are too wide for registers (see slices.py)."""

import triton
import triton.language as tl

from ..slices import SLICE, load_slice, pair_products, store_weighted, sum_products
from ..triton_common import LOG2_E, load_logsumexp, multiply
from .fused_kernels import (
    add_lines,
    cells_of_window,
    column_logits,
    outer_sum,
    program_of_block,
    row_logits,
    tokens_of_block,
)


@triton.jit
def _weigh_strip(
    query, grad_output, of_softmax, key, value, height, of_columns,
    top, left, position, head, valid, block, size, scale,
    SIDES: tl.constexpr, MASK_PADDING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row and column of the cells of a strip, where they lie in the map, and which of them do; their weights (queries,
    cells) and the gradients of these. of_columns lacks the logsumexp.
    """
    slot = tl.arange(0, ROWS * COLUMNS)
    row, column = top + slot // COLUMNS, left + slot % COLUMNS
    cells, inside = cells_of_window(row, column, block, size, SIDES)
    rows = top + tl.arange(0, ROWS)
    of_rows = row_logits(height, rows, position, head, valid, block, size, SIDES, MASK_PADDING) - of_softmax[:, None]
    bias = outer_sum(of_rows, of_columns, QUERIES, ROWS, COLUMNS)
    products = pair_products(query, position, valid, key, cells, inside, head, HEAD_DIM, PRECISION)
    weights = tl.exp2(products * (scale * LOG2_E) + bias)
    of_weights = pair_products(grad_output, position, valid, value, cells, inside, head, VALUE_DIM, PRECISION)
    return row, column, cells, inside, weights, of_weights


@triton.jit
def _mean_gradients(
    query, grad_output, of_softmax, key, value, height, width, position, head, valid, block, size, scale,
    SIDES: tl.constexpr, MASK_PADDING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Delta of queries that may see few keys, in a pass of its own through the window."""
    SIDE: tl.constexpr = SIDES[1] + 2 * SIDES[2]
    sums = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for left in tl.static_range(0, SIDE, COLUMNS):
        columns = left + tl.arange(0, COLUMNS)
        of_columns = column_logits(width, columns, position, head, valid, block, size, SIDES, MASK_PADDING)
        for top in range(0, SIDE, ROWS):
            _, _, _, _, weights, of_weights = _weigh_strip(
                query, grad_output, of_softmax, key, value, height, of_columns,
                top, left, position, head, valid, block, size, scale,
                SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS, HEAD_DIM, VALUE_DIM, PRECISION,
            )  # fmt: skip
            sums += tl.sum(weights * of_weights, 1)
            total += tl.sum(weights, 1)
    return sums / total


@triton.jit
def _store_strip(
    window, weights, source, position, valid, head, row, column, scale,
    SIDES: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of cells, weights (cells, queries) times the source, of a window that begins at `window`."""
    side: tl.constexpr = SIDES[1] + 2 * SIDES[2]
    for first in range(0, DIM, SLICE):
        channel = first + tl.arange(0, SLICE)
        pointers = window + ((row * side + column) * DIM)[:, None] + channel[None, :]
        mask = ((row < side) & (column < side))[:, None] & (channel < DIM)[None, :]
        sums = multiply(weights, load_slice(source, position, head, valid, first, DIM), PRECISION) * scale
        tl.store(pointers, sums, mask=mask)


@triton.jit
def _differentiate_strip(
    of_width, query, grad_output, of_softmax, delta, key, value, height, of_columns,
    grad_query, grad_height, window_keys, window_values, top, left, position, head, valid, block, size, scale,
    SIDES: tl.constexpr, MASK_PADDING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits of columns with the cells of one more strip; the others are written."""
    side: tl.constexpr = SIDES[1] + 2 * SIDES[2]
    row, column, cells, inside, weights, of_weights = _weigh_strip(
        query, grad_output, of_softmax, key, value, height, of_columns,
        top, left, position, head, valid, block, size, scale,
        SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS, HEAD_DIM, VALUE_DIM, PRECISION,
    )  # fmt: skip
    of_scores = weights * (of_weights - delta[:, None])
    if grad_query is not None:
        store_weighted(
            grad_query, position, valid, of_scores, key, cells, inside, head, scale, top + left > 0, HEAD_DIM, PRECISION
        )
    by_row_and_column = tl.reshape(of_scores, [QUERIES, ROWS, COLUMNS])
    if grad_height is not None:
        lines = top + tl.arange(0, ROWS)
        add_lines(grad_height, tl.sum(by_row_and_column, 2), lines, position, head, valid, left > 0, side)
    if window_keys is not None:
        of_pairs = tl.trans(of_scores)
        _store_strip(
            window_keys, of_pairs, query, position, valid, head, row, column, scale, SIDES, HEAD_DIM, PRECISION
        )
    if window_values is not None:
        of_pairs = tl.trans(weights)
        _store_strip(
            window_values, of_pairs, grad_output, position, valid, head, row, column, 1.0, SIDES, VALUE_DIM, PRECISION
        )
    return of_width + tl.sum(by_row_and_column, 1)


@triton.jit(do_not_specialize=["first"])
def backward_query_kernel(
    query,
    key,
    value,
    height,
    width,
    grad_output,
    output,
    logsumexp,
    grad_query,
    grad_height,
    grad_width,
    window_keys,
    window_values,
    first,
    plan,
    heads,
    scale,
    SIDES: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    FEW_KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As the kernel of the same name of heads that fit into registers."""
    SIDE: tl.constexpr = SIDES[1] + 2 * SIDES[2]
    ROWS: tl.constexpr = BLOCK // COLUMNS
    size, blocks = plan
    head, part, block = program_of_block(heads, blocks, PARTS)
    block = (first + block[0], block[1], block[2])
    position, valid = tokens_of_block(part * QUERIES + tl.arange(0, QUERIES), block, SIDES[0])
    of_softmax = load_logsumexp(logsumexp, position, head, valid)
    if FEW_KEYS:
        delta = _mean_gradients(
            query, grad_output, of_softmax, key, value, height, width, position, head, valid, block, size, scale,
            SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS, HEAD_DIM, VALUE_DIM, PRECISION,
        )  # fmt: skip
    else:
        delta = sum_products(grad_output, output, position, head, valid, VALUE_DIM)
    window = tl.program_id(0).to(tl.int64) * (SIDE * SIDE)
    if window_keys is not None:
        window_keys += window * HEAD_DIM
    if window_values is not None:
        window_values += window * VALUE_DIM
    for left in tl.static_range(0, SIDE, COLUMNS):
        columns = left + tl.arange(0, COLUMNS)
        of_columns = column_logits(width, columns, position, head, valid, block, size, SIDES, MASK_PADDING)
        of_width = tl.zeros([QUERIES, COLUMNS], tl.float32)
        for top in range(0, SIDE, ROWS):
            of_width = _differentiate_strip(
                of_width, query, grad_output, of_softmax, delta, key, value, height, of_columns,
                grad_query, grad_height, window_keys, window_values,
                top, left, position, head, valid, block, size, scale,
                SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS, HEAD_DIM, VALUE_DIM, PRECISION,
            )  # fmt: skip
        if grad_width is not None:
            add_lines(grad_width, of_width, columns, position, head, valid, False, SIDE)
