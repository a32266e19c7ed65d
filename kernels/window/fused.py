"""Window attention in Triton: windows are read from the map and written back in place, without a partition.

A program serves one head. Windows that fit into one block of tokens are attended to whole: small ones share a block,
several blocks share a program, and the backward recomputes the softmax and reads each tensor once. Larger windows go
through an online softmax over blocks of keys, and their gradients are summed by the tokens that own them.

The gradient of the bias table is summed over windows in registers, then over programs and offsets in a fixed order.
"""

from typing import Any, Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import per_axis
from ..launch import Parameters
from ..triton_common import (
    LOG2_E,
    Call,
    accumulate,
    gradient_of_weights,
    load_logsumexp,
    load_map,
    load_maps,
    load_statistics,
    multiply,
    refuse_tensors,
    start_softmax,
    store_attention,
    store_delta,
    store_map,
)

PROGRAMS = {"forward_whole": 4096, "backward_whole": 1024, "backward_bias": 1024}
"""Enough to fill a large GPU, and few enough to share the bias, or to sum its gradients."""


@triton.jit
def _numbers(plan):
    """The plan without constants: Triton 3.6 loses those of a tuple inside a loop."""
    zero = tl.program_id(1)
    batch, counts, size, step, spacing, shift = plan
    counts, size = (counts[0] + zero, counts[1] + zero), (size[0] + zero, size[1] + zero)
    step, spacing = (step[0] + zero, step[1] + zero), (spacing[0] + zero, spacing[1] + zero)
    return batch + zero, counts, size, step, spacing, (shift[0] + zero, shift[1] + zero)


@triton.jit
def _unravel(index, rectangle):
    """The window (image, row, column) with a number in a rectangle (top, left, rows, columns) of windows."""
    top, left, rows, columns = rectangle
    return index // (rows * columns), top + index // columns % rows, left + index % columns


@triton.jit
def _cell(slot, WINDOW: tl.constexpr, WIDTH: tl.constexpr):
    """Row and column of slots in their window, whose rows take WIDTH slots, and which slots hold a token."""
    slot = slot % (WINDOW[0] * WIDTH)
    column = slot % WIDTH
    return slot // WIDTH, column, column < WINDOW[1]


