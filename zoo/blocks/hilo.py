"""HiLo attention as a module: some heads attend inside windows, the others to averages over the windows."""

from typing import Tuple

import torch
from torch import Tensor, nn

from .attention import WindowAttention
from .base import AttentionBase, aggregate_all, attend_with_bias, check_heads
from .padding import crop, pad_to_multiple


class Softmax(nn.Module):
    """Softmax over the last axis, for a module to have as ``attn``, where timm's ``AttentionExtract`` looks for it."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=-1)


class HighFrequencyAttention(WindowAttention):
    """Window attention of some of the heads: its queries, keys and values are narrower than the map.

    Args:
        dim: channels of the map.
        num_heads: heads that attend in windows.
        head_dim: channels of a head.
        window_size: height and width of a window.
        **kwargs: see :class:`PackedAttention`.

    Shape:
        (B, H, W, dim) to (B, H, W, num_heads * head_dim).
    """

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, window_size: int, device=None, dtype=None, **kwargs
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        width = num_heads * head_dim
        super().__init__(width, num_heads, window_size, relative_position_bias=False, **dd, **kwargs)
        self.qkv = nn.Linear(dim, 3 * width, **dd)
        self.attn = Softmax()

    @torch.jit.unused
    def normalize(self, scores: Tensor) -> Tensor:
        return self.attn(scores)


class LowFrequencyAttention(AttentionBase):
    """Attention of some of the heads from every position to averages over windows.

    Args:
        dim: channels of the map.
        num_heads: heads that attend so.
        head_dim: channels of a head.
        window_size: height and width of the windows that keys and values are averaged over; they divide the map.
        attn_drop: dropout on the attention weights.
        proj_drop: dropout after the output projection.

    Shape:
        (B, H, W, dim) to (B, H, W, num_heads * head_dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        window_size: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_heads, attn_drop)
        dd = {"device": device, "dtype": dtype}
        width = num_heads * head_dim
        self.scale = head_dim**-0.5
        self.pool = nn.AvgPool2d(window_size) if window_size > 1 else nn.Identity()
        self.q = nn.Linear(dim, width, **dd)
        self.kv = nn.Linear(dim, 2 * width, **dd)
        self.attn = Softmax()
        self.proj = nn.Linear(width, width, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        x = self.attend(query, key, value).transpose(1, 2).flatten(2).unflatten(1, [x.shape[1], x.shape[2]])
        return self.proj_drop(self.proj(x))

    def project(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, H * W, head_dim), and keys and values (B, heads, windows, head_dim)."""
        query = self.q(x.flatten(1, 2)).unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
        pooled = self.pool(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        packed = self.kv(pooled).unflatten(-1, [2, self.num_heads, -1])  # (B, windows, 2, heads, head_dim)
        key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of (B, heads, positions, head_dim) to (B, heads, windows, head_dim)."""
        if self.fused_attn and not self.drops_weights():
            return attend_with_bias(query, key, value, None, self.scale)
        return self.attn_drop(self.weights(query, key)) @ value

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax weights (B, heads, positions, windows)."""
        return self.attn(query * self.scale @ key.transpose(-2, -1))

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, windows) of the queries of a map (B, H, W, dim)."""
        query, key, _ = self.project(x)
        return self.weights(query, key).transpose(1, 2).unflatten(1, x.shape[1:3])

    @torch.jit.ignore
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of the averages over windows of values (B, H, W, heads, channels), of the shape of ``value``."""
        pooled = self.pool(value.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(3, value.shape[3:])
        return aggregate_all(weights, pooled)


class HiLoAttention(nn.Module):
    """Some heads attend inside windows, the others to the windows' averages; no position encoding in either.

    A map that does not divide into windows is zero-padded, and what is padded takes part in both, as in the official
    dense-task code.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: heads of both kinds.
        window_size: height and width of a window; with 1 every head is low-frequency, which is plain attention.
        alpha: share of the heads that attend to averages, rounded down.
        attn_drop: dropout on the attention weights.
        proj_drop: dropout after the output projections.

    Shape:
        (B, H, W, dim) to the same, at any height and width: high-frequency heads first.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``; ``alpha`` is no share.

    Source:
        arXiv:2205.13213, section 3.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, alpha: float, **kwargs) -> None:
        super().__init__()
        check_heads(num_heads, dim=dim)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha={alpha} must be a share of the heads, from 0 to 1")
        low_heads = int(num_heads * alpha) if window_size > 1 else num_heads
        high_heads, head_dim = num_heads - low_heads, dim // num_heads
        self.window_size = [window_size, window_size]
        self.high = HighFrequencyAttention(dim, high_heads, head_dim, window_size, **kwargs) if high_heads else None
        self.low = LowFrequencyAttention(dim, low_heads, head_dim, window_size, **kwargs) if low_heads else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = pad_to_multiple(x, self.window_size)
        parts = []
        if self.high is not None:
            parts.append(self.high(x))
        if self.low is not None:
            parts.append(self.low(x))
        return crop(torch.cat(parts, dim=-1), height, width)
