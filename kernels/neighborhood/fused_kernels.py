"""Triton kernels of neighborhood attention (see fused.py): attention and its gradients, that of the bias table last.

The gradient of the bias table is summed in a fixed order and without atomics. Tiles at one place of all images have one
geometry: what a pair of places adds to which entry is the same for all of them. So one kernel sums score gradients over
images, and a second one sums the pairs of each offset.
"""

import triton
import triton.language as tl

from ..triton_common import (
    LOG2_E,
    attend,
    load_lse,
    load_lse_and_delta,
    load_map,
    load_maps,
    multiply,
    start_softmax,
    store_attention,
    store_delta,
    store_map,
    token_pointers,
)
from .fused_kernels_columns import geometry_of, load_columns
from .fused_kernels_geometry import (
    axis_sees,
    before,
    box_at,
    box_of,
    box_of_tokens,
    box_steps,
    next_box,
    places_of,
    program_tile,
    tile_of_tokens,
)


@triton.jit
def _differentiate(left, right, left_values, right_values, bias, lse, delta, scale, PRECISION: tl.constexpr):
    """Weights of pairs of tokens, and the gradient of their scores in base e.

    Args:
        left, right, left_values, right_values: as for :func:`weigh` of triton_common.py.
        bias: of the pairs in base 2, -inf where they do not see each other.
        lse, delta: of the queries, lse in base 2, with the axis of the keys put in.
    """
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * LOG2_E) + (bias - lse)
    weights = tl.exp2(scores)
    return weights, weights * (multiply(left_values, tl.trans(right_values), PRECISION) - delta)


@triton.jit
def load_for_columns(tokens, box, stop, group, plan, head, BOX: tl.constexpr, BLOCK: tl.constexpr):
    """The lse or delta of the queries of a box, which are columns of a product.

    Each number is read twice and the larger one taken. A thread holds many columns, and Triton lets it read them all
    by itself, address by address, unless there are numbers enough for all threads.
    """
    position = box_of_tokens(box, stop, group, plan, BOX, BLOCK)
    pointers = token_pointers(tokens, position, head)[:, None] + tl.zeros([1, 2], tl.int32)
    return tl.max(tl.load(pointers), 1)


