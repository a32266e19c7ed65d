"""Triton: products with the channels of float32 heads that are too wide for registers, a slice at a time.

An exact product keeps all channels of its factors in the registers of a thread, where a tensor core reads them from
shared memory. So the kernels of wide heads read slices of channels when they need them, which the cache of the
multiprocessor holds, and add up sums of channels in the tensor that they are for: it is float32 too.

This module imports triton, as triton_common does.
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_common import multiply, token_pointers

MOST_CHANNELS = 64
"""Of float32 heads that kernels read whole."""
SLICE = tl.constexpr(32)
"""Channels of a slice."""


def too_wide(query: Tensor, value: Tensor) -> bool:
    """Whether heads are read in slices."""
    return query.element_size() == 4 and max(query.shape[-1], value.shape[-1]) > MOST_CHANNELS


@triton.jit
def _slice_pointers(tokens, position, head, valid, first, DIM: tl.constexpr):
    """Pointers (tokens, SLICE) to the channels from `first` on, and which of them there are."""
    channel = first + tl.arange(0, SLICE)
    pointers = token_pointers(tokens, position, head)[:, None] + channel[None, :]
    return pointers, valid[:, None] & (channel < DIM)[None, :]


@triton.jit
def load_slice(tokens, position, head, valid, first, DIM: tl.constexpr):
    """(tokens, SLICE) of one head, the channels from `first` on; zeros where there are none."""
    pointers, mask = _slice_pointers(tokens, position, head, valid, first, DIM)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def sum_products(left, right, position, head, valid, DIM: tl.constexpr):
    """Sum over the channels of two tensors of the same tokens, (tokens,)."""
    sums = tl.zeros([valid.shape[0]], tl.float32)
    for first in range(0, DIM, SLICE):
        factors = load_slice(left, position, head, valid, first, DIM)
        sums += tl.sum(factors * load_slice(right, position, head, valid, first, DIM), 1)
    return sums


@triton.jit
def pair_products(
    left,
    left_position,
    left_valid,
    right,
    right_position,
    right_valid,
    head,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products (left tokens, right tokens) of the channels of pairs."""
    sums = tl.zeros([left_valid.shape[0], right_valid.shape[0]], tl.float32)
    for first in range(0, DIM, SLICE):
        rows = load_slice(left, left_position, head, left_valid, first, DIM)
        columns = load_slice(right, right_position, head, right_valid, first, DIM)
        sums += tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    return sums


@triton.jit
def store_weighted(
    target, position, valid, weights, source, source_position, source_valid, head, scale, ADD,
    DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write, or add, weights (tokens, source tokens) times the source to the tokens of the target that are valid."""
    tl.debug_barrier()  # what is added to may have been written by other threads of the program
    for first in range(0, DIM, SLICE):
        values = load_slice(source, source_position, head, source_valid, first, DIM)
        sums = multiply(weights, values, PRECISION) * scale
        pointers, mask = _slice_pointers(target, position, head, valid, first, DIM)
        tl.store(pointers, sums + tl.load(pointers, mask=mask & ADD, other=0.0), mask=mask)
