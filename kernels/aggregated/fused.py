"""Aggregated attention in Triton. A program owns a tile of queries, or of keys, of some images, or a block of pooled
keys, for one head; nothing is unfolded. Gradients of pooled keys and of biases are sums over many tiles or images:
programs leave partial sums in float32, which are added in a fixed order. There are no atomics.
"""

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..launch import Parameters
from ..triton_common import Call, Tokens, as_tokens, ceil_div, next_power_of_two, refuse_tensors
from .fused_kernels import (
    backward_bias_kernel,
    backward_key_kernel,
    backward_pooled_kernel,
    backward_query_kernel,
    forward_kernel,
)
from .fused_kernels_geometry import Plan

PROGRAMS = 1024
"""PROGRAMS is the number of programs that a kernel should have, about seven on each of 132 multiprocessors: sums are
cut into parts, which are added later, until there are as many.
"""
TILE_PROGRAMS = 4
"""TILE_PROGRAMS times as many programs are wanted of kernels of tiles, to which a further part costs no map of sums but
the biases of a tile, read once more.
"""


class _Map(NamedTuple):
    """The arguments of all kernels of the map and its pooled tokens.

    Attributes:
        pooled_bias: (heads, tokens, CELLS), -inf for pooled tokens that are none.
        tokens, pooled: tokens of the map, and pooled ones.
        STEP: pooled tokens that a program takes at once.
        CELLS: pooled, padded to whole steps.
        WHOLE: whether there is one step.
    """

    pooled_key: Tokens
    pooled_value: Tokens
    local_bias: Optional[Tensor]
    pooled_bias: Optional[Tensor]
    value_weights: Optional[Tokens]
    batch: int
    tokens: int
    pooled: int
    WINDOW: int
    STEP: int
    CELLS: int
    WHOLE: bool


