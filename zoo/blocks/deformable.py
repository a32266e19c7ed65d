"""Deformable convolution that reads no memory outside the map, whatever its offsets hold."""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torchvision import ops


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Tuple[int, int] = (1, 1),
    padding: Tuple[int, int] = (0, 0),
    dilation: Tuple[int, int] = (1, 1),
    mask: Optional[Tensor] = None,
) -> Tensor:
    """Deformable convolution (arXiv:1703.06211; with a mask, arXiv:1811.11168).

    torchvision turns the place of a sample into an address without asking whether it is a number, and a NaN ends the
    process. So an offset that is NaN or infinite is taken for zero, and every channel of the outputs that it serves is
    NaN. Finite offsets of any size keep their meaning: beyond the map there are zeros.

    Args:
        x: (B, in_chans, H, W), float32 or float64, as all tensors.
        offset: (B, 2 * offset_groups * kernel_height * kernel_width, H', W'), (dy, dx) of each tap in tokens.
        weight: (out_chans, in_chans / groups, kernel_height, kernel_width).
        bias: (out_chans,).
        stride, padding, dilation: down and across.
        mask: (B, offset_groups * kernel_height * kernel_width, H', W'), a factor of each sample.

    Returns:
        (B, out_chans, H', W').
    """
    # Not x - x or a comparison: the product is 0 or NaN, and so is what it adds to the gradient of the offset.
    lost = (offset * 0.0).sum(1, keepdim=True)  # (B, 1, H', W')
    offset = torch.where(torch.isfinite(offset), offset, 0.0)
    return ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask) + lost
