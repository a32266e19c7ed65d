"""Halo attention as a module: blocks of queries, the tokens around each block as keys, relative positions per axis."""

from typing import Final, Optional, Tuple

import torch
from timm.layers import make_divisible, register_notrace_function, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.halo import aggregate, halo_attention_scores
from ...kernels.scripted import halo_attention
from .base import AttentionBase
from .padding import crop, pad_by_edge, pad_to_multiple
from .tracing import is_exporting

# torch.fx takes each as one step, with the softmax between them.
register_notrace_function(halo_attention_scores)
register_notrace_function(aggregate)


class RelativeTables(nn.Module):
    """Embeddings of the distances between a query and a key, (2 * window - 1, head_dim) for each axis."""

    def __init__(self, window_size: Tuple[int, int], head_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.height_rel = nn.Parameter(torch.empty(2 * window_size[0] - 1, head_dim, **dd))
        self.width_rel = nn.Parameter(torch.empty(2 * window_size[1] - 1, head_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.height_rel.shape[1] ** -0.5
        trunc_normal_(self.height_rel, std=std)
        trunc_normal_(self.width_rel, std=std)


class HaloAttention(AttentionBase):
    """Halo attention of a map (B, dim, H, W) of any size; parameters and numbers are those of timm's ``HaloAttn``.

    A map that blocks do not divide is padded with zeros at the bottom and right.

    Args:
        dim: channels of the input.
        dim_out: channels of the output, None for ``dim``.
        feat_size: size of the map, which timm's networks pass; not needed.
        stride: 1, or 2 to halve the map: by queries on every other row and column, or by pooling where ``block_size``
            is odd.
        num_heads: number of heads.
        dim_head: channels of a query and key head, None for ``qk_ratio``.
        block_size: tokens of a block per axis.
        halo_size: tokens around a block per axis and side.
        qk_ratio: channels of all queries as a share of the output's.
        mask_padding: cells outside the map get no weight. Otherwise they are zero keys that take part in the softmax.

    Shape:
        (B, dim, H, W) to (B, dim_out, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: ``dim_out`` is not a multiple of ``num_heads``; ``stride`` is neither 1 nor 2.

    Source:
        Vaswani et al., arXiv:2103.12731, section 2.2. The relative logits come from unscaled queries, and a query's
        row and column are counted within its block of queries, as in timm.
    """

    input_fmt = "NCHW"
    mask_padding: Final[bool]
    pooled: Final[bool]

    def __init__(
        self,
        dim: int,
        dim_out: Optional[int] = None,
        feat_size: Optional[Tuple[int, int]] = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: Optional[int] = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        mask_padding: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dim_out = dim_out or dim
        super().__init__(num_heads, dim_out=dim_out)
        dd = {"device": device, "dtype": dtype}
        if stride not in (1, 2):
            raise ValueError(f"stride={stride} must be 1 or 2")
        self.dim_out = dim_out
        self.head_dim = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.window_size = block_size + 2 * halo_size
        self.mask_padding = mask_padding
        self.stride = stride
        self.pooled = stride == 2 and block_size % 2 == 1
        self.query_stride = 1 if self.pooled else stride
        self.query_block = block_size // self.query_stride
        dim_qk = num_heads * self.head_dim
        self.q = nn.Conv2d(dim, dim_qk, 1, stride=self.query_stride, bias=False, **dd)
        self.kv = nn.Conv2d(dim, dim_qk + dim_out, 1, bias=False, **dd)
        self.pos_embed = RelativeTables((self.window_size, self.window_size), self.head_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=projection.in_channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        query, key, value, rows, columns = self.project(x)
        if self.is_fused():
            x = self.attend(query, key, value, rows, columns).flatten(3)
        else:
            x = self.attend_by_weights(query, key, value, rows, columns).flatten(3)
        x = self.crop_queries(x, height, width).permute(0, 3, 1, 2)
        return F.avg_pool2d(pad_by_edge(x, 2), 2) if self.pooled else x

    def project(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, W, heads, channels) of the padded map, and the relative logits per axis."""
        height, width = x.shape[2], x.shape[3]
        # the permuted view has channels-last strides, in which the heads lie as the operator takes them
        x = pad_to_multiple(x.permute(0, 2, 3, 1), [self.block_size, self.block_size]).permute(0, 3, 1, 2)
        query = self.q(x).permute(0, 2, 3, 1).unflatten(-1, [self.num_heads, self.head_dim])
        keys_and_values = self.kv(x).permute(0, 2, 3, 1).unflatten(-1, [self.num_heads, -1])
        key, value = keys_and_values[..., : self.head_dim], keys_and_values[..., self.head_dim :]
        rows, columns = relative_logits(
            query, self.pos_embed.height_rel, self.pos_embed.width_rel, self.query_block, self.window_size
        )
        if self.mask_padding:
            rows = rows + self.mask(query.shape[1], height, rows)[:, None, None, :]
            columns = columns + self.mask(query.shape[2], width, columns)[:, None, :]
        return query, key, value, rows, columns

    def crop_queries(self, x: Tensor, height: int, width: int) -> Tensor:
        """What is (B, H', W', ...) for the queries of the padded map, for those of a map of this height and width."""
        step = self.query_stride
        # in the form of a strided convolution's output, which torch.export knows to be equal to the shortcut's
        return crop(x, (height - 1) // step + 1, (width - 1) // step + 1)

    def mask(self, queries: int, size: int, like: Tensor) -> Tensor:
        """0 for cells inside the map and -inf outside, (queries of the axis, window)."""
        return _mask(queries, size, self.query_block, self.block_size, self.halo_size, like)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Attention output (B, H, W, heads, dim_out / heads)."""
        return halo_attention(query, key, value, self.block_size, self.halo_size, rows, columns)

    @torch.jit.unused
    def attend_by_weights(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The same, with the weights (B, H, W, heads, keys) passing through ``attn_drop``."""
        weights = halo_attention_scores(query, key, self.block_size, self.halo_size, rows, columns).softmax(dim=-1)
        return aggregate(self.attn_drop(weights), value, self.block_size, self.halo_size)

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H', W', heads, window ** 2) of the queries of a map (B, dim, H, W), padding cropped.

        Without ``mask_padding`` cells outside the map have weights too.
        """
        query, key, _, rows, columns = self.project(x)
        weights = halo_attention_scores(query, key, self.block_size, self.halo_size, rows, columns).softmax(dim=-1)
        return self.crop_queries(weights, x.shape[2], x.shape[3])

    @torch.jit.ignore
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of the values (B, H, W, heads, channels) of a map by weights, (B, H', W', heads, channels)."""
        height, width = value.shape[1:3]
        weights, value = pad_heads(weights, self.query_block), pad_heads(value, self.block_size)
        return self.crop_queries(aggregate(weights, value, self.block_size, self.halo_size), height, width)


def pad_heads(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, H, W, heads, channels) with zeros so that its height and width are multiples of ``multiple``."""
    return pad_to_multiple(x.flatten(3), [multiple, multiple]).unflatten(3, x.shape[3:])


def relative_logits(
    query: Tensor, height_rel: Tensor, width_rel: Tensor, query_block: int, window_size: int
) -> Tuple[Tensor, Tensor]:
    """Products of queries with the embeddings of each row and column of the window, (B, H, W, heads, window).

    Args:
        query: (B, H, W, heads, head_dim), unscaled.
        height_rel, width_rel: :class:`RelativeTables`.
        query_block: queries of a block per axis.
        window_size: tokens of a window per axis.
    """
    rows = height_rel[_offsets(query.shape[1], query_block, window_size, query)]  # (H, window, head_dim)
    columns = width_rel[_offsets(query.shape[2], query_block, window_size, query)]
    if is_exporting():
        # slower, with heads before the free axis: torch.export can split a constant off a product, not a symbol
        rows = torch.einsum("byxhd,ykd->byhxk", query, rows).transpose(2, 3).contiguous()
        columns = torch.einsum("byxhd,xkd->bxhyk", query, columns).permute(0, 3, 1, 2, 4).contiguous()
        return rows, columns
    return torch.einsum("byxhd,ykd->byxhk", query, rows), torch.einsum("byxhd,xkd->byxhk", query, columns)


@register_notrace_function
def _offsets(queries: int, query_block: int, window: int, like: Tensor) -> Tensor:
    """Entry of the table for each query of an axis and cell of its window, (queries, window)."""
    position = torch.arange(queries, device=like.device) % query_block
    return torch.arange(window, device=like.device) - position[:, None] + window - 1


@register_notrace_function
def _mask(queries: int, size: int, query_block: int, block: int, halo: int, like: Tensor) -> Tensor:
    position = torch.arange(queries, device=like.device) // query_block * block
    cell = position[:, None] + torch.arange(block + 2 * halo, device=like.device) - halo
    # the size as a tensor: ONNX has no comparison of tensors with symbolic sizes
    last = torch.arange(size, device=like.device)[-1:]
    outside = (cell < 0) | (cell > last)
    return torch.zeros(outside.shape, dtype=like.dtype, device=like.device).masked_fill(outside, float("-inf"))
