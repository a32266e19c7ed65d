"""What the Triton kernels of all operators share: masked loads and stores, softmax and its gradient, and who may run.

This module imports triton. Only the fused implementations import it, and they are imported when first needed.

A kernel takes every tensor of tokens as :class:`Tokens`, inputs, outputs, gradients, lse and delta alike; an optional
one, or a gradient that is not needed, is None. A token is named by its position, (image, *place in the map), and its
head. Scores are held in base 2, as the hardware has exp2 only.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple, Optional, Sequence, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import selected_backend
from .launch import Parameters, architecture, covers, launch_parameters, submit

LARGEST_HEAD_DIM = 160
"""LARGEST_HEAD_DIM is the widest head that the kernels were compiled and tested for."""
VECTOR_BYTES = 16
"""VECTOR_BYTES is the most that a thread reads with one instruction."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tokens(NamedTuple):
    """A tensor (batch, *spatial, heads, channels) as kernels take it, or without channels; its channels are adjacent.

    Attributes:
        strides: of batch, spatial axes and heads, divided by ALIGN.
        ALIGN: a power of two that divides all strides, as a constant: the compiler then reads up to 16 bytes at a time.
        WIDE: whether places in one image lie so far apart that their offsets need 64 bits.
    """

    pointer: Tensor
    strides: tuple[int, ...]
    ALIGN: tl.constexpr
    WIDE: tl.constexpr


