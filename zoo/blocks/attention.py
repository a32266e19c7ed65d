"""Attention of channels-last maps to neighborhoods, to windows and to the whole map, over :mod:`vicinal.kernels`."""

from typing import Final, Optional, Sequence, Tuple, Union

import torch
from timm.layers import Attention, register_notrace_function, resize_rel_pos_bias_table, trunc_normal_
from torch import Tensor, nn

from ...kernels.neighborhood import aggregate as neighborhood_aggregate
from ...kernels.neighborhood import neighborhood_attention_scores
from ...kernels.scripted import neighborhood_attention_packed, window_attention_packed
from ...kernels.window import aggregate as window_aggregate
from ...kernels.window import window_attention_scores
from .base import AttentionBase, aggregate_all, attend_with_bias, expand_table, positive_pair
from .padding import crop, pad_to_minimum, pad_to_multiple

# torch.fx takes what is behind the softmax of a module, where timm's AttentionExtract looks for it, and what is before
# it as one step each.
for function in (neighborhood_attention_scores, neighborhood_aggregate, window_attention_scores, window_aggregate):
    register_notrace_function(function)


class PackedAttention(AttentionBase):
    """Projections, position encoding, dropout and padding around attention; a subclass says which tokens see which.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        qkv_bias: whether the packed query, key and value projection has a bias.
        attn_drop: dropout on the attention weights, which takes the unfused path while training.
        proj_drop: dropout after the output projection.
        bias_size: size per axis of what a query's keys lie in: there is a learned relative position bias
            (heads, 2 * size - 1 per axis), at [key - query + size - 1]. None for none.
        local_encoding: add a depthwise 5 x 5 convolution of the "values" or of the "input" to the output of the
            attention (locally enhanced position encoding: CSWin, Dong et al., arXiv:2107.00652, section 3.3). None for
            none.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, or ``local_encoding`` is none of these.
    """

    encode_values: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias_size: Optional[Sequence[int]] = None,
        local_encoding: Optional[str] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_heads, attn_drop, dim=dim)
        if local_encoding not in (None, "values", "input"):
            raise ValueError(f'local_encoding={local_encoding!r} must be "values", "input" or None')
        dd = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.encode_values = local_encoding == "values"
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd) if local_encoding else None
        self.relative_position_bias: Optional[nn.Parameter] = None
        if bias_size is not None:
            table = (num_heads, *(2 * size - 1 for size in bias_size))
            self.relative_position_bias = nn.Parameter(torch.empty(table, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.relative_position_bias is not None:
            trunc_normal_(self.relative_position_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        padded = self.pad(x)
        packed = self.project(padded)
        if self.is_fused():
            attended = self.attend_packed(packed).flatten(3)
        else:
            query, key, value = packed.unbind(3)
            attended = self.attend_by_weights(query, key, value).flatten(3)
        if self.lepe is not None:
            source = packed.select(3, 2).flatten(3) if self.encode_values else padded
            attended = attended + self.lepe(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(crop(attended, x.shape[1], x.shape[2])))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values in one, (B, H, W, 3, heads, head_dim)."""
        return self.qkv(x).unflatten(-1, [3, self.num_heads, -1])

    def attend_packed(self, packed: Tensor) -> Tensor:
        """Attention output (B, H, W, heads, head_dim) of what ``project`` returns."""
        raise NotImplementedError

    @torch.jit.unused
    def attend_by_weights(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same of the parts, with the weights passing through ``attn_drop``, where hooks can read them."""
        return self.aggregate(self.attn_drop(self.weights(query, key)), value)

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, keys) of the queries of a map (B, H, W, dim), padding cropped."""
        query, key, _ = self.project(self.pad(x)).unbind(3)
        return crop(self.weights(query, key), x.shape[1], x.shape[2])

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, keys)."""
        raise NotImplementedError

    @torch.jit.unused
    def normalize(self, scores: Tensor) -> Tensor:
        """Softmax weights of scores (B, H, W, heads, keys)."""
        return scores.softmax(dim=-1)

    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of values by weights, of the shape of ``value``."""
        raise NotImplementedError


class NeighborhoodAttention(PackedAttention):
    """Each token attends to the nearest ``kernel_size`` tokens of its dilation group, with a relative position bias.

    A map smaller than ``kernel_size * dilation`` is zero-padded before the projection, as natten up to 0.15 did.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        kernel_size: neighbours per axis.
        dilation: step between neighbours per axis.
        relative_position_bias: learn a bias (heads, 2 * kernel_size - 1 per axis).
        **kwargs: see :class:`PackedAttention`.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``; ``kernel_size`` or ``dilation`` is not positive.

    Source:
        Hassani et al., arXiv:2204.07143, section 3.1; dilation: arXiv:2209.15001, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Union[int, Sequence[int]] = 7,
        dilation: Union[int, Sequence[int]] = 1,
        relative_position_bias: bool = True,
        **kwargs,
    ) -> None:
        sizes, steps = positive_pair("kernel_size", kernel_size), positive_pair("dilation", dilation)
        super().__init__(dim, num_heads, bias_size=sizes if relative_position_bias else None, **kwargs)
        self.kernel_size = sizes
        self.dilation = steps
        self.minimum = [size * step for size, step in zip(sizes, steps, strict=True)]

    def pad(self, x: Tensor) -> Tensor:
        return pad_to_minimum(x, self.minimum)

    def attend_packed(self, packed: Tensor) -> Tensor:
        return neighborhood_attention_packed(packed, self.kernel_size, self.dilation, self.relative_position_bias)

    @torch.jit.unused
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        scores = neighborhood_attention_scores(
            query, key, self.kernel_size, dilation=self.dilation, relative_position_bias=self.relative_position_bias
        )
        return self.normalize(scores)

    @torch.jit.unused
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        return neighborhood_aggregate(weights, value, self.kernel_size, dilation=self.dilation)


class GlobalAttention(PackedAttention):
    """Every token attends to every token: the neighborhood is the whole map.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        grid_size: height and width of the map that the relative position bias (heads, 2 * height - 1, 2 * width - 1) is
            for; it is resized to maps of another size. None for no bias.
        **kwargs: see :class:`PackedAttention`.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.

    Source:
        Vaswani et al., arXiv:1706.03762, section 3.2; the bias: Liu et al., arXiv:2103.14030, section 3.2.
    """

    def __init__(self, dim: int, num_heads: int, grid_size: Optional[Tuple[int, int]] = None, **kwargs) -> None:
        super().__init__(dim, num_heads, bias_size=grid_size, **kwargs)

    def attend_packed(self, packed: Tensor) -> Tensor:
        size = [packed.shape[1], packed.shape[2]]
        query, key, value = packed.unbind(3)
        bias = self.relative_position_bias
        if bias is not None:
            bias = expand_table(bias, size).to(query.dtype)[None]
        query, key, value = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
        x = attend_with_bias(query, key, value, bias, query.shape[3] ** -0.5)
        return x.transpose(1, 2).unflatten(1, size)

    @torch.jit.unused
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        size = [query.shape[1], query.shape[2]]
        query, key = (x.flatten(1, 2).transpose(1, 2).float() for x in (query, key))
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        if self.relative_position_bias is not None:
            scores = scores + expand_table(self.relative_position_bias, size)
        return self.normalize(scores.transpose(1, 2).unflatten(1, size))

    @torch.jit.unused
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        return aggregate_all(weights, value)


class WindowAttention(PackedAttention):
    """Attention inside non-overlapping windows; a map that does not divide is zero-padded before the projection.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size: height and width of a window.
        partition: "block" for contiguous windows, "grid" for strided ones (MaxViT).
        relative_position_bias: learn a bias (heads, 2 * window - 1 per axis).
        **kwargs: see :class:`PackedAttention`.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``; ``window_size`` is not positive.

    Source:
        Liu et al., arXiv:2103.14030, section 3.2 (windows that do not shift); Tu et al., arXiv:2204.01697, section 3.2
        (grid).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Union[int, Sequence[int]] = 7,
        partition: str = "block",
        relative_position_bias: bool = True,
        **kwargs,
    ) -> None:
        window = positive_pair("window_size", window_size)
        super().__init__(dim, num_heads, bias_size=window if relative_position_bias else None, **kwargs)
        self.window_size = window
        self.partition = partition

    @torch.jit.ignore
    def set_window_size(self, window_size: Union[int, Sequence[int]]) -> None:
        """Change the window; the bias table is resized to it."""
        self.window_size = positive_pair("window_size", window_size)
        table = self.relative_position_bias
        if table is not None:
            resized = self.resize_table(table.detach())
            self.relative_position_bias = nn.Parameter(resized, requires_grad=table.requires_grad)

    @torch.jit.ignore
    def resize_table(self, table: Tensor) -> Tensor:
        """A bias table of any window, interpolated to the window of this module."""
        shape = (self.num_heads, *(2 * size - 1 for size in self.window_size))
        if tuple(table.shape) == shape:
            return table
        return resize_rel_pos_bias_table(table, (self.window_size[0], self.window_size[1]), shape)

    def pad(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, self.window_size)

    def attend_packed(self, packed: Tensor) -> Tensor:
        return window_attention_packed(packed, self.window_size, self.partition, self.relative_position_bias)

    @torch.jit.unused
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        scores = window_attention_scores(
            query,
            key,
            self.window_size,
            partition=self.partition,
            relative_position_bias=self.relative_position_bias,
        )
        return self.normalize(scores)

    @torch.jit.unused
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        return window_aggregate(weights, value, self.window_size, partition=self.partition)


class PlainAttention(Attention):
    """timm's attention of tokens (B, N, dim), whose fused form has every derivative where its formula is asked for.

    Arguments are :class:`timm.layers.Attention`'s.
    """

    # timm's takes masks as well. TorchScript wants nothing behind the word below.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        packed = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim])
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn and not (self.training and self.attn_drop.p > 0.0):
            attended = attend_with_bias(query, key, value, None, self.scale)
        else:
            weights = (query * self.scale @ key.transpose(-2, -1)).softmax(dim=-1)
            attended = self.attn_drop(weights) @ value
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))