@triton.jit
def _load_box(
    left, right, box, stop, group, plan, head,
    BOX: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The tokens of a box, of two tensors."""
    position = box_of_tokens(box, stop, group, plan, BOX, BLOCK)
    return load_maps(left, right, position, head, tl.full([BLOCK], True, tl.int1), HEAD_DIM, CHANNELS)


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    columns,
    output,
    logsumexp,
    plan,
    total,
    heads,
    scale,
    BIASED: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    STEPS: tl.constexpr,
    PERIOD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, group, first = program_tile(tl.program_id(0), heads, plan, TILE)
    length = group.length
    if not before(first, length):
        return
    number = geometry_of(first[2] // TILE[2], group, plan, PERIOD)
    if BIASED:
        number += head * total
    position, valid = tile_of_tokens(first, group, plan, TILE, BLOCK)
    everywhere = tl.full([BLOCK], True, tl.int1)
    queries = load_map(query, position, head, everywhere, HEAD_DIM, CHANNELS)
    state = start_softmax(BLOCK, CHANNELS)
    start, stop = box_of(first, length, TILE, KERNEL, STRIDE, CAUSAL, False)
    steps = box_steps(start, stop, BOX)
    step = (0, 0, 0)
    for _ in range(0, steps[0] * steps[1] * steps[2]):
        box = box_at(step, start, BOX)
        keys, values = _load_box(key, value, box, stop, group, plan, head, BOX, BLOCK, HEAD_DIM, CHANNELS)
        bias = load_columns(
            columns, number, first, box, step[2], length,
            KERNEL, STRIDE, CAUSAL, RANK, TILE, BOX, STEPS, BLOCK, False,
        )  # fmt: skip
        state = attend(state, queries, keys, values, bias, scale, PRECISION)
        step = next_box(step, steps)
    store_attention(state, output, logsumexp, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def backward_query_kernel(
    query,
    key,
    value,
    columns,
    grad_output,
    output,
    logsumexp,
    delta,
    grad_query,
    plan,
    total,
    heads,
    scale,
    BIASED: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    STEPS: tl.constexpr,
    PERIOD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of queries, and delta, the sum of output times its gradient."""
    head, group, first = program_tile(tl.program_id(0), heads, plan, TILE)
    length = group.length
    if not before(first, length):
        return
    position, valid = tile_of_tokens(first, group, plan, TILE, BLOCK)
    grads = load_map(grad_output, position, head, valid, HEAD_DIM, CHANNELS)
    deltas = store_delta(delta, output, grads, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_query is not None:
        number = geometry_of(first[2] // TILE[2], group, plan, PERIOD)
        if BIASED:
            number += head * total
        everywhere = tl.full([BLOCK], True, tl.int1)
        queries = load_map(query, position, head, everywhere, HEAD_DIM, CHANNELS)
        lse = load_lse(logsumexp, position, head, everywhere)[:, None]
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        start, stop = box_of(first, length, TILE, KERNEL, STRIDE, CAUSAL, False)
        steps = box_steps(start, stop, BOX)
        step = (0, 0, 0)
        for _ in range(0, steps[0] * steps[1] * steps[2]):
            box = box_at(step, start, BOX)
            keys, values = _load_box(key, value, box, stop, group, plan, head, BOX, BLOCK, HEAD_DIM, CHANNELS)
            bias = load_columns(
                columns, number, first, box, step[2], length,
                KERNEL, STRIDE, CAUSAL, RANK, TILE, BOX, STEPS, BLOCK, False,
            )  # fmt: skip
            _, grad_scores = _differentiate(queries, keys, grads, values, bias, lse, deltas[:, None], scale, PRECISION)
            sums += multiply(grad_scores, keys, PRECISION)
            step = next_box(step, steps)
        store_map(grad_query, sums * scale, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def backward_key_kernel(
    query,
    key,
    value,
    columns,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    plan,
    total,
    heads,
    scale,
    BIASED: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    STEPS: tl.constexpr,
    PERIOD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of keys and values. Scores have keys as rows."""
    head, group, first = program_tile(tl.program_id(0), heads, plan, TILE)
    length = group.length
    if not before(first, length):
        return
    number = geometry_of(first[2] // TILE[2], group, plan, PERIOD)
    if BIASED:
        number += head * total
    position, valid = tile_of_tokens(first, group, plan, TILE, BLOCK)
    everywhere = tl.full([BLOCK], True, tl.int1)
    keys, values = load_maps(key, value, position, head, everywhere, HEAD_DIM, CHANNELS)
    grad_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    grad_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    start, stop = box_of(first, length, TILE, KERNEL, STRIDE, CAUSAL, True)
    steps = box_steps(start, stop, BOX)
    step = (0, 0, 0)
    for _ in range(0, steps[0] * steps[1] * steps[2]):
        box = box_at(step, start, BOX)
        queries, grads = _load_box(query, grad_output, box, stop, group, plan, head, BOX, BLOCK, HEAD_DIM, CHANNELS)
        bias = load_columns(
            columns, number, first, box, step[2], length,
            KERNEL, STRIDE, CAUSAL, RANK, TILE, BOX, STEPS, BLOCK, True,
        )  # fmt: skip
        lse = load_for_columns(logsumexp, box, stop, group, plan, head, BOX, BLOCK) * LOG2_E
        deltas = load_for_columns(delta, box, stop, group, plan, head, BOX, BLOCK)
        weights, grad_scores = _differentiate(
            keys, queries, values, grads, bias, lse[None, :], deltas[None, :], scale, PRECISION
        )
        if grad_key is not None:
            grad_keys += multiply(grad_scores, queries, PRECISION)
        if grad_value is not None:
            grad_values += multiply(weights, grads, PRECISION)
        step = next_box(step, steps)
    if grad_key is not None:
        store_map(grad_key, grad_keys * scale, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, grad_values, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit(do_not_specialize=["first_tile", "count"])
def backward_bias_kernel(
    query,
    key,
    value,
    columns,
    grad_output,
    logsumexp,
    delta,
    sums,
    first_tile,
    count,
    batch,
    images,
    plan,
    total,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BOXES: tl.constexpr,
    STEPS: tl.constexpr,
    PERIOD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the sum over some images of the score gradients of a tile and one of its boxes, for one head."""
    index = tl.program_id(0) // (heads * BOXES)
    program = (first_tile + index % count) * heads + tl.program_id(0) % heads
    head, group, first = program_tile(program, heads, plan, TILE)
    length = group.length
    start, stop = box_of(first, length, TILE, KERNEL, STRIDE, CAUSAL, False)
    steps = box_steps(start, stop, BOX)
    number = tl.program_id(0) // heads % BOXES
    if (not before(first, length)) or number >= steps[0] * steps[1] * steps[2]:
        return
    step = (number // (steps[1] * steps[2]), number // steps[2] % steps[1], number % steps[2])
    position, _ = tile_of_tokens(first, group, plan, TILE, BLOCK)
    box = box_at(step, start, BOX)
    key_position = box_of_tokens(box, stop, group, plan, BOX, BLOCK)
    bias = load_columns(
        columns, geometry_of(first[2] // TILE[2], group, plan, PERIOD) + head * total, first, box, step[2],
        length, KERNEL, STRIDE, CAUSAL, RANK, TILE, BOX, STEPS, BLOCK, False,
    )  # fmt: skip
    everywhere = tl.full([BLOCK], True, tl.int1)
    grad_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    first_image = index // count * images
    for image in range(first_image, tl.minimum(first_image + images, batch)):
        here = (image, position[1], position[2], position[3])
        there = (image, key_position[1], key_position[2], key_position[3])
        queries, grads = load_maps(query, grad_output, here, head, everywhere, HEAD_DIM, CHANNELS)
        keys, values = load_maps(key, value, there, head, everywhere, HEAD_DIM, CHANNELS)
        lse, deltas = load_lse_and_delta(logsumexp, delta, here, head, everywhere)
        grad_scores += _differentiate(
            queries, keys, grads, values, bias, lse[:, None], deltas[:, None], scale, PRECISION
        )[1]
    slot = tl.arange(0, BLOCK)
    tile = sums + tl.program_id(0).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(tile + slot[:, None] * BLOCK + slot[None, :], grad_scores)


@triton.jit
def _split(entry, KERNEL: tl.constexpr):
    """Offset of key from query along each axis."""
    rows: tl.constexpr = 2 * KERNEL[1] - 1
    columns: tl.constexpr = 2 * KERNEL[2] - 1
    z = entry // (rows * columns) - KERNEL[0] + 1
    return z, entry // columns % rows - KERNEL[1] + 1, entry % columns - KERNEL[2] + 1


@triton.jit(do_not_specialize=["first_tile", "count"])
def gather_bias_kernel(
    query,
    sums,
    grad_table,
    first_tile,
    count,
    chunks,
    plan,
    heads,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BOXES: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: what one tile adds to some entries of the table, for one head."""
    ALL: tl.constexpr = (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
    BLOCKS: tl.constexpr = (ALL + ENTRIES - 1) // ENTRIES
    entry = tl.program_id(0) % BLOCKS * ENTRIES + tl.arange(0, ENTRIES)[:, None]
    index = tl.program_id(0) // BLOCKS
    head, group, first = program_tile(first_tile * heads + index, heads, plan, TILE)
    length = group.length
    start, stop = box_of(first, length, TILE, KERNEL, STRIDE, CAUSAL, False)
    steps = box_steps(start, stop, BOX)
    places = places_of(tl.arange(0, BLOCK), first, TILE)
    valid = before(places, length)
    z, y, x = places[0][None, :], places[1][None, :], places[2][None, :]
    offset = _split(entry, KERNEL)
    seen = valid[None, :] & (entry < ALL)
    seen &= axis_sees(x, x + offset[2], length[2], KERNEL[2], STRIDE[2], CAUSAL[2], False)
    seen &= axis_sees(y, y + offset[1], length[1], KERNEL[1], STRIDE[1], CAUSAL[1], False)
    seen &= axis_sees(z, z + offset[0], length[0], KERNEL[0], STRIDE[0], CAUSAL[0], False)
    z, y, x = z + offset[0] - start[0], y + offset[1] - start[1], x + offset[2] - start[2]
    number = (z // BOX[0] * steps[1] + y // BOX[1]) * steps[2] + x // BOX[2]
    slot = (z % BOX[0] * BOX[1] + y % BOX[1]) * BOX[2] + x % BOX[2]
    place = (number * heads + head) * (BLOCK * BLOCK) + tl.arange(0, BLOCK)[None, :] * BLOCK + slot
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for chunk in range(0, chunks):
        tiles = (chunk * count + index // heads).to(tl.int64) * (BOXES * heads * BLOCK * BLOCK)
        total += tl.load(sums + tiles + place, mask=seen, other=0.0)
    entry = tl.program_id(0) % BLOCKS * ENTRIES + tl.arange(0, ENTRIES)
    into = grad_table + (first_tile * heads + index).to(tl.int64) * ALL
    tl.store(into + entry, tl.sum(total, 1), mask=entry < ALL)