class _Call(Call):
    """What the launches of one call share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        window_size: int,
        local_bias: Optional[Tensor],
        pooled_bias: Optional[Tensor],
        value_weights: Optional[Tensor],
        scale: Optional[float],
    ) -> None:
        super().__init__("aggregated", query, key, value, scale)
        self.window, self.tokens_of_map = window_size, self.size[0] * self.size[1]
        pooled_keys, pooled_values = (as_tokens(pooled.flatten(1, -3), 1) for pooled in (pooled_key, pooled_value))
        self.pooled = pooled_keys.pointer.shape[1]
        widest = 64 if self.head_dim <= 32 else 32  # wide heads leave fewer registers for pooled tokens
        step = max(16, min(widest, next_power_of_two(self.pooled)))
        self.steps = ceil_div(self.pooled, step)
        if pooled_bias is not None:
            pooled_bias = pooled_bias.expand(self.heads, self.tokens_of_map, self.pooled)
            pooled_bias = _padded_bias(pooled_bias, self.steps * step)
        self.shared = _Map(
            pooled_key=pooled_keys,
            pooled_value=pooled_values,
            local_bias=None if local_bias is None else local_bias.contiguous(),
            pooled_bias=pooled_bias,
            value_weights=self.tokens(value_weights),
            batch=self.batch,
            tokens=self.tokens_of_map,
            pooled=self.pooled,
            WINDOW=window_size,
            STEP=step,
            CELLS=self.steps * step,
            WHOLE=self.pooled <= step,
        )

    def tiling(self, parameters: Parameters) -> tuple[tuple[int, int], tuple[int, int], int, int]:
        """Extent of a tile, number of tiles along each axis, images that a program takes one through, and parts."""
        rows = min(2 ** ((parameters.block.bit_length() - 1) // 2), next_power_of_two(self.size[0]))
        tile = (rows, parameters.block // rows)
        tiles = tuple(ceil_div(size, extent) for size, extent in zip(self.size, tile, strict=True))
        return tile, tiles, *_items_per_program(self.batch, tiles[0] * tiles[1] * self.heads, TILE_PROGRAMS * PROGRAMS)

    def programs_of_head(self, parameters: Parameters) -> int:
        """Of a kernel of tiles."""
        _, tiles, _, parts = self.tiling(parameters)
        return parts * tiles[0] * tiles[1]

    def submit_tiles(self, kernel, parameters: Parameters, **arguments) -> None:
        """Start a kernel whose programs take a tile of the map through some images."""
        tile, tiles, images, _ = self.tiling(parameters)
        box = (tile[0] + self.window - 1) * (tile[1] + self.window - 1)
        self.submit(
            kernel,
            self.programs_of_head(parameters) * self.heads,
            parameters,
            self.shared,
            plan=Plan(self.size, tiles, self.batch, self.heads, images),
            TILE=tile,
            BOX=max(16, next_power_of_two(box)),
            SLOTS=max(16, next_power_of_two(self.window**2)),
            **arguments,
        )

    def flatten(self) -> None:
        """Put the rows of the map behind each other, for the kernels that follow; copies them where they lie apart."""
        found = self.results
        self.inputs = self.inputs._replace(query=_flat(self.inputs.query))
        self.results = found._replace(
            grad_output=_flat(found.grad_output), logsumexp=_flat(found.logsumexp), delta=_flat(found.delta)
        )

    def partial(self, *shape: int) -> Tensor:
        """Space for sums that are added later."""
        return self.query.new_empty(shape, dtype=torch.float32)


def _flat(tokens: Tokens) -> Tokens:
    return as_tokens(tokens.pointer.flatten(1, 2), 1, channels=tokens.pointer.dim() == 5)


def _padded_bias(bias: Tensor, cells: int) -> Tensor:
    """(heads, tokens, cells) of (heads, tokens, pooled), with -inf for pooled tokens that are none."""
    return F.pad(bias, (0, cells - bias.shape[-1]), value=float("-inf")).contiguous()


def _items_per_program(items: int, programs: int, wanted: int) -> tuple[int, int]:
    """Items that one program takes, where each item takes `programs` of them, and the number of parts that makes."""
    taken = max(1, min(items, items * programs // wanted))
    return taken, ceil_div(items, taken)


def refuse(query: Tensor, key: Tensor, value: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors("aggregated", query, value)


def forward(query: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    call = _Call(query, *arguments)
    outputs = call.start_forward()
    parameters = call.parameters("forward")
    call.submit_tiles(forward_kernel, parameters)
    return outputs


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], query: Tensor, *arguments
) -> list[Tensor]:
    """Gradients of the tensor arguments in their order, those that are needed."""
    call = _Call(query, *arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient)
    pooled_shape, pooled_bias, value_weights = arguments[2].shape, arguments[6], arguments[7]
    grad_value_weights = value_weights.new_empty(value_weights.shape) if needs_gradient[7] else None
    parameters = call.parameters("backward_query")
    call.submit_tiles(backward_query_kernel, parameters, grad_value_weights=call.tokens(grad_value_weights))
    grad_local_bias = _backward_key(call, needs_gradient)
    call.flatten()
    for grad_pooled in _backward_pooled(call, *needs_gradient[3:5]):
        gradients.append(None if grad_pooled is None else grad_pooled.view(pooled_shape))
    gradients.append(grad_local_bias)
    gradients.append(_backward_bias(call).sum_to_size(pooled_bias.shape) if needs_gradient[6] else None)
    gradients.append(grad_value_weights)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_key(call: _Call, needs_gradient: Sequence[bool]) -> Optional[Tensor]:
    """Fills the gradients of key and value, those that are needed; returns that of the local bias, if it is needed."""
    if not (needs_gradient[1] or needs_gradient[2] or needs_gradient[5]):
        return None
    parameters = call.parameters("backward_key")
    partial = None
    if needs_gradient[5]:
        partial = call.partial(call.programs_of_head(parameters), call.heads, call.window**2)
    call.submit_tiles(backward_key_kernel, parameters, partial=partial)
    return None if partial is None else partial.sum(0)


def _backward_pooled(call: _Call, needs_key: bool, needs_value: bool) -> list[Optional[Tensor]]:
    """Gradients (batch, pooled, heads, head_dim) of the pooled keys and values, those that are needed."""
    if not (needs_key or needs_value):
        return [None, None]
    parameters = call.parameters("backward_pooled")
    programs = call.batch * call.steps * call.heads
    runs, parts = _items_per_program(ceil_div(call.tokens_of_map, parameters.block), programs, PROGRAMS)
    shape = (parts, call.batch, call.pooled, call.heads, call.head_dim)
    partials = [call.partial(*shape) if needed else None for needed in (needs_key, needs_value)]
    sums = (None if partial is None else as_tokens(partial.flatten(0, 1), 1) for partial in partials)
    partial_key, partial_value = sums
    call.submit(
        backward_pooled_kernel,
        parts * programs,
        parameters,
        call.shared,
        runs_per_program=runs,
        partial_key=partial_key,
        partial_value=partial_value,
    )
    return [None if partial is None else partial.sum(0) for partial in partials]


def _backward_bias(call: _Call) -> Tensor:
    """Gradient (heads, tokens, pooled) of the pooled bias."""
    parameters = call.parameters("backward_bias")
    programs = ceil_div(call.tokens_of_map, parameters.block) * call.steps * call.heads
    images, parts = _items_per_program(call.batch, programs, PROGRAMS)
    partial = call.partial(parts, call.heads, call.tokens_of_map, call.pooled)
    call.submit(
        backward_bias_kernel, parts * programs, parameters, call.shared, partial=partial, images_per_program=images
    )
    return partial.sum(0)
