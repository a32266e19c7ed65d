"""Window attention in Triton: windows are read from the map and written back in place, without a partition.

A program serves one head. Windows that fit into one block of tokens are attended to whole: small ones share a block,
several blocks share a program, and the backward recomputes the softmax and reads each tensor once. Larger windows go
through an online softmax over blocks of keys, and their gradients are summed by the tokens that own them.

The gradient of the bias table is summed over windows in registers, then over programs and offsets in a fixed order.
"""

from typing import Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import per_axis
from ..launch import Parameters, launch_parameters, submit
from ..triton_common import (
    LN_2,
    LOG2_E,
    adjacent_channels,
    gradient_of_scores,
    load_logsumexp,
    load_tokens,
    masked_scores,
    multiply,
    padded_channels,
    precision,
    refuse_tensors,
    softmax_step,
    store_tokens,
)
from .geometry import sum_by_offset

PROGRAMS = 1024
"""About seven on each multiprocessor of a large GPU: enough to fill it, few enough to sum their bias gradients."""


@triton.jit
def _locate(slot, block, plan, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """The tokens behind the slots of a block of PACK windows.

    Returns:
        position (image, row, column) in the map; a label, equal for tokens of the block that see each other; and
        whether there is a token.
    """
    windows, counts, size, step, spacing, shift = plan
    tokens: tl.constexpr = WINDOW[0] * WINDOW[1]
    member = slot // tokens
    token = slot % tokens
    window = block * PACK + member
    y = window // counts[1] % counts[0] * step[0] + token // WINDOW[1] * spacing[0] + shift[0]
    x = window % counts[1] * step[1] + token % WINDOW[1] * spacing[1] + shift[1]
    wrapped_y = y >= size[0]
    wrapped_x = x >= size[1]
    y = tl.where(wrapped_y, y - size[0], y)
    x = tl.where(wrapped_x, x - size[1], x)
    label = member * 4 + wrapped_y.to(tl.int32) * 2 + wrapped_x.to(tl.int32)
    image = window // (counts[0] * counts[1])
    return (image, y, x), label, (slot < PACK * tokens) & (window < windows)


@triton.jit
def _rows(position, head, strides):
    image, y, x = position
    offset = image.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
    return offset + tl.cast(head, tl.int64) * strides[3]


@triton.jit
def _number(position, head, heads, size):
    """Of the (token, head) pair in a contiguous tensor."""
    image, y, x = position
    return ((image.to(tl.int64) * size[0] + y) * size[1] + x) * heads + head


@triton.jit
def _bias(table, head, query, key, WINDOW: tl.constexpr):
    """Entries of the table in base 2 for slots of queries and keys, which come with the other's axis put in."""
    tokens: tl.constexpr = WINDOW[0] * WINDOW[1]
    row = key % tokens // WINDOW[1] - query % tokens // WINDOW[1] + WINDOW[0] - 1
    column = key % tokens % WINDOW[1] - query % tokens % WINDOW[1] + WINDOW[1] - 1
    entry = (head * (2 * WINDOW[0] - 1) + row) * (2 * WINDOW[1] - 1) + column
    return tl.load(table + entry).to(tl.float32) * LOG2_E


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    table,
    output,
    logsumexp,
    query_strides,
    key_strides,
    value_strides,
    plan,
    blocks,
    blocks_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the queries of one part of some blocks of windows, for one head."""
    SLOTS: tl.constexpr = PACK * WINDOW[0] * WINDOW[1]
    PARTS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // (heads * PARTS) * blocks_per_program
    query_slot = tl.program_id(0) // heads % PARTS * BLOCK + tl.arange(0, BLOCK)
    bias = 0.0
    if HAS_BIAS and PARTS == 1:
        bias = _bias(table, head, query_slot[:, None], query_slot[None, :], WINDOW)
    for block in range(first, tl.minimum(first + blocks_per_program, blocks)):
        position, label, valid = _locate(query_slot, block, plan, WINDOW, PACK)
        queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        for start in range(0, SLOTS, BLOCK):
            key_slot = start + tl.arange(0, BLOCK)
            key_position, key_label, key_valid = _locate(key_slot, block, plan, WINDOW, PACK)
            keys = load_tokens(key, _rows(key_position, head, key_strides), key_valid, HEAD_DIM, CHANNELS)
            values = load_tokens(value, _rows(key_position, head, value_strides), key_valid, HEAD_DIM, CHANNELS)
            visible = (label[:, None] == key_label[None, :]) & key_valid[None, :]
            part_bias = bias
            if HAS_BIAS and PARTS > 1:
                part_bias = _bias(table, head, query_slot[:, None], key_slot[None, :], WINDOW)
            scores = masked_scores(queries, keys, visible, part_bias, scale, PRECISION)
            weights, largest, total, decay = softmax_step(scores, largest, total)
            sums = sums * decay[:, None] + multiply(weights, values, PRECISION)
        total = tl.where(valid, total, 1.0)
        number = _number(position, head, heads, plan[2])
        store_tokens(output, number * HEAD_DIM, valid, sums / total[:, None], HEAD_DIM, CHANNELS)
        tl.store(logsumexp + number, (largest + tl.log2(total)) * LN_2, mask=valid)


@triton.jit
def backward_whole_kernel(
    query,
    key,
    value,
    table,
    grad_output,
    grad_query,
    grad_key,
    grad_value,
    partial,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    plan,
    blocks,
    blocks_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of windows that fit into one block: one program has some blocks of windows, for one head."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * blocks_per_program
    slot = tl.arange(0, BLOCK)
    bias = 0.0
    if HAS_BIAS:
        bias = _bias(table, head, slot[:, None], slot[None, :], WINDOW)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block in range(first, tl.minimum(first + blocks_per_program, blocks)):
        position, label, valid = _locate(slot, block, plan, WINDOW, PACK)
        queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS)
        keys = load_tokens(key, _rows(position, head, key_strides), valid, HEAD_DIM, CHANNELS)
        values = load_tokens(value, _rows(position, head, value_strides), valid, HEAD_DIM, CHANNELS)
        grads = load_tokens(grad_output, _rows(position, head, grad_strides), valid, HEAD_DIM, CHANNELS)
        visible = (label[:, None] == label[None, :]) & valid[:, None] & valid[None, :]
        scores = masked_scores(queries, keys, visible, bias, scale, PRECISION)
        # the maximum and the sum apart: a logsumexp would carry over the rounding of large scores
        largest = tl.where(valid, tl.max(scores, 1), 0.0)
        weights = tl.where(visible, tl.exp2(scores - largest[:, None]), 0.0)
        weights = weights / tl.where(valid, tl.sum(weights, 1), 1.0)[:, None]
        row = _number(position, head, heads, plan[2]) * HEAD_DIM
        if NEEDS[2]:
            of_values = multiply(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
            store_tokens(grad_value, row, valid, of_values, HEAD_DIM, CHANNELS)
        if NEEDS[0] or NEEDS[1] or NEEDS[3]:
            of_weights = multiply(grads, tl.trans(values), PRECISION)
            of_scores = weights * (of_weights - tl.sum(weights * of_weights, 1)[:, None])
            if NEEDS[3]:
                grad_bias += of_scores
            of_scores = of_scores.to(keys.dtype)
            if NEEDS[0]:
                of_queries = multiply(of_scores, keys, PRECISION) * scale
                store_tokens(grad_query, row, valid, of_queries, HEAD_DIM, CHANNELS)
            if NEEDS[1]:
                of_keys = multiply(tl.trans(of_scores), queries, PRECISION) * scale
                store_tokens(grad_key, row, valid, of_keys, HEAD_DIM, CHANNELS)
    if NEEDS[3]:
        pair = tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + slot[:, None] * BLOCK + slot[None, :]
        tl.store(partial + pair, grad_bias)


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
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    plan,
    heads,
    scale,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of one part of the queries of a window, and delta, the sum of output times gradient."""
    SLOTS: tl.constexpr = WINDOW[0] * WINDOW[1]
    PARTS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // (heads * PARTS)
    query_slot = tl.program_id(0) // heads % PARTS * BLOCK + tl.arange(0, BLOCK)
    position, label, valid = _locate(query_slot, window, plan, WINDOW, 1)
    number = _number(position, head, heads, plan[2])
    grads = load_tokens(grad_output, _rows(position, head, grad_strides), valid, HEAD_DIM, CHANNELS)
    outputs = load_tokens(output, number * HEAD_DIM, valid, HEAD_DIM, CHANNELS)
    deltas = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + number, deltas, mask=valid)
    if NEEDS[0]:
        queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS)
        statistics = load_logsumexp(logsumexp, number, valid)
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        for start in range(0, SLOTS, BLOCK):
            key_slot = start + tl.arange(0, BLOCK)
            key_position, key_label, key_valid = _locate(key_slot, window, plan, WINDOW, 1)
            keys = load_tokens(key, _rows(key_position, head, key_strides), key_valid, HEAD_DIM, CHANNELS)
            values = load_tokens(value, _rows(key_position, head, value_strides), key_valid, HEAD_DIM, CHANNELS)
            visible = (label[:, None] == key_label[None, :]) & valid[:, None] & key_valid[None, :]
            bias = 0.0
            if HAS_BIAS:
                bias = _bias(table, head, query_slot[:, None], key_slot[None, :], WINDOW)
            scores = masked_scores(queries, keys, visible, bias, scale, PRECISION)
            of_weights = multiply(grads, tl.trans(values), PRECISION)
            _, of_scores = gradient_of_scores(scores, statistics[:, None], visible, of_weights, deltas[:, None])
            sums += multiply(of_scores, keys, PRECISION)
        store_tokens(grad_query, number * HEAD_DIM, valid, sums * scale, HEAD_DIM, CHANNELS)


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
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    plan,
    heads,
    scale,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of one part of the keys and values of a window. Scores have keys as rows."""
    SLOTS: tl.constexpr = WINDOW[0] * WINDOW[1]
    PARTS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // (heads * PARTS)
    key_slot = tl.program_id(0) // heads % PARTS * BLOCK + tl.arange(0, BLOCK)
    key_position, key_label, key_valid = _locate(key_slot, window, plan, WINDOW, 1)
    keys = load_tokens(key, _rows(key_position, head, key_strides), key_valid, HEAD_DIM, CHANNELS)
    values = load_tokens(value, _rows(key_position, head, value_strides), key_valid, HEAD_DIM, CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for start in range(0, SLOTS, BLOCK):
        query_slot = start + tl.arange(0, BLOCK)
        position, label, valid = _locate(query_slot, window, plan, WINDOW, 1)
        number = _number(position, head, heads, plan[2])
        queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS)
        grads = load_tokens(grad_output, _rows(position, head, grad_strides), valid, HEAD_DIM, CHANNELS)
        statistics = load_logsumexp(logsumexp, number, valid)
        deltas = tl.load(delta + number, mask=valid, other=0.0)
        visible = (key_label[:, None] == label[None, :]) & key_valid[:, None] & valid[None, :]
        bias = 0.0
        if HAS_BIAS:
            bias = _bias(table, head, query_slot[None, :], key_slot[:, None], WINDOW)
        scores = masked_scores(keys, queries, visible, bias, scale, PRECISION)
        of_weights = multiply(values, tl.trans(grads), PRECISION)
        weights, of_scores = gradient_of_scores(scores, statistics[None, :], visible, of_weights, deltas[None, :])
        if NEEDS[1]:
            of_keys += multiply(of_scores, queries, PRECISION)
        if NEEDS[2]:
            of_values += multiply(weights, grads, PRECISION)
    row = _number(key_position, head, heads, plan[2]) * HEAD_DIM
    if NEEDS[1]:
        store_tokens(grad_key, row, key_valid, of_keys * scale, HEAD_DIM, CHANNELS)
    if NEEDS[2]:
        store_tokens(grad_value, row, key_valid, of_values, HEAD_DIM, CHANNELS)


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
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    plan,
    windows_per_program,
    heads,
    scale,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of the scores of a part of queries with a part of keys, summed over some windows."""
    PARTS: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    parts = tl.program_id(0) // heads % (PARTS * PARTS)
    chunk = tl.program_id(0) // (heads * PARTS * PARTS)
    query_slot = parts // PARTS * BLOCK + tl.arange(0, BLOCK)
    key_slot = parts % PARTS * BLOCK + tl.arange(0, BLOCK)
    bias = _bias(table, head, query_slot[:, None], key_slot[None, :], WINDOW)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = chunk * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, plan[0])):
        position, label, valid = _locate(query_slot, window, plan, WINDOW, 1)
        key_position, key_label, key_valid = _locate(key_slot, window, plan, WINDOW, 1)
        number = _number(position, head, heads, plan[2])
        queries = load_tokens(query, _rows(position, head, query_strides), valid, HEAD_DIM, CHANNELS)
        keys = load_tokens(key, _rows(key_position, head, key_strides), key_valid, HEAD_DIM, CHANNELS)
        values = load_tokens(value, _rows(key_position, head, value_strides), key_valid, HEAD_DIM, CHANNELS)
        grads = load_tokens(grad_output, _rows(position, head, grad_strides), valid, HEAD_DIM, CHANNELS)
        statistics = load_logsumexp(logsumexp, number, valid)
        deltas = tl.load(delta + number, mask=valid, other=0.0)
        visible = (label[:, None] == key_label[None, :]) & valid[:, None] & key_valid[None, :]
        scores = masked_scores(queries, keys, visible, bias, scale, PRECISION)
        of_weights = multiply(grads, tl.trans(values), PRECISION)
        sums += gradient_of_scores(scores, statistics[:, None], visible, of_weights, deltas[:, None])[1]
    pair = (chunk * heads + head).to(tl.int64) * (PARTS * BLOCK) + query_slot[:, None]
    tl.store(partial + pair * (PARTS * BLOCK) + key_slot[None, :], sums)


