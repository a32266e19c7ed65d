"""Deformable convolution by its formula, for what torchvision's operator has not: a second derivative, forward mode and
``torch.func``."""

from typing import Optional, Tuple

import torch
from torch import Tensor


@torch.jit.unused  # a scripted program holds torchvision's operator
def deformable_convolution(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Optional[Tensor], stride: Tuple[int, int]
) -> Tensor:
    """:func:`torchvision.ops.deform_conv2d` without padding, dilation, groups and mask.

    Args:
        x: map (B, in_chans, H, W), of any floating dtype.
        offset: (B, 2 * taps, H', W'), how far (dy, dx) from its place each tap samples.
        weight: (out_chans, in_chans, rows, columns).
        bias: (out_chans,), or None.
        stride: of rows and columns.

    Returns:
        (B, out_chans, H', W').

    Source:
        Dai et al., arXiv:1703.06211, section 2.1; outside the map there are zeros.
    """
    rows, columns = weight.shape[2:]
    dy, dx = offset.unflatten(1, (rows * columns, 2)).unbind(2)  # (B, taps, H', W')
    tap, row, column = (torch.arange(size, device=x.device) for size in (rows * columns, *offset.shape[2:]))
    y = dy + ((tap // columns)[:, None, None] + stride[0] * row[:, None])
    x_ = dx + ((tap % columns)[:, None, None] + stride[1] * column)
    output = torch.einsum("bckyx,ock->boyx", sample(x, y, x_), weight.flatten(2))
    return output if bias is None else output + bias[:, None, None]


def sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values (B, channels, ...) of a map (B, channels, H, W), bilinear, at places (B, ...) in pixels, 0 outside."""
    top, left = y.floor(), x.floor()
    below, right = y - top, x - left
    output = _read(image, top, left) * ((1 - below) * (1 - right))[:, None]
    output = output + _read(image, top, left + 1) * ((1 - below) * right)[:, None]
    output = output + _read(image, top + 1, left) * (below * (1 - right))[:, None]
    return output + _read(image, top + 1, left + 1) * (below * right)[:, None]


def _read(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels (B, channels, ...) at whole numbers, 0 outside and where there is no number."""
    channels, height, width = image.shape[1:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = torch.where(inside, row, 0).long() * width + torch.where(inside, column, 0).long()
    pixels = image.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1))
    return pixels.unflatten(2, place.shape[1:]) * inside[:, None]
