"""Halo attention in Triton: blocks of queries read their windows from the map in place, without a copy of the halo.

A program owns queries of one block, for one head, and goes through the cells of its window in strips of a few rows.
Cells outside the map are zeros, or have no weight. The relative logits of a strip are a sum of those of its rows and
those of its columns; the latter are the same for all strips. Slots of a strip that are no cells have logits of -inf.

The backward makes each score once, twice where queries may see few keys (FEW_KEYS): a program also writes what its
queries give to the gradients of the window, and a second kernel adds up the windows that hold a token. So every sum has
a fixed order, without atomics. Windows overlap, and their gradients take two to four times the room of the map's: as
many images at a time as fit in SCRATCH.
"""

import math
from typing import Any, NamedTuple, Optional, Sequence

from torch import Tensor

from ..launch import Parameters
from ..triton_common import Call, Tokens, ceil_div, next_power_of_two, refuse_tensors
from .fused_kernels import backward_key_kernel, backward_query_kernel, forward_kernel
from .fused_kernels_geometry import Plan, Sides

MOST_QUERIES = 64
"""MOST_QUERIES is the most queries that a program owns, those of a block of 8 x 8 tokens."""
FEW_KEYS = 64
"""FEW_KEYS is the number of keys up to which the backward takes delta from the weights, in a pass of its own.

From the output delta has the error of its rounding, the same for all scores of a query: relative to the gradients it is
n**(-1/2) roundings for a score, with n keys of equal weight, and n**(-1/4) for the sum over one of sqrt(n) rows. Large
scores leave few of the keys their weight, and more of the error: of 500 to 1000 single windows with scores of some tens
the worst had 2.5 times the error that the tests allow for 9 keys, 0.7 times for 16, 0.5 for 36 and 0.3 for 64. That
is with rounding to the nearest; the interpreter cuts bfloat16 off, which doubles the error.
"""
SCRATCH = 2**30
"""SCRATCH is the number of bytes for the gradients of windows. It is large, 1 GiB, since one launch for all images is
faster than several.
"""


class _Blocks(NamedTuple):
    """The arguments of all kernels of blocks; height, width: relative logits."""

    height: Optional[Tokens]
    width: Optional[Tokens]
    plan: Plan
    SIDES: Sides
    MASK_PADDING: bool
    FEW_KEYS: bool


class _Windows(NamedTuple):
    """The gradients of the windows of some images, from the image `first` on."""

    window_keys: Optional[Tensor]
    window_values: Optional[Tensor]
    first: int


class _Call(Call):
    """The blocks of one call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_size: int,
        halo_size: int,
        relative_height_logits: Optional[Tensor],
        relative_width_logits: Optional[Tensor],
        mask_padding: bool,
        scale: Optional[float],
    ) -> None:
        super().__init__("halo", query, key, value, scale)
        self.key = key
        self.key_size = tuple(key.shape[1:3])
        self.blocks = tuple(size // block_size for size in self.key_size)
        self.side = self.size[0] // self.blocks[0]
        self.block_size, self.window = block_size, block_size + 2 * halo_size
        self.logits = (relative_height_logits, relative_width_logits)
        self.shared = _Blocks(
            *map(self.tokens, self.logits),
            plan=Plan(self.key_size, self.blocks),
            SIDES=Sides(self.side, block_size, halo_size),
            MASK_PADDING=mask_padding,
            FEW_KEYS=self.fewest_keys(halo_size, mask_padding) <= FEW_KEYS,
        )

    def fewest_keys(self, halo_size: int, mask_padding: bool) -> int:
        """Keys that the queries of a block see where these are fewest: with masks, in a corner of the map."""
        if not mask_padding:
            return self.window**2
        return math.prod(min(size, self.block_size + halo_size) for size in self.key_size)

    def start(self, name: str, kernel: Any, images: int, *groups: NamedTuple, **arguments: Any) -> None:
        """Start a kernel whose programs own queries."""
        parameters = self.parameters(name)
        queries, parts = self.queries_of_program(parameters)
        columns = min(parameters.block, max(16, next_power_of_two(self.window)))
        rest = next_power_of_two(self.window % (parameters.block // columns))  # rows of the last strip
        programs = images * self.blocks[0] * self.blocks[1] * parts * self.heads
        self.submit(
            kernel,
            programs,
            parameters,
            self.shared,
            *groups,
            QUERIES=queries,
            PARTS=parts,
            COLUMNS=columns,
            REST_ROWS=rest,
            **arguments,
        )

    def queries_of_program(self, parameters: Parameters) -> tuple[int, int]:
        """Queries that a program takes, and parts of a block that they make."""
        queries = min(2 * parameters.block, MOST_QUERIES, max(16, next_power_of_two(self.side**2)))
        return queries, ceil_div(self.side**2, queries)

    def backward(self, needs_key: bool, needs_value: bool, **gradients: Optional[Tokens]) -> None:
        """Images at a time: the gradients of all windows, then, for the keys and values, their sums."""
        _, query_parts = self.queries_of_program(self.parameters("backward_query"))
        windows = self.blocks[0] * self.blocks[1] * query_parts * self.heads * self.window**2
        size = windows * self.key.element_size() * (self.head_dim * needs_key + self.value_dim * needs_value)
        images = self.batch if size == 0 else max(1, min(self.batch, SCRATCH // size))
        scratch = [
            self.key.new_empty((images * windows, channels)) if needed else None
            for channels, needed in ((self.head_dim, needs_key), (self.value_dim, needs_value))
        ]
        for first in range(0, self.batch, max(images, 1)):
            count = min(images, self.batch - first)
            held = _Windows(*scratch, first)
            self.start("backward_query", backward_query_kernel, count, held, **gradients)
            if needs_key or needs_value:
                self._add_windows(count, query_parts, held)

    def _add_windows(self, images: int, query_parts: int, held: _Windows) -> None:
        parameters = self.parameters("backward_key")
        parts = ceil_div(self.block_size**2, parameters.block)
        programs = images * self.blocks[0] * self.blocks[1] * parts * self.heads
        self.submit(backward_key_kernel, programs, parameters, self.shared, held, PARTS=parts, QUERY_PARTS=query_parts)


def refuse(query: Tensor, key: Tensor, value: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors("halo", query, value)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    outputs = call.start_forward()
    call.start("forward", forward_kernel, call.batch)
    return outputs


def backward(
    grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool], *arguments
) -> list[Tensor]:
    """Gradients of query, key, value and the relative logits, those that are needed."""
    call = _Call(*arguments)
    gradients = call.start_backward(grad_output, output, logsumexp, needs_gradient)
    _, needs_key, needs_value, *needs_logits = needs_gradient
    grad_height, grad_width = (
        logits.new_empty(logits.shape) if needed else None
        for logits, needed in zip(call.logits, needs_logits, strict=True)
    )
    call.backward(needs_key, needs_value, grad_height=call.tokens(grad_height), grad_width=call.tokens(grad_width))
    gradients += [grad_height, grad_width]
    return [gradient for gradient in gradients if gradient is not None]