class _Call:
    """What the launches of one call share."""

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
        self.query = query
        self.batch, *self.size, self.heads, self.head_dim = query.shape
        self.window = per_axis("window_size", window_size, 2)
        self.tokens = self.window[0] * self.window[1]
        counts = tuple(size // extent for size, extent in zip(self.size, self.window, strict=True))
        self.windows = self.batch * counts[0] * counts[1]
        step, spacing = ((1, 1), counts) if partition == "grid" else (self.window, (1, 1))
        shifts = zip(per_axis("shift", shift, 2), counts, strict=True)
        shifts = tuple(offset if count > 1 else 0 for offset, count in shifts)
        inputs = [adjacent_channels(tensor) for tensor in (query, key, value)]
        bias = relative_position_bias
        names = ("query", "key", "value")
        self.arguments = {
            **dict(zip(names, inputs, strict=True)),
            **{f"{name}_strides": tensor.stride()[:4] for name, tensor in zip(names, inputs, strict=True)},
            "table": None if bias is None else bias.contiguous(),
            "plan": (self.windows, counts, tuple(self.size), step, spacing, shifts),
            "heads": self.heads,
            "scale": float(self.head_dim**-0.5 if scale is None else scale),
            "WINDOW": self.window,
            "HEAD_DIM": self.head_dim,
            "CHANNELS": padded_channels(self.head_dim),
            "PRECISION": precision(query.dtype),
        }

    def parameters(self, name: str) -> Parameters:
        return launch_parameters(f"window_{name}", self.query, padded_channels(self.head_dim))

    def submit(self, kernel, programs: int, parameters: Parameters, **arguments) -> None:
        submit(kernel, programs, parameters, **self.arguments, BLOCK=parameters.block, **arguments)

    def spread(self, blocks: int) -> tuple[int, int]:
        """Blocks of one program, and the number of programs of a head."""
        share = max(1, blocks * self.heads // PROGRAMS)
        return share, triton.cdiv(blocks, share)


def refuse(query: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors(query)


def forward(query: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    call = _Call(query, *arguments)
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    parameters = call.parameters("forward_whole")
    if call.tokens > parameters.block:
        parameters = call.parameters("forward")
    pack = max(1, parameters.block // call.tokens)
    blocks = triton.cdiv(call.windows, pack)
    share, groups = call.spread(blocks)
    parts = triton.cdiv(pack * call.tokens, parameters.block)
    call.submit(
        forward_kernel,
        groups * parts * call.heads,
        parameters,
        output=output,
        logsumexp=logsumexp,
        blocks=blocks,
        blocks_per_program=share,
        PACK=pack,
        HAS_BIAS=call.arguments["table"] is not None,
    )
    return output, logsumexp


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], query: Tensor, *arguments
) -> list[Tensor]:
    """Gradients of query, key, value and the bias table, those that are needed."""
    call = _Call(query, *arguments)
    grad_output = adjacent_channels(grad_output)
    gradients = [query.new_empty(query.shape) if needed else None for needed in needs_gradient[:3]]
    call.arguments.update(grad_output=grad_output, grad_strides=grad_output.stride()[:4])
    if call.tokens <= call.parameters("backward_whole").block:
        of_pairs = _backward_whole(call, needs_gradient, *gradients)
    else:
        of_pairs = _backward_parts(call, output, logsumexp, needs_gradient, *gradients)
    if of_pairs is not None:
        gradients.append(sum_by_offset(of_pairs, call.window))
    return [gradient for gradient in gradients if gradient is not None]


def _backward_whole(call: _Call, needs_gradient: Sequence[bool], *gradients: Optional[Tensor]) -> Optional[Tensor]:
    """Fills the gradients; returns that of the bias by pairs of tokens, (heads, tokens, tokens), if it is needed."""
    parameters = call.parameters("backward_whole")
    block = parameters.block
    pack = block // call.tokens
    blocks = triton.cdiv(call.windows, pack)
    share, groups = call.spread(blocks)
    shape = (groups, call.heads, block, block)
    partial = call.query.new_empty(shape, dtype=torch.float32) if needs_gradient[3] else None
    call.submit(
        backward_whole_kernel,
        groups * call.heads,
        parameters,
        **dict(zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True)),
        partial=partial,
        blocks=blocks,
        blocks_per_program=share,
        PACK=pack,
        HAS_BIAS=call.arguments["table"] is not None,
        NEEDS=tuple(needs_gradient),
    )
    if partial is None:
        return None
    used = pack * call.tokens
    members = partial.sum(0)[:, :used, :used].unflatten(2, (pack, -1)).unflatten(1, (pack, -1))
    return members.diagonal(dim1=1, dim2=3).sum(-1)


def _backward_parts(
    call: _Call, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], *gradients: Optional[Tensor]
) -> Optional[Tensor]:
    """As :func:`_backward_whole`, for windows of several blocks."""
    shared = {"logsumexp": logsumexp, "delta": torch.empty_like(logsumexp)}
    flags = {"HAS_BIAS": call.arguments["table"] is not None, "NEEDS": tuple(needs_gradient)}
    _, needs_key, needs_value, needs_bias = needs_gradient
    parameters = call.parameters("backward_query")
    programs = call.windows * call.heads * triton.cdiv(call.tokens, parameters.block)
    of_query, of_key, of_value = gradients
    call.submit(
        backward_query_kernel, programs, parameters, output=output.contiguous(), grad_query=of_query, **shared, **flags
    )
    if needs_key or needs_value:
        parameters = call.parameters("backward_key")
        programs = call.windows * call.heads * triton.cdiv(call.tokens, parameters.block)
        call.submit(backward_key_kernel, programs, parameters, grad_key=of_key, grad_value=of_value, **shared, **flags)
    return _backward_bias(call, **shared) if needs_bias else None


def _backward_bias(call: _Call, logsumexp: Tensor, delta: Tensor) -> Tensor:
    parameters = call.parameters("backward_bias")
    parts = triton.cdiv(call.tokens, parameters.block)
    share = max(1, call.windows * call.heads * parts**2 // PROGRAMS)
    chunks = triton.cdiv(call.windows, share)
    shape = (chunks, call.heads, parts * parameters.block, parts * parameters.block)
    partial = call.query.new_empty(shape, dtype=torch.float32)
    call.submit(
        backward_bias_kernel,
        chunks * parts**2 * call.heads,
        parameters,
        logsumexp=logsumexp,
        delta=delta,
        partial=partial,
        windows_per_program=share,
    )
    return partial.sum(0)[:, : call.tokens, : call.tokens]