@triton.jit
def _members(window, block, slot, rectangle, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """The window of each slot where a block has several windows, else the one that is given."""
    if PACK > 1:
        window = _unravel(block * PACK + slot // (WINDOW[0] * WINDOW[1]), rectangle)
    return window


@triton.jit
def _place(slot, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr):
    """Row and column of the slots of windows in the map, before the shift."""
    _, _, _, step, spacing, _ = plan
    row, column, _ = _cell(slot, WINDOW, WIDTH)
    return window[1] * step[0] + row * spacing[0], window[2] * step[1] + column * spacing[1]


@triton.jit
def _locate(slot, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr, SHIFTED: tl.constexpr):
    """Positions (image, row, column) in the map of the slots of a block of windows, and which have a token."""
    y, x = _place(slot, window, plan, WINDOW, WIDTH)
    if SHIFTED:
        size, shift = plan[2], plan[5]
        y = tl.where(y >= size[0] - shift[0], y - size[0], y) + shift[0]
        x = tl.where(x >= size[1] - shift[1], x - size[1], x) + shift[1]
    valid = slot < PACK * WINDOW[0] * WIDTH
    if WINDOW[1] < WIDTH:
        valid = valid & _cell(slot, WINDOW, WIDTH)[2]
    if PACK > 1:
        valid = valid & (window[0] < plan[0])
    return (window[0], y, x), valid


@triton.jit
def _region(slot, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr):
    """The part of a torn window that a slot lies in: tokens of two parts do not see each other."""
    y, x = _place(slot, window, plan, WINDOW, WIDTH)
    size, shift = plan[2], plan[5]
    return (y >= size[0] - shift[0]).to(tl.int32) * 2 + (x >= size[1] - shift[1]).to(tl.int32)


@triton.jit
def _torn(window, plan, AXIS: tl.constexpr):
    """Whether the shift tears a window apart along an axis: it does so to the last one."""
    _, counts, _, _, _, shift = plan
    return (window[1 + AXIS] == counts[AXIS] - 1) & (shift[AXIS] > 0)


@triton.jit
def _tear(scores, rows, columns, window, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr):
    """Scores with -inf where the shift has torn two tokens of a window apart."""
    torn = False
    if SHIFTED:
        torn = _torn(window, plan, 0) | _torn(window, plan, 1)
    if torn:
        of_rows = _region(rows, window, plan, WINDOW, WIDTH)
        of_columns = _region(columns, window, plan, WINDOW, WIDTH)
        scores = tl.where(of_rows[:, None] == of_columns[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _bias(table, head, query, key, WINDOW: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr):
    """What is added to scores in base 2, for slots of queries and keys that come with the other's axis put in.

    Entries of the table, and -inf where the slots belong to two windows of the block or the key's has no token. Queries
    without a token see some keys: what they compute stays finite, and nobody reads it.
    """
    SLOTS: tl.constexpr = WINDOW[0] * WIDTH
    ROW: tl.constexpr = 2 * WINDOW[1] - 1
    key_row, key_column, visible = _cell(key, WINDOW, WIDTH)
    row, column, asked = _cell(query, WINDOW, WIDTH)
    visible = visible & (key < PACK * SLOTS)
    if PACK > 1:
        visible = visible & ((query // SLOTS == key // SLOTS) | (query >= PACK * SLOTS))
    bias = 0.0
    if table is not None:
        entry = key_row * ROW + key_column - (row * ROW + column) + (WINDOW[0] - 1) * ROW + WINDOW[1] - 1
        start = table + head * ((2 * WINDOW[0] - 1) * ROW)
        taken = visible & asked & (query < PACK * SLOTS)
        bias = tl.load(start + entry, mask=taken, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(visible, bias, float("-inf"))


@triton.jit
def _scores(queries, keys, bias, scale, PRECISION: tl.constexpr):
    return tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E) + bias


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
    plan = _numbers(plan)
    TEARS: tl.constexpr = 4 if SHIFTED else 1
    head, tear = tl.program_id(0) // TEARS, tl.program_id(0) % TEARS
    slot = tl.arange(0, BLOCK)
    bias = _bias(table, head, slot[:, None], slot[None, :], WINDOW, WINDOW[1], PACK)
    bias += tl.zeros([BLOCK, BLOCK], tl.float32)  # without a table it is the same for all queries
    if SHIFTED:
        counts = plan[1]
        window = (0, tear // 2 * (counts[0] - 1), tear % 2 * (counts[1] - 1))
        bias = _tear(bias, slot, slot, window, plan, WINDOW, WINDOW[1], SHIFTED)
    tl.store(tiles + tl.program_id(0) * BLOCK * BLOCK + slot[:, None] * BLOCK + slot[None, :], bias)


@triton.jit
def _load_bias(tiles, head, tear, SHIFTED: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of :func:`bias_kernel`."""
    TEARS: tl.constexpr = 4 if SHIFTED else 1
    slot = tl.arange(0, BLOCK)
    start = tiles + ((head if PER_HEAD else 0) * TEARS + tear) * (BLOCK * BLOCK)
    return tl.load(start + slot[:, None] * BLOCK + slot[None, :])


@triton.jit
def _blocks_of_program(plan, heads, share, PACK: tl.constexpr, SHIFTED: tl.constexpr):
    """What a program goes through: `share` blocks of windows that the shift tears in the same way.

    Returns:
        head; the way; top, left, rows and columns of the rectangle of windows that are torn so; the first block of the
        program, numbered through the images, and the one behind its last.
    """
    batch, counts, _, _, _, shift = plan
    index, tear, rows, columns = tl.program_id(0) // heads, 0, counts[0], counts[1]
    if SHIFTED:
        torn_rows, torn_columns = (shift[0] > 0).to(tl.int32), (shift[1] > 0).to(tl.int32)
        rows, columns = counts[0] - torn_rows, counts[1] - torn_columns
        for way in tl.static_range(1, 4):
            programs = tl.cdiv(batch * rows * columns, share)
            behind = index >= programs
            index = tl.where(behind, index - programs, index)
            tear = tl.where(behind, way, tear)
            rows = tl.where(behind, torn_rows if way // 2 else counts[0] - torn_rows, rows)
            columns = tl.where(behind, torn_columns if way % 2 else counts[1] - torn_columns, columns)
    rectangle = (tear // 2 * (counts[0] - 1), tear % 2 * (counts[1] - 1), rows, columns)
    stop = tl.minimum((index + 1) * share, tl.cdiv(batch * rows * columns, PACK))
    return tl.program_id(0) % heads, tear, rectangle, index * share, stop


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
def forward_whole_kernel(
    query,
    key,
    value,
    tiles,
    output,
    logsumexp,
    plan,
    share,
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
    plan = _numbers(plan)
    head, tear, rectangle, first, stop = _blocks_of_program(plan, heads, share, PACK, SHIFTED)
    slot = tl.arange(0, BLOCK)
    bias = _load_bias(tiles, head, tear, SHIFTED, PER_HEAD, BLOCK)
    following = _unravel(first, rectangle)
    for block in range(first, stop):
        window = _members(following, block, slot, rectangle, WINDOW, PACK)
        position, valid = _locate(slot, window, plan, WINDOW, WINDOW[1], PACK, SHIFTED)
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
        scores = _scores(queries, keys, bias, scale, PRECISION)
        largest = tl.max(scores, 1)
        weights = tl.exp2(scores - largest[:, None])
        total = tl.sum(weights, 1)
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
    share,
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
    plan = _numbers(plan)
    head, tear, rectangle, first, stop = _blocks_of_program(plan, heads, share, PACK, SHIFTED)
    slot = tl.arange(0, BLOCK)
    bias = _load_bias(tiles, head, tear, SHIFTED, PER_HEAD, BLOCK)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    following = _unravel(first, rectangle)
    for block in range(first, stop):
        window = _members(following, block, slot, rectangle, WINDOW, PACK)
        position, valid = _locate(slot, window, plan, WINDOW, WINDOW[1], PACK, SHIFTED)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, position, head, valid, HEAD_DIM, CHANNELS)
        scores = _scores(queries, keys, bias, scale, PRECISION)
        # the maximum and the sum apart: a logsumexp would carry over the rounding of large scores
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights * (1.0 / tl.sum(weights, 1))[:, None]
        if grad_value is not None:
            of_values = multiply(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
            store_map(grad_value, of_values, position, head, valid, HEAD_DIM, CHANNELS)
        if grad_query is not None or grad_key is not None or partial is not None:
            of_weights = multiply(grads, tl.trans(values), PRECISION)
            products = weights * of_weights
            of_scores = products - weights * tl.sum(products, 1)[:, None]
            if partial is not None:
                grad_bias += of_scores
            of_scores = of_scores.to(keys.dtype)
            if grad_query is not None:
                of_queries = multiply(of_scores, keys, PRECISION) * scale
                store_map(grad_query, of_queries, position, head, valid, HEAD_DIM, CHANNELS)
            if grad_key is not None:
                of_keys = multiply(tl.trans(of_scores), queries, PRECISION) * scale
                store_map(grad_key, of_keys, position, head, valid, HEAD_DIM, CHANNELS)
        following = _next(following, rectangle)
    if partial is not None:
        pair = tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + slot[:, None] * BLOCK + slot[None, :]
        tl.store(partial + pair, grad_bias)


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
    plan = _numbers(plan)
    head, window, slot = _part(heads, plan, WINDOW, WIDTH, BLOCK)
    position, valid = _locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    state = start_softmax(BLOCK, CHANNELS)
    for start in range(0, SLOTS, BLOCK):
        key_slot = start + tl.arange(0, BLOCK)
        key_position, key_valid = _locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
        scores = _scores(
            queries, keys, _bias(table, head, slot[:, None], key_slot[None, :], WINDOW, WIDTH, 1), scale, PRECISION
        )
        scores = _tear(scores, slot, key_slot, window, plan, WINDOW, WIDTH, SHIFTED)
        state = accumulate(state, scores, values, PRECISION)
    store_attention(state, output, logsumexp, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def _part(heads, plan, WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What a program owns: head, window and the slots of a part of it."""
    PARTS: tl.constexpr = (WINDOW[0] * WIDTH + BLOCK - 1) // BLOCK
    part = tl.program_id(0) // heads % PARTS
    window = _unravel(tl.program_id(0) // (heads * PARTS), (0, 0, plan[1][0], plan[1][1]))
    return tl.program_id(0) % heads, window, part * BLOCK + tl.arange(0, BLOCK)


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
    plan = _numbers(plan)
    head, window, slot = _part(heads, plan, WINDOW, WIDTH, BLOCK)
    position, valid = _locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
    grads = load_map(grad_output, position, head, valid, HEAD_DIM, CHANNELS)
    deltas = store_delta(delta, output, grads, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_query is not None:
        queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
        statistics = (load_logsumexp(logsumexp, position, head, valid)[:, None], deltas[:, None])
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        for start in range(0, SLOTS, BLOCK):
            key_slot = start + tl.arange(0, BLOCK)
            key_position, key_valid = _locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
            keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
            bias = _bias(table, head, slot[:, None], key_slot[None, :], WINDOW, WIDTH, 1)
            scores = _scores(queries, keys, bias, scale, PRECISION)
            scores = _tear(scores, slot, key_slot, window, plan, WINDOW, WIDTH, SHIFTED)
            _, of_scores = gradient_of_weights(scores, grads, values, statistics, PRECISION)
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
    WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of one part of the keys and values of a window. Scores have keys as rows."""
    SLOTS: tl.constexpr = WINDOW[0] * WIDTH
    plan = _numbers(plan)
    head, window, key_slot = _part(heads, plan, WINDOW, WIDTH, BLOCK)
    key_position, key_valid = _locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
    keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        position, valid = _locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        of_rows, deltas = load_statistics(logsumexp, delta, position, head, valid)
        bias = _bias(table, head, slot[None, :], key_slot[:, None], WINDOW, WIDTH, 1)
        scores = _scores(keys, queries, bias, scale, PRECISION)
        scores = _tear(scores, key_slot, slot, window, plan, WINDOW, WIDTH, SHIFTED)
        weights, of_scores = gradient_of_weights(scores, values, grads, (of_rows[None, :], deltas[None, :]), PRECISION)
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
    plan = _numbers(plan)
    parts = tl.program_id(0) // heads % (PARTS * PARTS)
    chunk = tl.program_id(0) // (heads * PARTS * PARTS)
    slot = parts // PARTS * BLOCK + tl.arange(0, BLOCK)
    key_slot = parts % PARTS * BLOCK + tl.arange(0, BLOCK)
    bias = _bias(table, head, slot[:, None], key_slot[None, :], WINDOW, WIDTH, 1)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = chunk * windows_per_program
    for index in range(first, tl.minimum(first + windows_per_program, plan[0] * plan[1][0] * plan[1][1])):
        window = _unravel(index, (0, 0, plan[1][0], plan[1][1]))
        position, valid = _locate(slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        key_position, key_valid = _locate(key_slot, window, plan, WINDOW, WIDTH, 1, SHIFTED)
        queries, grads = load_maps(query, grad_output, position, head, valid, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, key_position, head, key_valid, HEAD_DIM, CHANNELS)
        of_rows, deltas = load_statistics(logsumexp, delta, position, head, valid)
        scores = _scores(queries, keys, bias, scale, PRECISION)
        scores = _tear(scores, slot, key_slot, window, plan, WINDOW, WIDTH, SHIFTED)
        sums += gradient_of_weights(scores, grads, values, (of_rows[:, None], deltas[:, None]), PRECISION)[1]
    pair = (chunk * heads + head).to(tl.int64) * (PARTS * BLOCK) + slot[:, None]
    tl.store(partial + pair * (PARTS * BLOCK) + key_slot[None, :], sums)


@triton.jit
def sum_by_offset_kernel(
    query,
    of_pairs,
    grad_table,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    PACK: tl.constexpr,
    EXTENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one entry of the gradient of the table, from the gradients of the scores of all pairs of slots.

    Args:
        of_pairs: (heads, EXTENT, EXTENT), the slots of a block of PACK windows.
    """
    ROW: tl.constexpr = 2 * WINDOW[1] - 1
    ENTRIES: tl.constexpr = (2 * WINDOW[0] - 1) * ROW
    head, entry = tl.program_id(0) // ENTRIES, tl.program_id(0) % ENTRIES
    down, across = entry // ROW - WINDOW[0] + 1, entry % ROW - WINDOW[1] + 1
    slot = tl.arange(0, BLOCK)
    row, column, valid = _cell(slot, WINDOW, WIDTH)
    y, x = row + down, column + across
    seen = valid & (slot < PACK * WINDOW[0] * WIDTH) & (y >= 0) & (y < WINDOW[0]) & (x >= 0) & (x < WINDOW[1])
    pairs = of_pairs + (head * EXTENT + slot) * EXTENT + slot + down * WIDTH + across
    tl.store(grad_table + tl.program_id(0), tl.sum(tl.load(pairs, mask=seen, other=0.0), 0))


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
        width = triton.next_power_of_2(self.window[1])  # which makes divisions shifts
        self.slots = self.window[0] * width
        counts = tuple(size // extent for size, extent in zip(self.size, self.window, strict=True))
        self.windows = self.batch * counts[0] * counts[1]
        step, spacing = ((1, 1), counts) if partition == "grid" else (self.window, (1, 1))
        shifts = zip(per_axis("shift", shift, 2), counts, strict=True)
        shifts = tuple(offset if count > 1 else 0 for offset, count in shifts)
        self.arguments.update(
            table=None if relative_position_bias is None else relative_position_bias.contiguous(),
            plan=(self.batch, counts, self.size, step, spacing, shifts),
            SHIFTED=any(shifts),
            PER_HEAD=relative_position_bias is not None,
            WINDOW=self.window,
            WIDTH=width,
        )

    def whole(self, name: str) -> Optional[dict[str, Any]]:
        """How to start the kernel for windows that fit into one block, None where these do not."""
        parameters = self.parameters(name)
        if self.tokens_per_window > parameters.block:
            return None
        pack = 1 if self.arguments["SHIFTED"] else parameters.block // self.tokens_per_window
        block = max(16, triton.next_power_of_2(pack * self.tokens_per_window))
        share = max(1, triton.cdiv(self.windows, pack) * self.heads // PROGRAMS[name])
        programs = sum(triton.cdiv(self.batch * count, pack * share) for count in self.alike()) * self.heads
        sizes = {"share": share, "PACK": pack, "tiles": self.bias_tiles(block, pack)}
        return {"programs": programs, "parameters": parameters._replace(block=block), **sizes}

    def alike(self) -> list[int]:
        """Windows of an image that the shift tears in no way, along columns, along rows, and both."""
        _, counts, *_, shifts = self.arguments["plan"]
        (rows, torn_rows), (columns, torn_columns) = (
            (count - (shift > 0), int(shift > 0)) for count, shift in zip(counts, shifts, strict=True)
        )
        return [rows * columns, rows * torn_columns, torn_rows * columns, torn_rows * torn_columns]

    def bias_tiles(self, block: int, pack: int) -> Tensor:
        """What is added to the scores of a block of windows, made once for all of them."""
        shape = (self.heads if self.arguments["PER_HEAD"] else 1, 4 if self.arguments["SHIFTED"] else 1, block, block)
        tiles = self.query.new_empty(shape, dtype=torch.float32)
        self.submit(bias_kernel, shape[0] * shape[1], Parameters(block, 4, 1), tiles=tiles, PACK=pack)
        return tiles

    def parts(self, parameters: Parameters) -> int:
        """Programs for all parts of all windows."""
        return self.windows * self.heads * triton.cdiv(self.slots, parameters.block)


def refuse(query: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors(query)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    outputs = call.start_forward()
    whole = call.whole("forward_whole")
    if whole:
        call.submit(forward_whole_kernel, **whole)
    else:
        parameters = call.parameters("forward")
        call.submit(forward_kernel, call.parts(parameters), parameters)
    return outputs


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    *arguments,
    into: Optional[Sequence[Tensor]] = None,
) -> list[Tensor]:
    """Gradients of query, key, value and the bias table, those that are needed; the first three `into` tensors."""
    call = _Call(*arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient, into)
    whole = call.whole("backward_whole")
    of_table = _backward_whole(call, whole, needs_gradient) if whole else _backward_parts(call, needs_gradient)
    return [gradient for gradient in (*gradients, of_table) if gradient is not None]


def _backward_whole(call: _Call, whole: dict[str, Any], needs_gradient: Sequence[bool]) -> Optional[Tensor]:
    """Fills the gradients; returns that of the table, if it is needed."""
    block, groups = whole["parameters"].block, whole["programs"] // call.heads
    shape = (groups, call.heads, block, block)
    partial = call.query.new_empty(shape, dtype=torch.float32) if needs_gradient[3] else None
    call.submit(backward_whole_kernel, partial=partial, **whole)
    return None if partial is None else _sum_by_offset(call, partial.sum(0), call.window[1], whole["PACK"])


def _backward_parts(call: _Call, needs_gradient: Sequence[bool]) -> Optional[Tensor]:
    """As :func:`_backward_whole`, for windows of several blocks."""
    _, needs_key, needs_value, needs_bias = needs_gradient
    kernels = {"backward_query": backward_query_kernel}
    if needs_key or needs_value:
        kernels["backward_key"] = backward_key_kernel
    for name, kernel in kernels.items():
        parameters = call.parameters(name)
        call.submit(kernel, call.parts(parameters), parameters)
    return _backward_bias(call) if needs_bias else None


def _backward_bias(call: _Call) -> Tensor:
    parameters = call.parameters("backward_bias")
    parts = triton.cdiv(call.slots, parameters.block)
    share = max(1, call.windows * call.heads * parts**2 // PROGRAMS["backward_bias"])
    chunks = triton.cdiv(call.windows, share)
    shape = (chunks, call.heads, parts * parameters.block, parts * parameters.block)
    partial = call.query.new_empty(shape, dtype=torch.float32)
    programs = chunks * parts**2 * call.heads
    call.submit(backward_bias_kernel, programs, parameters, partial=partial, windows_per_program=share)
    return _sum_by_offset(call, partial.sum(0), call.arguments["WIDTH"], 1)


def _sum_by_offset(call: _Call, of_pairs: Tensor, width: int, pack: int) -> Tensor:
    """Gradient of the table from that of the scores of all pairs of slots of a block, (heads, slots, slots)."""
    of_table = call.query.new_empty(call.arguments["table"].shape, dtype=torch.float32)
    extent = of_pairs.shape[-1]
    parameters = Parameters(triton.next_power_of_2(extent), 1, 1)
    call.submit(
        sum_by_offset_kernel,
        of_table.numel(),
        parameters,
        of_pairs=of_pairs,
        grad_table=of_table,
        WIDTH=width,
        PACK=pack,
        EXTENT=extent,
    )
    return of_table
