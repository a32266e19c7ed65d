"""Bottleneck attention as a module: every token of a map to every token, with relative positions per axis."""

from typing import Callable, Final, Optional, Tuple

import torch
from timm.layers import make_divisible, register_notrace_function, trunc_normal_
from timm.layers.lambda_layer import LambdaLayer
from torch import Tensor, nn
from torch.nn import functional as F

from .base import AttentionBase, aggregate_all, attend_with_bias
from .halo import RelativeTables
from .padding import pad_by_edge
from .tracing import always


class BottleneckAttention(AttentionBase):
    """Attention of a map (B, dim, H, W) of any size; parameters and numbers are those of timm's ``BottleneckAttn``.

    Args:
        dim: channels of the input.
        dim_out: channels of the output, None for ``dim``.
        feat_size: height and width of the map that the position tables are for; maps of another size resize them.
        stride: 1, or 2 to halve the map by pooling behind the attention.
        num_heads: number of heads.
        dim_head: channels of a query and key head, None for ``qk_ratio``.
        qk_ratio: channels of all queries as a share of the output's.

    Shape:
        (B, dim, H, W) to (B, dim_out, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: ``dim_out`` is not a multiple of ``num_heads``; ``stride`` or ``feat_size`` is none of the above.

    Source:
        Srinivas et al., arXiv:2101.11605, section 3. The relative logits come from unscaled queries, as in timm.
    """

    input_fmt = "NCHW"
    pooled: Final[bool]

    def __init__(
        self,
        dim: int,
        dim_out: Optional[int] = None,
        feat_size: Tuple[int, int] = (8, 8),
        stride: int = 1,
        num_heads: int = 4,
        dim_head: Optional[int] = None,
        qk_ratio: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        dim_out = dim_out or dim
        super().__init__(num_heads, dim_out=dim_out)
        dd = {"device": device, "dtype": dtype}
        if stride not in (1, 2):
            raise ValueError(f"stride={stride} must be 1 or 2")
        if min(feat_size) < 1:
            raise ValueError(f"feat_size={tuple(feat_size)} must be at least 1 x 1; use a larger img_size")
        self.dim_out = dim_out
        self.head_dim = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.pooled = stride == 2
        self.qkv = nn.Conv2d(dim, 2 * num_heads * self.head_dim + dim_out, 1, bias=False, **dd)
        self.pos_embed = RelativeTables(feat_size, self.head_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        query, key, value = self.project(x)
        x = self.attend(query, key, value, self.relative_logits(query, height, width))
        x = x.transpose(2, 3).flatten(1, 2).unflatten(2, [height, width])
        return F.avg_pool2d(pad_by_edge(x, 2), 2) if self.pooled else x

    def project(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, H * W, channels of a head)."""
        width_qk = self.num_heads * self.head_dim
        query, key, value = self.qkv(x).flatten(2).split([width_qk, width_qk, self.dim_out], dim=1)
        return self.to_heads(query), self.to_heads(key), self.to_heads(value)

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, channels, tokens) to (B, heads, tokens, channels of a head)."""
        return x.unflatten(1, [self.num_heads, -1]).transpose(2, 3)

    def relative_logits(self, query: Tensor, height: int, width: int) -> Tensor:
        """What positions add to the scores of queries (B, heads, H * W, head_dim), (B, heads, H * W, H * W)."""
        rows = query @ resize_relative_table(self.pos_embed.height_rel, height).t()
        columns = query @ resize_relative_table(self.pos_embed.width_rel, width).t()
        row_index, column_index = _table_index(height, width, query)
        rows = rows.gather(3, row_index.expand(query.shape[0], self.num_heads, -1, -1))
        columns = columns.gather(3, column_index.expand(query.shape[0], self.num_heads, -1, -1))
        return (rows[..., :, None] + columns[..., None, :]).flatten(3)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Attention output (B, heads, H * W, dim_out / heads)."""
        if self.fused_attn and not self.drops_weights():
            return attend_with_bias(query, key, value, bias, self.head_dim**-0.5)
        return self.attn_drop(self.weights(query, key, bias)) @ value

    def weights(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """Softmax weights (B, heads, H * W, H * W)."""
        return (query @ key.transpose(2, 3) * self.head_dim**-0.5 + bias).softmax(dim=-1)

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, H * W) of the queries of a map (B, dim, H, W), before any pooling."""
        query, key, _ = self.project(x)
        weights = self.weights(query, key, self.relative_logits(query, x.shape[2], x.shape[3]))
        return weights.transpose(1, 2).unflatten(1, x.shape[2:])

    @torch.jit.ignore
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of values (B, H, W, heads, channels) by weights, of the shape of ``value``."""
        return aggregate_all(weights, value)


class LambdaAttention(LambdaLayer):
    """timm's lambda layer, whose gradients are numbers in bfloat16 too.

    Arguments are :class:`timm.layers.LambdaLayer`'s.

    Shape:
        (B, dim, H, W) to (B, dim_out, H // stride, W // stride): any size with ``r``, else that of ``feat_size``.

    Source:
        Bello, arXiv:2102.08602, section 3.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.conv_lambda.__class__ = PositionConv


class PositionConv(nn.Conv3d):
    """Convolution (r, r, 1) of (B, 1, H, W, channels) as one of maps.

    torch 2.14 gives its weights a gradient of nan in bfloat16 on CPUs, on maps of 4 x 4 for instance.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[0], x.shape[4]
        padding = [self.padding[0], self.padding[1]]
        maps, weight = x.permute(0, 4, 1, 2, 3).flatten(0, 1), self.weight.squeeze(4)
        # a convolution's padding may be a word, this one's is not
        x = F.conv2d(maps, weight, self.bias, padding=padding)  # type: ignore[arg-type]
        return x.unflatten(0, [batch, channels]).permute(0, 2, 3, 4, 1)

    @torch.jit.ignore
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # as the weight of the convolution that it is: torch.channels_last is a layout of four axes
        # not super(): TorchScript binds the method to a module of a class of its own
        return nn.Module._apply(self, lambda x: fn(x.squeeze(4)).unsqueeze(4) if x.ndim == 5 else fn(x), recurse)


@register_notrace_function
def resize_relative_table(table: Tensor, size: int) -> Tensor:
    """Embeddings (2 * n - 1, channels) of distances, interpolated to those of an axis of another size."""
    if always(table.shape[0] == 2 * size - 1):
        return table  # interpolation to the same size is the identity
    resized = F.interpolate(table.t()[None, :, :, None], size=[2 * size - 1, 1], mode="bicubic", align_corners=False)
    return resized[0, :, :, 0].t()


@register_notrace_function
def _table_index(height: int, width: int, like: Tensor) -> Tuple[Tensor, Tensor]:
    """Entries of the tables for each token, row by row, and each row or column of keys, (H * W, H) and (H * W, W)."""
    rows, columns = torch.arange(height, device=like.device), torch.arange(width, device=like.device)
    of_rows = (rows - rows[:, None] + height - 1)[:, None].expand(-1, width, -1)
    of_columns = (columns - columns[:, None] + width - 1).expand(height, -1, -1)
    return of_rows.flatten(0, 1), of_columns.flatten(0, 1)
