"""What the Triton kernels of all operators share: masked loads and stores, softmax and its gradient, and who may run.

This module imports triton. Only the fused implementations import it, and they are imported when first needed.

Kernels handle tokens as "rows": the offset of a token's first channel in its tensor, in 64 bits, so that no size of map
or batch overflows. Outputs, gradients and statistics are contiguous; in them a row is the number of the
(token, head) pair, times head_dim where there are channels. Scores are held in base 2, as the hardware has exp2 only.

A kernel takes each strided tensor as :class:`Tokens`; an optional tensor, or a gradient that is not needed, is None.
"""

from typing import Any, NamedTuple, Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import selected_backend
from .launch import Parameters, architecture, launch_parameters, submit

LARGEST_HEAD_DIM = 160
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tokens(NamedTuple):
    """A tensor (batch, *spatial, heads, channels) as kernels take it: its channels are adjacent."""

    pointer: Tensor
    strides: tuple[int, ...]


@triton.jit
def load_tokens(pointer, rows, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """(tokens, CHANNELS): head_dim is padded with zeros to a power of two, and so are tokens that are not valid."""
    channel = tl.arange(0, CHANNELS)
    mask = valid[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(pointer + rows[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(pointer, rows, valid, tokens, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)
    mask = valid[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(pointer + rows[:, None] + channel[None, :], tokens.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def token_rows(position, head, strides):
    """Rows of tokens in a strided tensor; position and strides go through image and spatial axes."""
    offset = tl.cast(head, tl.int64) * strides[len(strides) - 1]
    for axis in tl.static_range(len(strides) - 1):
        offset += position[axis].to(tl.int64) * strides[axis]
    return offset


@triton.jit
def token_number(position, head, heads, size):
    """Of the (token, head) pair in a contiguous tensor; size is that of the spatial axes."""
    number = position[0].to(tl.int64)
    for axis in tl.static_range(len(size)):
        number = number * size[axis] + position[axis + 1]
    return number * heads + head


@triton.jit
def load_map(tokens, position, head, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """(tokens, CHANNELS) of one head of a :class:`Tokens`."""
    return load_tokens(tokens.pointer, token_rows(position, head, tokens.strides), valid, HEAD_DIM, CHANNELS)


@triton.jit
def load_maps(first, second, position, head, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """The same tokens of two tensors."""
    left = load_map(first, position, head, valid, HEAD_DIM, CHANNELS)
    return left, load_map(second, position, head, valid, HEAD_DIM, CHANNELS)


@triton.jit
def load_logsumexp(pointer, rows, valid):
    """In base 2; it is stored in base e."""
    return tl.load(pointer + rows, mask=valid, other=0.0) * LOG2_E


@triton.jit
def load_statistics(logsumexp, delta, number, valid):
    """Of queries: the logsumexp in base 2, and delta, the sum of output times gradient."""
    return load_logsumexp(logsumexp, number, valid), tl.load(delta + number, mask=valid, other=0.0)


@triton.jit
def store_delta(delta, output, grads, number, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum output times gradient of each query, for this kernel and for those that run after it."""
    outputs = load_tokens(output, number * HEAD_DIM, valid, HEAD_DIM, CHANNELS)
    deltas = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + number, deltas, mask=valid)
    return deltas


@triton.jit
def softmax_step(scores, largest, total):
    """One block of keys of an online softmax over rows.

    Args:
        scores: (queries, keys) in base 2, -inf where a key is not seen.
        largest, total: (queries,) of the blocks so far: the largest score, and the sum of the weights relative to it.

    Returns:
        weights of the block, both statistics with the block, and the factor that brings earlier sums up to date.
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
def attend(state, queries, keys, values, visible, bias, scale, PRECISION: tl.constexpr):
    """The state with one more block of keys."""
    largest, total, sums = state
    scores = masked_scores(queries, keys, visible, bias, scale, PRECISION)
    weights, largest, total, decay = softmax_step(scores, largest, total)
    return largest, total, sums * decay[:, None] + multiply(weights, values, PRECISION)


@triton.jit
def store_attention(state, output, logsumexp, number, valid, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Output and logsumexp of the queries, after the last block of keys."""
    largest, total, sums = state
    total = tl.where(valid, total, 1.0)
    store_tokens(output, number * HEAD_DIM, valid, sums / total[:, None], HEAD_DIM, CHANNELS)
    tl.store(logsumexp + number, (largest + tl.log2(total)) * LN_2, mask=valid)


@triton.jit
def masked_scores(left, right, visible, bias, scale, PRECISION: tl.constexpr):
    """Scores in base 2 of the tokens of `left` (rows) and `right` (columns), -inf where they do not see each other."""
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * LOG2_E) + bias
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def gradient_of_scores(scores, logsumexp, visible, grad_weights, delta):
    """Weights, and the gradient of the scores in base e. Statistics come with the axis of the keys put in."""
    weights = tl.where(visible, tl.exp2(scores - logsumexp), 0.0)
    return weights, weights * (grad_weights - delta)


@triton.jit
def gradient_of_pairs(left, right, of_left, of_right, statistics, visible, bias, scale, PRECISION: tl.constexpr):
    """Weights of pairs of tokens, and the gradient of their scores in base e.

    Args:
        left, of_left: of the tokens that are rows: queries and output gradients, or keys and values.
        right, of_right: of the tokens that are columns: the others.
        statistics: logsumexp and delta of the queries, with the axis of the keys put in.
    """
    scores = masked_scores(left, right, visible, bias, scale, PRECISION)
    of_weights = multiply(of_left, tl.trans(of_right), PRECISION)
    return gradient_of_scores(scores, statistics[0], visible, of_weights, statistics[1])


@triton.jit
def multiply(left, right, PRECISION: tl.constexpr):
    """Matrix product with float32 sums; the left factor is rounded to the dtype of the right one."""
    return tl.dot(left.to(right.dtype), right, input_precision=PRECISION)


def interpreted() -> bool:
    """Whether Triton was imported under TRITON_INTERPRET=1 and runs kernels on CPU tensors."""
    return not isinstance(load_tokens, triton.JITFunction)


def refuse_tensors(query: Tensor) -> Optional[str]:
    """Why no fused kernel can run on such tensors, None if one can."""
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not covered; float32, bfloat16 and float16 are"
    if query.shape[-1] > LARGEST_HEAD_DIM:
        return f"head_dim {query.shape[-1]} is above {LARGEST_HEAD_DIM}"
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


def padded_channels(head_dim: int) -> int:
    """A power of two, and no less than a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: full, unless the user allows TF32 as for torch.matmul. Other dtypes have no choice."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


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
        self.arguments = {
            "query": self.tokens(query),
            "key": self.tokens(key),
            "value": self.tokens(value),
            "heads": self.heads,
            "scale": float(self.head_dim**-0.5 if scale is None else scale),
            "HEAD_DIM": self.head_dim,
            "CHANNELS": padded_channels(self.head_dim),
            "VALUE_DIM": self.value_dim,
            "VALUE_CHANNELS": padded_channels(self.value_dim),
            "PRECISION": precision(query.dtype),
        }

    def leading(self, values: Sequence, filling: Any) -> tuple:
        """The values of the spatial axes, with a filling for those that the map does not have."""
        return (filling,) * (self.axes - len(values)) + tuple(values)

    def tokens(self, tensor: Tensor) -> Tokens:
        tensor = adjacent_channels(tensor)
        batch, *spatial, heads, _ = tensor.stride()
        return Tokens(tensor, (batch, *self.leading(spatial, 0), heads))

    def outputs(self) -> dict[str, Tensor]:
        """Space for the output and the logsumexp of the forward."""
        shape = self.query.shape[:-1]
        output = self.query.new_empty((*shape, self.value_dim))
        return {"output": output, "logsumexp": self.query.new_empty(shape, dtype=torch.float32)}

    def start_backward(
        self, grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: Sequence[bool]
    ) -> list[Optional[Tensor]]:
        """Take what the kernels of the backward share; returns space for the gradients of query, key and value."""
        self.arguments.update(
            grad_output=self.tokens(grad_output),
            output=output.contiguous(),
            logsumexp=logsumexp,
            delta=torch.empty_like(logsumexp),
        )
        names = ("grad_query", "grad_key", "grad_value")
        sources = (self.arguments[name].pointer for name in ("query", "key", "value"))
        gradients = [
            source.new_empty(source.shape) if needed else None
            for source, needed in zip(sources, needs_gradient[:3], strict=True)
        ]
        self.arguments.update(zip(names, gradients, strict=True))
        return gradients

    def parameters(self, kernel: str) -> Parameters:
        widest = padded_channels(max(self.head_dim, self.value_dim))
        return launch_parameters(f"{self.operator}_{kernel}", self.query, widest)

    def submit(self, kernel: Any, programs: int, parameters: Parameters, **arguments: Any) -> None:
        """Start a kernel; of the arguments that all kernels share it gets those that it takes."""
        shared = {name: value for name, value in self.arguments.items() if name in kernel.arg_names}
        submit(kernel, programs, parameters, **shared, BLOCK=parameters.block, **arguments)
