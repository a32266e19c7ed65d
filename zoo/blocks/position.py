"""Where tokens are: position encodings by depthwise convolution, and position bias from coordinates."""

from typing import Final, Tuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from .pooling import cell_bounds, pooled_size
from .tracing import always, is_compiling


class ConvPositionEncoding(nn.Module):
    """Adds a depthwise convolution of a channels-last map to it, which tells tokens where they are.

    Args:
        dim: channels.
        kernel_size: of the convolution, odd.

    Shape:
        (B, H, W, dim) to the same.

    Source: conditional position encodings (Chu et al., arXiv:2102.10882), as DaViT and BiFormer place them.
    """

    def __init__(self, dim: int, kernel_size: int = 3, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class ContinuousPositionBias(nn.Module):
    """Bias of attention scores from a small network on log-spaced coordinates, for maps of any size.

    Keys lie at the centres of the cells that a map is pooled to. Their distances, in units of the map in training, are
    spaced logarithmically, so that a larger map asks for little more than what was learned.

    Args:
        num_heads: number of heads.
        reduction: side of a pooled cell; 1 for a bias between all pairs of tokens.
        pretrain_size: side of the map in training.
        interpolated: compute the bias for the map of training and resize it bilinearly to other maps.
        hidden_dim: width of the network.

    Shape:
        A map (B, H, W, C), of which size and dtype count, to (heads, H * W, pooled H * pooled W) in its dtype.

    Source:
        Liu et al., Swin Transformer V2 (arXiv:2111.09883), section 3.3, between tokens; Shi, TransNeXt
        (arXiv:2311.17132), section 3.3, with pooled keys.
    """

    interpolated: Final[bool]

    def __init__(
        self,
        num_heads: int,
        reduction: int,
        pretrain_size: int,
        interpolated: bool = False,
        hidden_dim: int = 512,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.pretrain_size = pretrain_size
        self.interpolated = interpolated
        self.fc1 = nn.Linear(2, hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, num_heads, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Bias (heads, H * W, pooled H * pooled W) of the tokens of a map (B, H, W, C), in its dtype."""
        height, width = x.shape[1], x.shape[2]
        if not self.interpolated:
            return self.evaluate(height, width, x).flatten(3).flatten(1, 2)
        bias = self.evaluate(self.pretrain_size, self.pretrain_size, x)
        size = [height, width]
        pooled = [pooled_size(height, self.reduction), pooled_size(width, self.reduction)]
        bias = F.interpolate(bias.flatten(1, 2), size=pooled, mode="bilinear", align_corners=False)
        bias = bias.flatten(2).transpose(1, 2).unflatten(2, [self.pretrain_size, self.pretrain_size])
        bias = F.interpolate(bias, size=size, mode="bilinear", align_corners=False)
        return bias.flatten(2).transpose(1, 2)

    def evaluate(self, height: int, width: int, like: Tensor) -> Tensor:
        """Bias (heads, height, width, pooled height, pooled width), computed once for each distance that occurs."""
        rows, columns = pooled_size(height, self.reduction), pooled_size(width, self.reduction)
        row_offsets, row_index = _axis_offsets(height, rows, like.device)
        down = self._log_spaced(row_offsets)
        column_offsets, column_index, across = row_offsets, row_index, down
        if not always(height == width):
            column_offsets, column_index = _axis_offsets(width, columns, like.device)
            across = self._log_spaced(column_offsets)
        table = torch.stack(torch.meshgrid([down, across], indexing="ij"), dim=-1).to(like.dtype)
        bias = self.fc2(F.relu(self.fc1(table)))  # (row offsets, column offsets, heads)
        index = row_index[:, None, :, None] * column_offsets.shape[0] + column_index[:, None, :]
        return F.embedding(index, bias.flatten(0, 1)).permute(4, 0, 1, 2, 3).contiguous()

    def _log_spaced(self, offsets: Tensor) -> Tensor:
        """Sign and log2(1 + distance) / log2(8), where the map in training spans a distance of 8."""
        scaled = offsets * (8.0 / max(1, self.pretrain_size - 1))
        return scaled.sign() * (scaled.abs() + 1).log2() / 3


def _axis_offsets(size: int, cells: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Distances of one axis, query minus centre of a cell: those that occur, and the place of each pair among them.

    Returns:
        Distances in tokens, and places (size, cells).
    """
    # Centres lie on tokens or halfway between them, in cells of one size all on the one or all on the other.
    # Of sizes that are symbols all distances are taken that a map can have.
    if always(size % cells == 0):
        step, side = 2, size // cells
        farthest = 2 * size - 1 - side
        doubled_centres = 2 * side * torch.arange(cells, device=device) + side - 1
    else:
        step = 1
        farthest = 2 * size - 2 if is_compiling() else 2 * size - 1 - (size + cells - 1) // cells
        first, behind = cell_bounds(size, cells, device)
        doubled_centres = first + behind - 1
    doubled = 2 * torch.arange(size, device=device)[:, None] - doubled_centres
    distances = torch.arange(-farthest, farthest + 1, step, device=device) / 2
    return distances, (doubled + farthest).floor_divide(step)
