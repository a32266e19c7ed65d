"""Gated positional attention as a module: attention by content and by position, in shares that each head learns."""

from typing import List

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ...kernels.gated import aggregate, gated_positional_attention_scores, gated_positional_attention_weights
from ...kernels.scripted import gated_positional_attention
from .base import AttentionBase

register_notrace_function(gated_positional_attention_scores)
register_notrace_function(aggregate)


class PositionProjection(nn.Linear):
    """Linear map (rows, in_features) to (rows, out_features) in the dtype of its input, whatever that of its weights.

    Positions are at least in float32: bfloat16 has no squared distances beyond 256. One output's rows lie together.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.to(x.dtype) @ x.t() + self.bias.to(x.dtype)[:, None]).t()


class GatedPositionalAttention(AttentionBase):
    """Attention by content and by position, in shares that each head learns.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        locality_strength: how sharply a head attends to its own offset at first.
        attn_drop: dropout on the attention weights, which takes the unfused path while training.
        proj_drop: dropout after the output projection.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.

    Source:
        arXiv:2103.10697, section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        locality_strength: float = 1.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_heads, attn_drop, dim=dim)
        dd = {"device": device, "dtype": dtype}
        self.locality_strength = locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.v = nn.Linear(dim, dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.pos_proj = PositionProjection(3, num_heads, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads, **dd))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gating_param)

    @torch.no_grad()
    def initialize_locality(self) -> None:
        """Begin as a convolution: values pass unchanged, and each head of a square attends to one offset."""
        nn.init.eye_(self.v.weight)
        side = int(self.num_heads**0.5)
        offsets = torch.arange(side, device=self.v.weight.device) - ((side - 1) / 2 if side % 2 == 0 else side // 2)
        self.pos_proj.weight[: side**2, 0] = 2 * offsets.repeat_interleave(side)
        self.pos_proj.weight[: side**2, 1] = 2 * offsets.repeat(side)
        self.pos_proj.weight[: side**2, 2] = -1.0
        self.pos_proj.weight.mul_(self.locality_strength)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.qk(x).unflatten(-1, [2, self.num_heads, -1]).unbind(3)
        value = self.v(x).unflatten(-1, [self.num_heads, -1])
        scores = self.position_scores(x)
        if self.is_fused():
            x = gated_positional_attention(query, key, value, scores, self.gating_param)
        else:
            x = self.attend_by_weights(query, key, value, scores)
        return self.proj_drop(self.proj(x.flatten(3)))

    def position_scores(self, x: Tensor) -> Tensor:
        """Scores (heads, H * W, H * W) of every pair of positions of a map (B, H, W, dim), by their offset alone."""
        tokens = x.shape[1] * x.shape[2]
        exact = True
        if not torch.jit.is_scripting():
            # what stands in its place, a quantized layer or an adapter, reads the dtype that other layers read
            exact = isinstance(self.pos_proj, PositionProjection)
        return self.pos_proj(offsets_of(x, exact)).t().unflatten(1, [tokens, tokens]).contiguous()

    @torch.jit.unused
    def attend_by_weights(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        """The attention output, with the weights passing through ``attn_drop``, where hooks can read them."""
        weights = gated_positional_attention_scores(query, key, scores, self.gating_param).softmax(dim=-1)
        return aggregate(self.attn_drop(weights), value)

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Mixed weights (B, H, W, heads, H * W) of the queries of a map (B, H, W, dim)."""
        query, key = self.qk(x).unflatten(-1, [2, self.num_heads, -1]).unbind(3)
        return gated_positional_attention_weights(query, key, self.position_scores(x), self.gating_param)

    @torch.jit.ignore
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of values (B, H, W, heads, head_dim) by weights, of the shape of ``value``."""
        return aggregate(weights, value)


@register_notrace_function
def offsets_of(x: Tensor, exact: bool) -> Tensor:
    """:func:`position_offsets` of a map (B, H, W, dim) in its dtype, and if ``exact`` at least in float32."""
    dtype = torch.float32 if exact and x.dtype != torch.float64 else x.dtype
    return position_offsets([x.shape[1], x.shape[2]], x.device, dtype)


def position_offsets(size: List[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(dx, dy, dx^2 + dy^2) of the offset of each key from each query of a map, (H * W * H * W, 3)."""
    rows, columns = torch.arange(size[0], device=device), torch.arange(size[1], device=device)
    y = rows[:, None].expand(size[0], size[1]).flatten().to(dtype)
    x = columns.expand(size[0], size[1]).flatten().to(dtype)
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    offsets = torch.stack([dx, dy, dx.square() + dy.square()])  # (3, H * W, H * W)
    return offsets.flatten(1).t()
