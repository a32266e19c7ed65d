"""Kernels of fused halo attention (see fused.py): attention and its gradients, a strip of a window at a time."""

import triton
import triton.language as tl

from ..triton_common import (
    LOG2_E,
    attend,
    load_lse,
    load_map,
    multiply,
    start_softmax,
    store_attention,
    store_map,
    token_pointers,
    weigh,
)
from .fused_kernels_geometry import cells_of_window, program_of_block, tokens_of_block, within


@triton.jit
def _logits(logits, position, head, valid, line, corner, length, SIDES: tl.constexpr, MASK_PADDING: tl.constexpr):
    """Relative logits (queries, lines) in base 2 of rows or columns of a window, -inf of those that take no part.

    Args:
        line: rows or columns in the window.
        corner: where the window begins in the map, whose extent is length.
    """
    taken = line < SIDES.keys + 2 * SIDES.halo
    if MASK_PADDING:
        taken = taken & within(corner + line, length)
    if logits is None:
        values = tl.where(taken, 0.0, float("-inf"))[None, :]
    else:
        pointers = token_pointers(logits, position, head)[:, None] + line[None, :]
        values = tl.load(pointers, mask=valid[:, None] & taken[None, :], other=0.0).to(tl.float32) * LOG2_E
        values = tl.where(taken[None, :], values, float("-inf"))
    return values


@triton.jit
def load_row_logits(height, row, position, head, valid, block, size, SIDES: tl.constexpr, MASK_PADDING: tl.constexpr):
    corner = block[1] * SIDES.keys - SIDES.halo
    return _logits(height, position, head, valid, row, corner, size[0], SIDES, MASK_PADDING)


@triton.jit
def load_column_logits(
    width, column, position, head, valid, block, size, SIDES: tl.constexpr, MASK_PADDING: tl.constexpr
):
    corner = block[2] * SIDES.keys - SIDES.halo
    return _logits(width, position, head, valid, column, corner, size[1], SIDES, MASK_PADDING)


