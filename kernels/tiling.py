"""What the tiled forms share: how many scores are held at once, their memory, the softmax and its gradient.

Nothing here waits for a device, and nothing but :class:`Buffer` and results as large as a row takes new memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


class Budget(NamedTuple):
    """Scores, or other numbers, that are held at once.

    Attributes:
        in_cache: on the CPU. The default is 2 MB in float32, so that the passes of the softmax stay in the second-level
            cache.
        on_device: elsewhere, where each piece of work costs kernel launches and only memory is a limit. The default is
            256 MB in float32.
    """

    in_cache: int = 1 << 19
    on_device: int = 1 << 26

    def of(self, device: torch.device) -> int:
        return self.in_cache if device.type == "cpu" else self.on_device


class Chunk(NamedTuple):
    """What is computed together: some images, and some rows of windows, blocks, tiles or regions of each."""

    images: slice
    rows: slice


def ranges(size: int, step: int) -> list[slice]:
    """0 to size in ranges of `step`, the last one shorter."""
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def chunk_ranges(images: int, rows: int, row_scores: int, budget: int) -> tuple[list[slice], list[slice]]:
    """Ranges of images and of rows whose products fit the budget: whole images while they do, else rows of one.

    Args:
        images: of the call.
        rows: of each image.
        row_scores: scores of one row of one image.
    """
    return (
        ranges(images, max(1, budget // (rows * row_scores))),
        ranges(rows, max(1, budget // row_scores)),
    )


def chunks(images: int, rows: int, row_scores: int, budget: int) -> Iterator[Chunk]:
    """All chunks, image by image; see :func:`chunk_ranges`."""
    of_images, of_rows = chunk_ranges(images, rows, row_scores, budget)
    return (Chunk(some_images, some_rows) for some_images in of_images for some_rows in of_rows)


def scale_of(scale: Optional[float], head_dim: int) -> float:
    """The scale of the scores, head_dim**-0.5 where none is given."""
    return head_dim**-0.5 if scale is None else scale


def exponentials(scores: Tensor, base_2: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What a softmax over the last axis is made of: the exponentials, in place, their sums, and the lse.

    To divide by the sums is left to the caller, who may do it after the product with the values, on fewer numbers.

    Args:
        scores: (..., queries, keys), overwritten.
        base_2: the scores are in base 2, and so is the lse. exp2 is several times faster than exp on the CPU, and on
            masked scores far more.

    Returns:
        (..., queries, keys), (..., queries, 1), (..., queries, 1). The largest exponential of a row is 1.
    """
    largest = scores.amax(-1, keepdim=True)
    scores.sub_(largest)
    weights = scores.exp2_() if base_2 else scores.exp_()
    total = weights.sum(-1, keepdim=True)
    logarithm = total.log2() if base_2 else total.log()
    return weights, total, logarithm.add_(largest)


def grad_scores_of(grad_weights: Tensor, weights: Tensor) -> Tensor:
    """weights * (grad_weights - sum(weights * grad_weights)), the gradient of the scores, in place of grad_weights."""
    products = grad_weights.mul_(weights)
    return products.addcmul_(weights, products.sum(-1, keepdim=True), value=-1)


class Buffer:
    """Memory that the pieces of a call use in turn: fresh memory costs a page fault for every 4 KB."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=dtype, device=device)

    def take(self, shape: Sequence[int]) -> Tensor:
        """Uninitialized; valid until the next call."""
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor in the dtype of the buffer."""
        return tensor if tensor.dtype == self.memory.dtype else self.take(tensor.shape).copy_(tensor)

    def product(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """scale * left @ right with one rounding."""
        result = self.take((left.shape[0], left.shape[1], right.shape[2]))
        if scale == 0.0:  # with both factors 0 torch leaves memory in bfloat16 as it is
            return torch.bmm(left, right, out=result).mul_(scale)
        return result.baddbmm_(left, right, beta=0, alpha=scale)
