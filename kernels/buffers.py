"""Memory that the tiled forms use again and again."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
