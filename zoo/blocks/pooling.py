"""Adaptive average pooling of channels-last maps by any ratio, as matrix products where cells differ in size.

Unlike torch's own pooling this is exported with symbolic sizes, and its gradient has a fixed order of summation on
every device.
"""

from typing import Tuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from .tracing import always, larger


@register_notrace_function
def pooled_size(size: int, reduction: int) -> int:
    """Cells that an axis is pooled to, at least one."""
    return larger(1, size // reduction)


def cell_bounds(size: int, cells: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """First token of each cell of an axis, and the first token behind it, as torch's adaptive pooling has them."""
    cell = torch.arange(cells, device=device)
    return (cell * size).floor_divide(cells), ((cell + 1) * size + cells - 1).floor_divide(cells)


@register_notrace_function
def pool_average(x: Tensor, reduction: int) -> Tensor:
    """Average of the cells of a map (B, H, W, C), to (B, H // reduction, W // reduction, C)."""
    height, width = pooled_size(x.shape[1], reduction), pooled_size(x.shape[2], reduction)
    if always(x.shape[1] % height == 0) and always(x.shape[2] % width == 0):
        cells = x.unflatten(2, [width, x.shape[2] // width]).unflatten(1, [height, x.shape[1] // height])
        return cells.mean(dim=4).mean(dim=2)  # both axes at once take a CPU ten times as long
    rows, columns = _averages(x.shape[1], height, x), _averages(x.shape[2], width, x)
    # linear layers over the last axis: what other products decompose into compares sizes that may be symbols
    x = F.linear(x.permute(0, 2, 3, 1), rows)  # (B, W, C, rows)
    return F.linear(x.permute(0, 3, 2, 1), columns).transpose(2, 3)


def _averages(size: int, cells: int, like: Tensor) -> Tensor:
    """(cells, size): the weight of each token in the average of each cell."""
    first, behind = cell_bounds(size, cells, like.device)
    token = torch.arange(size, device=like.device)
    inside = (token >= first[:, None]) & (token < behind[:, None])
    return (inside / (behind - first)[:, None]).to(like.dtype)