@triton.jit
def token_pointers(tokens, position, head):
    """Pointers to the first channels of tokens; the image, whose offset always has 64 bits, may be a scalar."""
    strides = tokens.strides
    last: tl.constexpr = len(strides) - 1
    image = tl.cast(position[0], tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[last]
    place = 0
    for axis in tl.static_range(1, last):
        if tokens.WIDE:
            place += tl.cast(position[axis], tl.int64) * strides[axis]
        else:
            place += position[axis] * strides[axis]
    return tokens.pointer + image * tokens.ALIGN + place * tokens.ALIGN


@triton.jit
def _channels(pointers, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers and mask (tokens, CHANNELS): head_dim is padded to a power of two."""
    channel = tl.arange(0, CHANNELS)
    mask = valid[:, None]
    if HEAD_DIM < CHANNELS:
        mask = mask & (channel < HEAD_DIM)[None, :]
    return pointers[:, None] + channel[None, :], mask


@triton.jit
def load_map(tokens, position, head, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """(tokens, CHANNELS) of one head; zeros where channels are padded and where tokens are not valid."""
    pointers, mask = _channels(token_pointers(tokens, position, head), valid, HEAD_DIM, CHANNELS)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_maps(first, second, position, head, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """The same tokens of two tensors."""
    left = load_map(first, position, head, valid, HEAD_DIM, CHANNELS)
    return left, load_map(second, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def store_map(tokens, values, position, head, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Write (tokens, CHANNELS) of one head."""
    pointers, mask = _channels(token_pointers(tokens, position, head), valid, HEAD_DIM, CHANNELS)
    tl.store(pointers, values.to(tokens.pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_lse(logsumexp, position, head, valid):
    """The lse of queries in base 2; it is stored in base e."""
    return tl.load(token_pointers(logsumexp, position, head), mask=valid, other=0.0) * LOG2_E


@triton.jit
def load_lse_and_delta(logsumexp, delta, position, head, valid):
    """Of queries: the lse in base 2, and delta, the sum of output times gradient."""
    lse = load_lse(logsumexp, position, head, valid)
    return lse, tl.load(token_pointers(delta, position, head), mask=valid, other=0.0)


@triton.jit
def store_delta(delta, output, grads, position, head, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum output times gradient of each query, for this kernel and for those that run after it."""
    outputs = load_map(output, position, head, valid, HEAD_DIM, CHANNELS)
    deltas = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(token_pointers(delta, position, head), deltas, mask=valid)
    return deltas


@triton.jit
def softmax_step(scores, largest, total):
    """One block of keys of an online softmax over rows.

    Args:
        scores: (queries, keys) in base 2, -inf where a key is not seen.
        largest, total: (queries,) of the blocks so far: the largest score, and the sum of the weights relative to it.

    Returns:
        weights of the block, largest and total with the block, and the factor that brings earlier sums up to date.
    """
    updated = tl.maximum(largest, tl.max(scores, 1))
    reference = tl.where(updated == float("-inf"), 0.0, updated)  # nothing seen so far: no inf - inf
    weights = tl.exp2(scores - reference[:, None])
    decay = tl.exp2(largest - reference)
    return weights, updated, total * decay + tl.sum(weights, 1), decay


@triton.jit
def start_softmax(BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """The state of an online softmax before the first key: largest score, total of the weights, sums of values."""
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    return largest, tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, CHANNELS], tl.float32)


@triton.jit
def attend(state, queries, keys, values, bias, scale, PRECISION: tl.constexpr):
    """The state with one more block of keys; bias as for :func:`score`."""
    return accumulate(state, score(queries, keys, bias, scale, PRECISION), values, PRECISION)


@triton.jit
def accumulate(state, scores, values, PRECISION: tl.constexpr):
    """The state with one more block of keys, from their scores in base 2."""
    largest, total, sums = state
    weights, largest, total, decay = softmax_step(scores, largest, total)
    return largest, total, sums * decay[:, None] + multiply(weights, values, PRECISION)


@triton.jit
def store_attention(state, output, logsumexp, position, head, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Output and logsumexp of the queries, after the last block of keys."""
    largest, total, sums = state
    total = tl.where(valid, total, 1.0)
    store_map(output, sums * (1.0 / total)[:, None], position, head, valid, HEAD_DIM, CHANNELS)
    tl.store(token_pointers(logsumexp, position, head), (largest + tl.log2(total)) * LN_2, mask=valid)


@triton.jit
def score(left, right, bias, scale, PRECISION: tl.constexpr):
    """Scores in base 2 of the tokens of `left` (rows) and `right` (columns).

    Args:
        bias: of the pairs in base 2, -inf where they do not see each other.
    """
    return tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * LOG2_E) + bias


@triton.jit
def weigh(left, right, left_values, right_values, bias, scale, PRECISION: tl.constexpr):
    """Softmax weights of pairs of tokens, and the gradients of these.

    Args:
        left, left_values: of the tokens that are rows: queries and output gradients, or keys and values.
        right, right_values: of the tokens that are columns: the others.
        bias: as for :func:`score`, less the lse of the query in base 2.
    """
    weights = tl.exp2(score(left, right, bias, scale, PRECISION))
    return weights, multiply(left_values, tl.trans(right_values), PRECISION)


@triton.jit
def multiply(left, right, PRECISION: tl.constexpr):
    """Matrix product with float32 sums; the left factor is rounded to the dtype of the right one."""
    return tl.dot(left.to(right.dtype), right, input_precision=PRECISION)


def interpreted() -> bool:
    """Whether Triton was imported under TRITON_INTERPRET=1 and runs kernels on CPU tensors."""
    return not isinstance(load_map, triton.JITFunction)


def refuse_tensors(operator: str, query: Tensor, value: Tensor) -> Optional[str]:
    """Why no fused kernel of an operator, by its name in the launch table, can run on such tensors; None if all can."""
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not covered; float32, bfloat16 and float16 are"
    for name, tensor in (("head_dim", query), ("value_dim", value)):
        if tensor.shape[-1] > LARGEST_HEAD_DIM:
            return f"{name} {tensor.shape[-1]} is above {LARGEST_HEAD_DIM}"
    refusal = _refuse_device(query)
    widest = max(query.shape[-1], value.shape[-1])
    if refusal is None and not covers(operator, query, padded_channels(widest)):
        return f"heads of {widest} channels in {query.dtype} take more registers or shared memory than this GPU has"
    return refusal


def _refuse_device(query: Tensor) -> Optional[str]:
    if query.device.type == "cpu" and interpreted():
        # The interpreter is for proofs: it takes milliseconds for what tiled does in microseconds.
        return None if selected_backend() == "fused" else "Triton's interpreter runs only where fused is forced"
    if query.device.type != "cuda":
        return f"query is on {query.device.type}; Triton kernels run on GPUs (on the CPU under TRITON_INTERPRET=1)"
    if architecture(query.device) is None:
        why = "; the kernels compile for ROCm but have never run there" if torch.version.hip else ""
        return f"the launch table has no entry for this GPU; it covers Ampere, Ada, Hopper and Blackwell{why}"
    return None


def adjacent_channels(tensor: Tensor) -> Tensor:
    """The tensor itself where the channels of a token lie next to each other, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_tokens(tensor: Tensor, axes: int, channels: bool = True) -> Tokens:
    """A tensor (batch, *spatial, heads, channels), or without channels, as kernels take it.

    Args:
        axes: spatial axes that kernels count; missing ones lead.
    """
    tensor = adjacent_channels(tensor) if channels else tensor
    vector = VECTOR_BYTES // tensor.element_size() if channels else 1
    sizes, strides = tensor.shape, tensor.stride()
    if channels:
        sizes, strides = sizes[:-1], strides[:-1]
    return Tokens(tensor, *_layout(sizes, strides, vector, axes))


@lru_cache(maxsize=2**14)  # a network asks for the same few in every step
def _layout(
    sizes: tuple[int, ...], strides: tuple[int, ...], vector: int, axes: int
) -> tuple[tuple[int, ...], tl.constexpr, tl.constexpr]:
    """Strides, ALIGN and WIDE of :class:`Tokens`; vector: the most elements that ALIGN may promise."""
    strides = [0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
    align = math.gcd(vector, *strides)
    reach = sum((size - 1) * stride for size, stride in zip(sizes[1:-1], strides[1:-1], strict=True))
    batch, *spatial, heads = (stride // align for stride in strides)
    missing = [0] * (axes - len(spatial))
    return (batch, *missing, *spatial, heads), tl.constexpr(align), tl.constexpr(reach >= 2**31)


def ceil_div(total: int, size: int) -> int:
    """Parts of a size that a total makes. Triton's function of that name takes microseconds."""
    return -(-total // size)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def padded_channels(head_dim: int) -> int:
    """A power of two, and no less than a tensor core takes."""
    return max(16, next_power_of_two(head_dim))


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: full, unless the user allows TF32 as for torch.matmul. Other dtypes have no choice."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


class Inputs(NamedTuple):
    """What kernels of every operator take; CHANNELS are head_dim and value_dim padded, see :func:`padded_channels`."""

    query: Tokens
    key: Tokens
    value: Tokens
    heads: int
    scale: float
    HEAD_DIM: int
    CHANNELS: int
    VALUE_DIM: int
    VALUE_CHANNELS: int
    PRECISION: str


class Outputs(NamedTuple):
    """What kernels of a forward write."""

    output: Tokens
    logsumexp: Tokens


class Gradients(NamedTuple):
    """What kernels of a backward read and write; delta is written by the first of them."""

    grad_output: Tokens
    output: Tokens
    logsumexp: Tokens
    delta: Tokens
    grad_query: Optional[Tokens]
    grad_key: Optional[Tokens]
    grad_value: Optional[Tokens]


class Call:
    """What the launches of one call share.

    Args:
        operator: its name in the launch table.
        axes: spatial axes that kernels count; missing ones lead, with a size of 1.
    """

    def __init__(
        self, operator: str, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float], axes: int = 2
    ) -> None:
        self.operator, self.query, self.axes = operator, query, axes
        self.batch, *spatial, self.heads, self.head_dim = query.shape
        self.value_dim = value.shape[-1]
        self.size = self.leading(spatial, 1)
        self.inputs = Inputs(
            query=self.tokens(query),
            key=self.tokens(key),
            value=self.tokens(value),
            heads=self.heads,
            scale=float(self.head_dim**-0.5 if scale is None else scale),
            HEAD_DIM=self.head_dim,
            CHANNELS=padded_channels(self.head_dim),
            VALUE_DIM=self.value_dim,
            VALUE_CHANNELS=padded_channels(self.value_dim),
            PRECISION=precision(query.dtype),
        )
        self.results: Union[Outputs, Gradients, None] = None

    def leading(self, values: Sequence, filling: Any) -> tuple:
        """The values of the spatial axes, with a filling for those that the map does not have."""
        return (filling,) * (self.axes - len(values)) + tuple(values)

    def tokens(self, tensor: Optional[Tensor], channels: bool = True) -> Optional[Tokens]:
        return None if tensor is None else as_tokens(tensor, self.axes, channels)

    def start_forward(self) -> tuple[Tensor, Tensor]:
        """Space for the output and the logsumexp."""
        shape = self.query.shape[:-1]
        output = self.query.new_empty((*shape, self.value_dim))
        logsumexp = self.query.new_empty(shape, dtype=torch.float32)
        self.results = Outputs(self.tokens(output), self.tokens(logsumexp, channels=False))
        return output, logsumexp

    def start_backward(
        self,
        grad_output: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        needs_gradient: Sequence[bool],
        into: Optional[Sequence[Tensor]] = None,
    ) -> list[Optional[Tensor]]:
        """Take what the kernels of the backward share; returns space for the gradients of query, key and value.

        Args:
            into: use these tensors for the gradients.
        """
        sources = [tokens.pointer for tokens in self.inputs[:3]]
        spaces = into or [
            source.new_empty(source.shape) if needed else None
            for source, needed in zip(sources, needs_gradient, strict=False)
        ]
        gradients = [space if needed else None for space, needed in zip(spaces, needs_gradient, strict=False)]
        self.results = Gradients(
            self.tokens(grad_output),
            self.tokens(output),
            self.tokens(logsumexp, channels=False),
            self.tokens(torch.empty_like(logsumexp), channels=False),
            *map(self.tokens, gradients),
        )
        return gradients

    def parameters(self, kernel: str) -> Parameters:
        widest = padded_channels(max(self.head_dim, self.value_dim))
        return launch_parameters(f"{self.operator}_{kernel}", self.query, widest)

    def submit(self, kernel: Any, programs: int, parameters: Parameters, *groups: NamedTuple, **arguments: Any) -> None:
        """Start a kernel with the arguments given.

        Args:
            groups: besides inputs and results; a kernel gets the fields that it takes, by their names.
        """
        known = {"BLOCK": parameters.block}
        for group in (self.inputs, self.results, *groups):
            known.update(group._asdict() if group is not None else {})
        taken = {name: known[name] for name in kernel.arg_names if name in known}
        submit(kernel, programs, parameters, **{**taken, **arguments})
