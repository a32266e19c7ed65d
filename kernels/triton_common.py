"""What the Triton kernels of all operators share: masked loads and stores, softmax and its gradient, and who may run.

This module imports triton. Only the fused implementations import it, and they are imported when first needed.

Kernels handle tokens as "rows": the offset of a token's first channel in its tensor, in 64 bits, so that no size of map
or batch overflows. Outputs, gradients and statistics are contiguous; in them a row is the number of the
(token, head) pair, times head_dim where there are channels. Scores are held in base 2, as the hardware has exp2 only.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import selected_backend
from .launch import architecture

LARGEST_HEAD_DIM = 160
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


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
def load_logsumexp(pointer, rows, valid):
    """In base 2; it is stored in base e."""
    return tl.load(pointer + rows, mask=valid, other=0.0) * LOG2_E


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
        return "the launch table has no entry for this GPU; it covers Ampere, Ada, Hopper and Blackwell"
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
