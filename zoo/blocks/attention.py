"""Attention over local windows of channels-last maps, as modules over :mod:`vicinal.kernels`."""

from typing import Final, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import (
    Attention,
    register_notrace_function,
    resize_rel_pos_bias_table,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import neighborhood_attention_packed, window_attention_packed
from ...kernels.dispatch import needs_formula
from ...kernels.neighborhood import aggregate as neighborhood_aggregate
from ...kernels.neighborhood import neighborhood_attention_scores
from ...kernels.window import aggregate as window_aggregate
from ...kernels.window import window_attention_scores
from .padding import crop, pad_to_minimum, pad_to_multiple
from .sizes import always

# torch.fx takes what is behind the softmax of a module, where timm's AttentionExtract looks for it, and what is before
# it as one step each.
for function in (neighborhood_attention_scores, neighborhood_aggregate, window_attention_scores, window_aggregate):
    register_notrace_function(function)

FEW_SCORES = 1 << 16
"""Of a head, that are stored on a CPU: a map of 16 x 16 tokens."""


class LocalAttention(nn.Module):
    """Projections, dropout and padding around a local attention; a subclass says which tokens see which.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        qkv_bias: whether the packed query, key and value projection has a bias.
        attn_drop: dropout on the attention weights, which takes the unfused path while training.
        proj_drop: dropout after the output projection.

    Shape:
        (B, H, W, dim) to the same, at any height and width.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        padded = self.pad(x)
        packed = self.project(padded)
        dropping = self.training and self.attn_drop.p > 0.0
        if (self.fused_attn or becomes_program()) and not dropping:
            attended = self.attend_packed(packed)
        else:
            query, key, value = packed.unbind(3)
            attended = self.attend_by_weights(query, key, value)
        attended = self.enhance(attended.flatten(3), padded, packed.select(3, 2))
        return self.proj_drop(self.proj(crop(attended, x.shape[1], x.shape[2])))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values in one, (B, H, W, 3, heads, head_dim)."""
        return self.qkv(x).unflatten(-1, [3, self.num_heads, -1])

    @torch.jit.unused
    def attend_by_weights(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same as ``attend``, with the weights passing through ``attn_drop``, where hooks can read them."""
        return self.aggregate(self.attn_drop(self.weights(query, key)), value)

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, keys) of the queries of a map (B, H, W, dim), padding cropped."""
        query, key, _ = self.project(self.pad(x)).unbind(3)
        return crop(self.weights(query, key), x.shape[1], x.shape[2])

    def pad(self, x: Tensor) -> Tensor:
        """Bring a map to a size that the attention takes."""
        raise NotImplementedError

    def attend_packed(self, packed: Tensor) -> Tensor:
        """Attention output (B, H, W, heads, head_dim) of what ``project`` returns."""
        query, key, value = packed.unbind(3)
        return self.attend(query, key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output, of the shape of ``query``; not needed where ``attend_packed`` is."""
        raise NotImplementedError

    def enhance(self, attended: Tensor, x: Tensor, value: Tensor) -> Tensor:
        """The output (B, H, W, dim) with what a subclass adds to it of the padded map ``x`` or of the values."""
        return attended

    @torch.jit.unused
    def normalize(self, scores: Tensor) -> Tensor:
        """Softmax weights of scores (B, H, W, heads, keys)."""
        return scores.softmax(dim=-1)

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, keys)."""
        raise NotImplementedError

    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of values by weights, of the shape of ``value``."""
        raise NotImplementedError


class NeighborhoodAttention(LocalAttention):
    """Each token attends to the nearest ``kernel_size`` tokens of its dilation group, with a relative position bias.

    A map smaller than ``kernel_size * dilation`` is zero-padded before the projection, as natten up to 0.15 did.

    Args:
        kernel_size: neighbours per axis.
        dilation: step between neighbours per axis.
        relative_position_bias: learn a bias (heads, 2 * kernel_size - 1 per axis).
        **kwargs: see :class:`LocalAttention`.

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
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.kernel_size = positive_pair("kernel_size", kernel_size)
        self.dilation = positive_pair("dilation", dilation)
        self.minimum: List[int] = [k * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        self.relative_position_bias = None
        if relative_position_bias:
            table = (num_heads, *(2 * size - 1 for size in self.kernel_size))
            self.relative_position_bias = nn.Parameter(torch.empty(table, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.relative_position_bias is not None:
            trunc_normal_(self.relative_position_bias, std=0.02)

    def pad(self, x: Tensor) -> Tensor:
        return pad_to_minimum(x, self.minimum)

    def attend_packed(self, packed: Tensor) -> Tensor:
        bias = self.relative_position_bias
        if torch.jit.is_scripting():
            return torch.ops.vicinal.neighborhood_attention_packed(
                packed, self.kernel_size, [1], self.dilation, [False], bias, None
            )[0]
        return neighborhood_attention_packed(
            packed, self.kernel_size, dilation=self.dilation, relative_position_bias=bias
        )

    @torch.jit.unused
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        scores = neighborhood_attention_scores(
            query, key, self.kernel_size, dilation=self.dilation, relative_position_bias=self.relative_position_bias
        )
        return self.normalize(scores)

    @torch.jit.unused
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        return neighborhood_aggregate(weights, value, self.kernel_size, dilation=self.dilation)


class GlobalAttention(LocalAttention):
    """Every token attends to every token: the neighborhood is the whole map.

    Args:
        grid_size: height and width of the map that the relative position bias (heads, 2 * height - 1, 2 * width - 1) is
            for; it is resized to maps of another size. None for no bias.
        **kwargs: see :class:`LocalAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Optional[Tuple[int, int]] = None,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.relative_position_bias = None
        if grid_size is not None:
            table = (num_heads, *(2 * size - 1 for size in grid_size))
            self.relative_position_bias = nn.Parameter(torch.empty(table, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.relative_position_bias is not None:
            trunc_normal_(self.relative_position_bias, std=0.02)

    def pad(self, x: Tensor) -> Tensor:
        return x

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size = [query.shape[1], query.shape[2]]
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
        values = value.flatten(1, 2).to(weights.dtype)
        return torch.einsum("byxhn,bnhd->byxhd", weights, values).to(value.dtype)


class PlainAttention(Attention):
    """timm's attention of tokens (B, N, dim), whose fused form has every derivative where its formula is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim])
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn and not (self.training and self.attn_drop.p > 0.0):
            attended = attend_with_bias(query, key, value, None, self.scale)
        else:
            weights = (query * self.scale @ key.transpose(-2, -1)).softmax(dim=-1)
            attended = self.attn_drop(weights) @ value
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


class WindowAttention(LocalAttention):
    """Attention inside non-overlapping windows; a map that does not divide is zero-padded before the projection.

    Args:
        window_size: height and width of a window.
        partition: "block" for contiguous windows, "grid" for strided ones (MaxViT).
        relative_position_bias: learn a bias (heads, 2 * window - 1 per axis).
        **kwargs: see :class:`LocalAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Union[int, Sequence[int]] = 7,
        partition: str = "block",
        relative_position_bias: bool = True,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.window_size = positive_pair("window_size", window_size)
        self.partition = partition
        self.relative_position_bias = None
        if relative_position_bias:
            table = (num_heads, *(2 * size - 1 for size in self.window_size))
            self.relative_position_bias = nn.Parameter(torch.empty(table, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.relative_position_bias is not None:
            trunc_normal_(self.relative_position_bias, std=0.02)

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
        return resize_rel_pos_bias_table(table, tuple(self.window_size), shape)

    def pad(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, self.window_size)

    def attend_packed(self, packed: Tensor) -> Tensor:
        bias = self.relative_position_bias
        if torch.jit.is_scripting():
            return torch.ops.vicinal.window_attention_packed(packed, self.window_size, self.partition, [0], bias, None)[
                0
            ]
        return window_attention_packed(packed, self.window_size, partition=self.partition, relative_position_bias=bias)

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


def becomes_program() -> bool:
    """Whether a program is made of a module that keeps no hooks, so that nobody can ask for its attention weights."""
    exporting = True
    if not torch.jit.is_scripting():
        exporting = torch.compiler.is_exporting()
    return exporting


def positive_pair(name: str, value: Union[int, Sequence[int]]) -> List[int]:
    """One number for each of two axes, at least 1."""
    values = list(to_2tuple(value))
    if len(values) != 2 or min(values) < 1:
        raise ValueError(f"{name}={value} must be one positive number, or one for height and one for width")
    return values


@register_notrace_function
def expand_table(table: Tensor, size: List[int]) -> Tensor:
    """Bias (heads, H * W, H * W) of every pair of a map, from a relative table (heads, 2h - 1, 2w - 1).

    Entry (query, key) is the table at key - query; a table for maps of another size is resized bicubically.
    """
    height, width = size[0], size[1]
    # interpolation to the same size is the identity
    if not (always(table.shape[1] == 2 * height - 1) and always(table.shape[2] == 2 * width - 1)):
        table = F.interpolate(table[None], size=[2 * height - 1, 2 * width - 1], mode="bicubic", align_corners=False)[0]
    rows = torch.arange(height, device=table.device)
    columns = torch.arange(width, device=table.device)
    row_offsets = rows[None, :] - rows[:, None] + height - 1
    column_offsets = columns[None, :] - columns[:, None] + width - 1
    bias = table[:, row_offsets[:, None, :, None], column_offsets[None, :, None, :]]
    return bias.flatten(3, 4).flatten(1, 2)


@register_notrace_function
def attend_with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Optional[Tensor], scale: float) -> Tensor:
    """Attention of (B, heads, tokens, head_dim) to (B, heads, keys, head_dim); bias: (1 or B, heads, tokens, keys).

    A CPU computes few scores faster by two products than by torch's kernel.
    """
    explicit = False
    if not torch.jit.is_scripting():
        # the decomposition of scaled_dot_product_attention for ONNX has other strides than the operator
        explicit = torch.onnx.is_in_onnx_export()
        explicit = explicit or needs_formula(query, key, value, bias)
        if not torch.compiler.is_compiling():
            # for an empty batch it leaves the bias without a gradient
            explicit = explicit or query.shape[0] == 0 or _has_few_scores(query, key)
    if explicit:
        scores = query * scale @ key.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        return scores.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


@torch.jit.unused
def _has_few_scores(query: Tensor, key: Tensor) -> bool:
    # rounded weights would be less accurate than the kernel's: float32 only
    is_few = query.shape[2] * key.shape[2] <= FEW_SCORES
    return is_few and query.device.type == "cpu" and query.dtype == torch.float32
