"""Routed attention in Triton: keys and values are read from the regions that the routes name, and gathered nowhere.

A program owns queries of one region, or keys of one region, for one head. It goes through the keys of all its routes as
one list, so that small regions share a block. The gradients of keys need the queries that were routed to them: the
routes are sorted by region once, and each program reads its own section of that list. So every gradient is a sum in a
fixed order, without atomics.

Where a route names no region, its keys are left out: no memory outside the tensors is read.
"""

from typing import Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    LARGEST_HEAD_DIM,
    Call,
    attend,
    gradient_of_pairs,
    load_logsumexp,
    load_map,
    load_statistics,
    multiply,
    refuse_tensors,
    start_softmax,
    store_attention,
    store_map,
    token_pointers,
)


@triton.jit
def _program(heads, size, BLOCK: tl.constexpr):
    """What a program owns: a head, and tokens of a region of an image as positions and whether there is a token."""
    regions, tokens = size
    parts = tl.cdiv(tokens, BLOCK)
    index = tl.program_id(0) // heads
    token = index % parts * BLOCK + tl.arange(0, BLOCK)
    region = index // parts
    return tl.program_id(0) % heads, (region // regions, region % regions, token), token < tokens


@triton.jit
def _listed(regions_of_list, first, count, slot, image, size):
    """Tokens behind the slots of a list of regions, as positions and whether there is a token."""
    regions, tokens = size
    region = tl.load(regions_of_list + first + slot // tokens, mask=slot < count * tokens, other=-1)
    return (image, region, slot % tokens), (region >= 0) & (region < regions)


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    routes,
    output,
    logsumexp,
    size,
    topk,
    heads,
    scale,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, position, valid = _program(heads, size, BLOCK)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    first = (position[0].to(tl.int64) * size[0] + position[1]) * topk
    state = start_softmax(BLOCK, VALUE_CHANNELS)
    for start in range(0, topk * size[1], STEP):
        key_position, seen = _listed(routes, first, topk, start + tl.arange(0, STEP), position[0], size)
        keys = load_map(key, key_position, head, seen, HEAD_DIM, CHANNELS)
        values = load_map(value, key_position, head, seen, VALUE_DIM, VALUE_CHANNELS)
        state = attend(state, queries, keys, values, seen[None, :], 0.0, scale, PRECISION)
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
    size,
    topk,
    heads,
    scale,
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
    of a weight near 1, and with few keys such weights are common. So it takes a pass of its own, and is divided by the
    sum of the weights, which is 1 but for the rounding of the logsumexp.
    """
    head, position, valid = _program(heads, size, BLOCK)
    queries = load_map(query, position, head, valid, HEAD_DIM, CHANNELS)
    grads = load_map(grad_output, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
    statistics = load_logsumexp(logsumexp, position, head, valid)[:, None]
    first = (position[0].to(tl.int64) * size[0] + position[1]) * topk
    deltas = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, topk * size[1], STEP):
        key_position, seen = _listed(routes, first, topk, start + tl.arange(0, STEP), position[0], size)
        keys = load_map(key, key_position, head, seen, HEAD_DIM, CHANNELS)
        values = load_map(value, key_position, head, seen, VALUE_DIM, VALUE_CHANNELS)
        visible = valid[:, None] & seen[None, :]
        weights, products = gradient_of_pairs(
            queries, keys, grads, values, (statistics, 0.0), visible, 0.0, scale, PRECISION
        )
        deltas += tl.sum(products, 1)
        total += tl.sum(weights, 1)
    deltas = deltas / tl.where(total > 0, total, 1.0)
    tl.store(token_pointers(delta, position, head), deltas, mask=valid)
    if grad_query is not None:
        sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
        for start in range(0, topk * size[1], STEP):
            key_position, seen = _listed(routes, first, topk, start + tl.arange(0, STEP), position[0], size)
            keys = load_map(key, key_position, head, seen, HEAD_DIM, CHANNELS)
            values = load_map(value, key_position, head, seen, VALUE_DIM, VALUE_CHANNELS)
            visible = valid[:, None] & seen[None, :]
            _, of_scores = gradient_of_pairs(
                queries, keys, grads, values, (statistics, deltas[:, None]), visible, 0.0, scale, PRECISION
            )
            sums += multiply(of_scores, keys, PRECISION)
        store_map(grad_query, sums * scale, position, head, valid, HEAD_DIM, CHANNELS)


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
    size,
    topk,
    heads,
    scale,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of keys and values of one region. Scores have keys as rows."""
    head, position, valid = _program(heads, size, BLOCK)
    image, region, _ = position
    keys = load_map(key, position, head, valid, HEAD_DIM, CHANNELS)
    values = load_map(value, position, head, valid, VALUE_DIM, VALUE_CHANNELS)
    of_keys = tl.zeros([BLOCK, CHANNELS], tl.float32)
    of_values = tl.zeros([BLOCK, VALUE_CHANNELS], tl.float32)
    section = sections + image.to(tl.int64) * (size[0] + 1) + region
    first = tl.load(section)
    count = tl.load(section + 1) - first
    first += image.to(tl.int64) * size[0] * topk
    for start in range(0, count * size[1], STEP):
        asking, asked = _listed(askers, first, count, start + tl.arange(0, STEP), image, size)
        queries = load_map(query, asking, head, asked, HEAD_DIM, CHANNELS)
        grads = load_map(grad_output, asking, head, asked, VALUE_DIM, VALUE_CHANNELS)
        of_rows, deltas = load_statistics(logsumexp, delta, asking, head, asked)
        visible = valid[:, None] & asked[None, :]
        weights, of_scores = gradient_of_pairs(
            keys, queries, values, grads, (of_rows[None, :], deltas[None, :]), visible, 0.0, scale, PRECISION
        )
        if grad_key is not None:
            of_keys += multiply(of_scores, queries, PRECISION)
        if grad_value is not None:
            of_values += multiply(weights, grads, PRECISION)
    if grad_key is not None:
        store_map(grad_key, of_keys * scale, position, head, valid, HEAD_DIM, CHANNELS)
    if grad_value is not None:
        store_map(grad_value, of_values, position, head, valid, VALUE_DIM, VALUE_CHANNELS)


class _Call(Call):
    """The regions of one call."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: Optional[float]) -> None:
        super().__init__("routed", query, key, value, scale)
        self.routes = routes.contiguous()
        self.regions, self.tokens_of_region = self.size
        self.topk = routes.shape[2]
        self.arguments.update(routes=self.routes, size=self.size, topk=self.topk)

    def submit(self, kernel, name: str, **arguments) -> None:
        """Programs own tokens of regions; in each step they meet tokens of the regions in a list."""
        parameters = self.parameters(name)
        owned, step = (
            min(parameters.block, max(16, triton.next_power_of_2(tokens)))
            for tokens in (self.tokens_of_region, self.topk * self.tokens_of_region)
        )
        programs = self.batch * self.regions * triton.cdiv(self.tokens_of_region, owned) * self.heads
        super().submit(kernel, programs, parameters._replace(block=owned), STEP=step, **arguments)


def refuse(query: Tensor, key: Tensor, value: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    if value.shape[-1] > LARGEST_HEAD_DIM:
        return f"value_dim {value.shape[-1]} is above {LARGEST_HEAD_DIM}"
    return refuse_tensors(query)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    outputs = call.start_forward()
    call.submit(forward_kernel, "forward")
    return outputs


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], *arguments
) -> list[Tensor]:
    """Gradients of query, key and value, those that are needed."""
    call = _Call(*arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient)
    call.submit(backward_query_kernel, "backward_query")
    if needs_gradient[1] or needs_gradient[2]:
        askers, sections = _invert(call.routes)
        call.submit(backward_key_kernel, "backward_key", askers=askers, sections=sections)
    return [gradient for gradient in gradients if gradient is not None]


def _invert(routes: Tensor) -> tuple[Tensor, Tensor]:
    """Who is routed to a region, as a list by region.

    Returns:
        askers (batch, regions * k), int32: the region of the queries; sections (batch, regions + 1): where the list has
        those of a region.
    """
    regions, topk = routes.shape[1:]
    routed, order = routes.flatten(1).sort(dim=1, stable=True)
    bounds = torch.arange(regions + 1, device=routes.device, dtype=routes.dtype)
    sections = torch.searchsorted(routed, bounds.expand(len(routes), -1).contiguous(), out_int32=True)
    return (order // topk).to(torch.int32), sections
