"""Padding of maps as the official networks pad: zeros at the bottom and right, TensorFlow's SAME, repeated edges."""

from typing import List

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from .tracing import always, is_compiling, larger


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: List[int]) -> Tensor:
    """Pad a map (B, H, W, C) so that its height and width are multiples of ``multiple``."""
    height = (x.shape[1] + multiple[0] - 1) // multiple[0] * multiple[0]
    width = (x.shape[2] + multiple[1] - 1) // multiple[1] * multiple[1]
    return _pad(x, height, width)


@register_notrace_function
def pad_to_minimum(x: Tensor, minimum: List[int]) -> Tensor:
    """Pad a map (B, H, W, C) so that it is at least ``minimum`` high and wide."""
    return _pad(x, larger(minimum[0], x.shape[1]), larger(minimum[1], x.shape[2]))


@register_notrace_function
def pad_same(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Pad a map (B, C, H, W) as TensorFlow's SAME does for a kernel at least as large as its stride.

    The output of the strided kernel has ceil(size / stride) rows and columns; the odd pixel of padding comes last.
    """
    # sizes in the form of a convolution's, (size - 1) // stride + 1: torch.export can reason about those when nested
    height = (x.shape[2] - 1) // stride * stride + kernel_size - x.shape[2]
    width = (x.shape[3] - 1) // stride * stride + kernel_size - x.shape[3]
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


@register_notrace_function
def pad_by_edge(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of a map (B, C, H, W) up to multiples of ``multiple``."""
    height = (x.shape[2] - 1) // multiple * multiple + multiple - x.shape[2]
    width = (x.shape[3] - 1) // multiple * multiple + multiple - x.shape[3]
    if always(height == 0) and always(width == 0):
        return x
    return F.pad(x, [0, width, 0, height], mode="replicate")


@register_notrace_function
def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Take what was padded off again: the first rows and columns of (B, H, W, ...)."""
    if always(height == x.shape[1]) and always(width == x.shape[2]):
        return x
    if not is_compiling() or (always(height <= x.shape[1]) and always(width <= x.shape[2])):
        return x[:, :height, :width]
    # a slice would add guards on sizes that are symbols, an index none
    rows = torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


def _pad(x: Tensor, height: int, width: int) -> Tensor:
    if always(height == x.shape[1]) and always(width == x.shape[2]):
        return x  # a padding by zero would copy the map
    if is_compiling():
        # a padding that turns out to be by zero keeps the strides of the map, which traced graphs do not foresee
        x = x.contiguous()
    return F.pad(x, [0, 0, 0, width - x.shape[2], 0, height - x.shape[1]])
