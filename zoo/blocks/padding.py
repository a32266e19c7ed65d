"""Zero padding of channels-last maps at the bottom and right, as the official networks pad."""

from typing import List

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: List[int]) -> Tensor:
    """Pad a map (B, H, W, C) so that its height and width are multiples of ``multiple``."""
    height = (x.shape[1] + multiple[0] - 1) // multiple[0] * multiple[0]
    width = (x.shape[2] + multiple[1] - 1) // multiple[1] * multiple[1]
    return _pad(x, height, width)


@register_notrace_function
def pad_to_minimum(x: Tensor, minimum: List[int]) -> Tensor:
    """Pad a map (B, H, W, C) so that it is at least ``minimum`` high and wide."""
    if torch.jit.is_scripting():
        return _pad(x, max(minimum[0], x.shape[1]), max(minimum[1], x.shape[2]))
    return _pad(x, torch.sym_max(minimum[0], x.shape[1]), torch.sym_max(minimum[1], x.shape[2]))


@register_notrace_function
def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Take what was padded off again: the first rows and columns of (B, H, W, ...)."""
    tracing = False
    if not torch.jit.is_scripting():
        tracing = torch.compiler.is_compiling()
    if not tracing and x.shape[1] == height and x.shape[2] == width:
        return x
    if not tracing:
        return x[:, :height, :width]
    # a slice would add guards on the sizes, an index none
    rows = torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


def _pad(x: Tensor, height: int, width: int) -> Tensor:
    tracing = False
    if not torch.jit.is_scripting():
        tracing = torch.compiler.is_compiling()
    # a padding by zero would copy the map; while tracing the sizes are symbols and may not be compared
    if not tracing and x.shape[1] == height and x.shape[2] == width:
        return x
    return F.pad(x, [0, 0, 0, width - x.shape[2], 0, height - x.shape[1]])