@triton.jit
def outer_sum(row_logits, column_logits, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(queries, ROWS) and (queries, COLUMNS) added for each cell of a strip, (queries, ROWS * COLUMNS)."""
    cells = row_logits[:, :, None] + column_logits[:, None, :]
    return tl.reshape(tl.broadcast_to(cells, [QUERIES, ROWS, COLUMNS]), [QUERIES, ROWS * COLUMNS])


@triton.jit
def _load_strip(
    key, value, top, left, head, block, size,
    SIDES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Row and column in the window of the cells of a strip, and their keys and values."""
    slot = tl.arange(0, ROWS * COLUMNS)
    row, column = top + slot // COLUMNS, left + slot % COLUMNS
    cells, inside = cells_of_window(row, column, block, size, SIDES)
    keys = load_map(key, cells, head, inside, HEAD_DIM, CHANNELS)
    return row, column, keys, load_map(value, cells, head, inside, VALUE_DIM, VALUE_CHANNELS)


@triton.jit
def _attend_strip(
    state, queries, key, value, height, column_logits, top, left, position, head, valid, block, size, scale,
    SIDES: tl.constexpr, MASK_PADDING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of a softmax with the cells of one more strip."""
    _, _, keys, values = _load_strip(
        key, value, top, left, head, block, size,
        SIDES, ROWS, COLUMNS, HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS,
    )  # fmt: skip
    rows = top + tl.arange(0, ROWS)
    row_logits = load_row_logits(height, rows, position, head, valid, block, size, SIDES, MASK_PADDING)
    bias = outer_sum(row_logits, column_logits, QUERIES, ROWS, COLUMNS)
    return attend(state, queries, keys, values, bias, scale, PRECISION)


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    height,
    width,
    output,
    logsumexp,
    plan,
    heads,
    scale,
    SIDES: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one part of the queries of a block, for one head. It goes through its window in strips."""
    SIDE: tl.constexpr = SIDES.keys + 2 * SIDES.halo
    ROWS: tl.constexpr = BLOCK // COLUMNS
    REST: tl.constexpr = SIDE % ROWS
    head, part, block = program_of_block(heads, plan.blocks, PARTS)
    position, valid = tokens_of_block(part * QUERIES + tl.arange(0, QUERIES), block, SIDES.queries)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    state = start_softmax(QUERIES, VALUE_CHANNELS)
    for left in tl.static_range(0, SIDE, COLUMNS):
        columns = left + tl.arange(0, COLUMNS)
        column_logits = load_column_logits(width, columns, position, head, valid, block, plan.size, SIDES, MASK_PADDING)
        for top in range(0, SIDE - REST, ROWS):
            state = _attend_strip(
                state, queries, key, value, height, column_logits, top, left, position, head, valid, block,
                plan.size, scale, SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS,
                HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS, PRECISION,
            )  # fmt: skip
        if REST > 0:
            state = _attend_strip(
                state, queries, key, value, height, column_logits, SIDE - REST, left, position, head, valid, block,
                plan.size, scale, SIDES, MASK_PADDING, QUERIES, REST_ROWS, COLUMNS,
                HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS, PRECISION,
            )  # fmt: skip
    store_attention(state, output, logsumexp, position, head, valid, VALUE_DIM, VALUE_CHANNELS)


@triton.jit
def _store_strip(window, values, row, column, SIDES: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the gradients of cells (cells, CHANNELS) of a window whose gradients begin at `window`."""
    side: tl.constexpr = SIDES.keys + 2 * SIDES.halo
    channel = tl.arange(0, CHANNELS)
    pointers = window + ((row * side + column) * DIM)[:, None] + channel[None, :]
    mask = ((row < side) & (column < side))[:, None] & (channel < DIM)[None, :]
    tl.store(pointers, values.to(window.dtype.element_ty), mask=mask)


@triton.jit
def _weigh_strip(
    queries, grads, lse, key, value, height, column_logits, top, left, position, head, valid, block, size, scale,
    SIDES: tl.constexpr, MASK_PADDING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Row and column of the cells of a strip, their keys, their weights (queries, cells) and the gradients of these.

    column_logits lacks the lse.
    """
    row, column, keys, values = _load_strip(
        key, value, top, left, head, block, size,
        SIDES, ROWS, COLUMNS, HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS,
    )  # fmt: skip
    rows = top + tl.arange(0, ROWS)
    row_logits = load_row_logits(height, rows, position, head, valid, block, size, SIDES, MASK_PADDING) - lse[:, None]
    bias = outer_sum(row_logits, column_logits, QUERIES, ROWS, COLUMNS)
    weights, grad_weights = weigh(queries, keys, grads, values, bias, scale, PRECISION)
    return row, column, keys, weights, grad_weights


@triton.jit
def _delta_from_weights(
    query, grads, logsumexp, key, value, height, width, position, head, valid, block, size, scale,
    SIDES: tl.constexpr, MASK_PADDING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Delta of queries, as the mean of the gradients of their weights, in a pass of its own through the window.

    It is divided by the sum of the weights, which is 1 but for the rounding of the logsumexp.
    """
    SIDE: tl.constexpr = SIDES.keys + 2 * SIDES.halo
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    lse = load_lse(logsumexp, position, head, valid)
    sums = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for left in tl.static_range(0, SIDE, COLUMNS):
        columns = left + tl.arange(0, COLUMNS)
        column_logits = load_column_logits(width, columns, position, head, valid, block, size, SIDES, MASK_PADDING)
        for top in range(0, SIDE, ROWS):
            _, _, _, weights, grad_weights = _weigh_strip(
                queries, grads, lse, key, value, height, column_logits,
                top, left, position, head, valid, block, size, scale,
                SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS,
                HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS, PRECISION,
            )  # fmt: skip
            sums += tl.sum(weights * grad_weights, 1)
            total += tl.sum(weights, 1)
    return sums / total


@triton.jit
def _differentiate_strip(
    grad_queries, grad_column_logits, queries, grads, lse, delta, key, value, height, column_logits,
    grad_query, grad_height, grad_width, window_keys, window_values,
    top, left, position, head, valid, block, size, scale,
    SIDES: tl.constexpr, MASK_PADDING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of queries and of the logits of columns with the cells of one more strip; the others are written.

    column_logits lacks the lse.
    """
    side: tl.constexpr = SIDES.keys + 2 * SIDES.halo
    row, column, keys, weights, grad_weights = _weigh_strip(
        queries, grads, lse, key, value, height, column_logits,
        top, left, position, head, valid, block, size, scale,
        SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS,
        HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS, PRECISION,
    )  # fmt: skip
    grad_scores = weights * (grad_weights - delta[:, None])
    if grad_query is not None:
        grad_queries += multiply(grad_scores, keys, PRECISION)
    if grad_height is not None:
        sums = tl.sum(tl.reshape(grad_scores, [QUERIES, ROWS, COLUMNS]), 2)
        add_lines(grad_height, sums, top + tl.arange(0, ROWS), position, head, valid, left > 0, side)
    if grad_width is not None:
        grad_column_logits += tl.sum(tl.reshape(grad_scores, [QUERIES, ROWS, COLUMNS]), 1)
    if window_keys is not None:
        grad_keys = multiply(tl.trans(grad_scores.to(queries.dtype)), queries, PRECISION) * scale
        _store_strip(window_keys, grad_keys, row, column, SIDES, HEAD_DIM, CHANNELS)
    if window_values is not None:
        grad_values = multiply(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
        _store_strip(window_values, grad_values, row, column, SIDES, VALUE_DIM, VALUE_CHANNELS)
    return grad_queries, grad_column_logits


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
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of a part of the queries of a block, of their logits, and their part of the
    gradients of the keys and values of the window, which goes to window_keys and window_values.

    Delta is the sum of output times gradient; with FEW_KEYS (see fused.py) the rounding of the output would show in it.
    """
    SIDE: tl.constexpr = SIDES.keys + 2 * SIDES.halo
    ROWS: tl.constexpr = BLOCK // COLUMNS
    REST: tl.constexpr = SIDE % ROWS
    head, part, block = program_of_block(heads, plan.blocks, PARTS)
    block = (first + block[0], block[1], block[2])
    position, valid = tokens_of_block(part * QUERIES + tl.arange(0, QUERIES), block, SIDES.queries)
    grads = load_map(grad_output, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
    if FEW_KEYS:
        delta = _delta_from_weights(
            query, grads, logsumexp, key, value, height, width, position, head, valid, block, plan.size, scale,
            SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS, HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS, PRECISION,
        )  # fmt: skip
    else:
        outputs = load_map(output, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
        delta = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    lse = load_lse(logsumexp, position, head, valid)
    grad_queries = tl.zeros([QUERIES, CHANNELS], tl.float32)
    window = tl.program_id(0).to(tl.int64) * (SIDE * SIDE)
    if window_keys is not None:
        window_keys += window * HEAD_DIM
    if window_values is not None:
        window_values += window * VALUE_DIM
    for left in tl.static_range(0, SIDE, COLUMNS):
        columns = left + tl.arange(0, COLUMNS)
        column_logits = load_column_logits(width, columns, position, head, valid, block, plan.size, SIDES, MASK_PADDING)
        grad_column_logits = tl.zeros([QUERIES, COLUMNS], tl.float32)
        for top in range(0, SIDE - REST, ROWS):
            grad_queries, grad_column_logits = _differentiate_strip(
                grad_queries, grad_column_logits, queries, grads, lse, delta, key, value, height, column_logits,
                grad_query, grad_height, grad_width, window_keys, window_values,
                top, left, position, head, valid, block, plan.size, scale,
                SIDES, MASK_PADDING, QUERIES, ROWS, COLUMNS,
                HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS, PRECISION,
            )  # fmt: skip
        if REST > 0:
            grad_queries, grad_column_logits = _differentiate_strip(
                grad_queries, grad_column_logits, queries, grads, lse, delta, key, value, height, column_logits,
                grad_query, grad_height, grad_width, window_keys, window_values,
                SIDE - REST, left, position, head, valid, block, plan.size, scale,
                SIDES, MASK_PADDING, QUERIES, REST_ROWS, COLUMNS,
                HEAD_DIM, CHANNELS, VALUE_DIM, VALUE_CHANNELS, PRECISION,
            )  # fmt: skip
        if grad_width is not None:
            add_lines(grad_width, grad_column_logits, columns, position, head, valid, False, SIDE)
    if grad_query is not None:
        store_map(grad_query, grad_queries * scale, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def add_lines(logits, values, line, position, head, valid, ADD: tl.constexpr, SIDE: tl.constexpr):
    """Write, or add, gradients (queries, lines) of the relative logits of rows or columns."""
    pointers = token_pointers(logits, position, head)[:, None] + line[None, :]
    mask = valid[:, None] & (line < SIDE)[None, :]
    if ADD:
        tl.debug_barrier()  # what is there may have been written by other threads of the program
        values += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, values.to(logits.pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def backward_key_kernel(
    query,
    window_keys,
    window_values,
    grad_key,
    grad_value,
    first,
    plan,
    heads,
    SIDES: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
):
    """One program: a part of a block of the map, for one head; it adds up the gradients of the windows that hold it.

    QUERY_PARTS: programs of a block of queries; each has written a part of the gradient of the window.
    """
    head, part, block = program_of_block(heads, plan.blocks, PARTS)
    slot = part * BLOCK + tl.arange(0, BLOCK)
    position, valid = tokens_of_block(slot, (first + block[0], block[1], block[2]), SIDES.keys)
    if grad_key is not None:
        sums = _overlap(
            window_keys, slot, valid, block, head, plan.blocks, heads, SIDES, QUERY_PARTS, HEAD_DIM, CHANNELS
        )
        store_map(grad_key, sums, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        sums = _overlap(
            window_values, slot, valid, block, head, plan.blocks, heads, SIDES, QUERY_PARTS, VALUE_DIM, VALUE_CHANNELS
        )
        store_map(grad_value, sums, position, head, valid, VALUE_DIM, VALUE_CHANNELS)


@triton.jit
def _overlap(
    windows,
    slot,
    valid,
    block,
    head,
    blocks,
    heads,
    SIDES: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum over all windows, those of a block and of its neighbours, of what they have of the tokens of the block."""
    side: tl.constexpr = SIDES.keys + 2 * SIDES.halo
    REACH: tl.constexpr = (SIDES.halo + SIDES.keys - 1) // SIDES.keys
    image, block_row, block_column = block
    channel = tl.arange(0, CHANNELS)
    sums = tl.zeros([slot.shape[0], CHANNELS], tl.float32)
    for y in tl.static_range(-REACH, REACH + 1):
        for x in tl.static_range(-REACH, REACH + 1):
            row = slot // SIDES.keys + SIDES.halo - y * SIDES.keys
            column = slot % SIDES.keys + SIDES.halo - x * SIDES.keys
            held = valid & within(row, side) & within(column, side)
            held = held & within(block_row + y, blocks[0]) & within(block_column + x, blocks[1])
            place = (image * blocks[0] + block_row + y) * blocks[1] + block_column + x
            for part in tl.static_range(0, QUERY_PARTS):
                window = ((place * QUERY_PARTS + part) * heads + head).to(tl.int64) * (side * side * DIM)
                pointers = windows + window + ((row * side + column) * DIM)[:, None] + channel[None, :]
                mask = held[:, None] & (channel < DIM)[None, :]
                sums += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return sums
