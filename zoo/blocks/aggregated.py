"""TransNeXt's attention as modules: of neighbours and a pooled map at once, and of the whole map."""

import math
from typing import Any, Tuple

import torch
from timm.layers import LayerNorm, register_notrace_function, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.aggregated import aggregate, aggregated_attention_scores, aggregated_attention_weights
from ...kernels.scripted import aggregated_attention
from .activation import gelu
from .base import AttentionBase, aggregate_all, attend_with_bias
from .pooling import pool_average, pooled_size
from .position import ContinuousPositionBias
from .tracing import always

WINDOW = 3

register_notrace_function(aggregated_attention_scores)
register_notrace_function(aggregate)


class LengthScaledAttention(AttentionBase):
    """What both attentions of TransNeXt share: cosine attention whose scale grows with the number of keys.

    Args:
        dim: channels of the map, a multiple of ``num_heads``.
        num_heads: number of heads.
        position_bias: bias of the scores of global or pooled keys.
        attn_drop: dropout on the attention weights, which takes the unfused path while training.
        proj_drop: dropout after the output projection.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.

    Source:
        arXiv:2311.17132, sections 3.2 (query embedding) and 3.3 (length-scaled cosine attention).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        position_bias: ContinuousPositionBias,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_heads, attn_drop, dim=dim)
        dd = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.position_bias = position_bias
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        # softplus of this is 1 / 0.24
        nn.init.constant_(self.temperature, math.log(math.expm1(1 / 0.24)))
        trunc_normal_(self.query_embedding, std=0.02)

    def scale_query(self, query: Tensor, of_query: Tensor, length: Tensor) -> Tensor:
        """The query (B, H, W, heads, head_dim) normalised, with embedding and scale, in fewer passes than one by one.

        Args:
            of_query: its :func:`inverse_norm`.
            length: (H, W) or (1, 1).
        """
        scale = F.softplus(self.temperature[:, 0]) * length.to(of_query.dtype)[:, :, None, None]
        return query * (of_query * scale) + self.query_embedding[:, 0] * scale


class CosineAttention(LengthScaledAttention):
    """Every token attends to every token.

    Arguments and shapes are :class:`LengthScaledAttention`'s; the position bias is one with ``reduction`` 1.

    Source:
        arXiv:2311.17132, section 3.3.
    """

    def __init__(self, dim: int, num_heads: int, position_bias: ContinuousPositionBias, **kwargs) -> None:
        super().__init__(dim, num_heads, position_bias, **kwargs)
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, bias = self.project(x)
        if self.is_fused():
            attended = attend_with_bias(query, key, value, bias, 1.0)
        else:
            weights = (query @ key.transpose(-2, -1) + bias).softmax(dim=-1)
            attended = self.attn_drop(weights).to(value.dtype) @ value
        attended = attended.transpose(1, 2).unflatten(1, [x.shape[1], x.shape[2]])
        return self.proj_drop(self.proj(attended.flatten(3)))

    def project(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries, normalised keys and values (B, heads, tokens, head_dim), and the bias of the scores."""
        query, key, value = self.qkv(x).unflatten(-1, [3, self.num_heads, -1]).unbind(3)
        query = self.scale_query(query, inverse_norm(query), log_keys(x, 0, 1))
        bias = self.position_bias(x).to(query.dtype)[None]
        query, key, value = [t.flatten(1, 2).transpose(1, 2) for t in (query, F.normalize(key, dim=-1), value)]
        return query, key, value, bias

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, H * W) of the queries of a map (B, H, W, dim)."""
        query, key, _, bias = self.project(x)
        weights = (query @ key.transpose(-2, -1) + bias).softmax(dim=-1)
        return weights.transpose(1, 2).unflatten(1, x.shape[1:3])

    @torch.jit.ignore
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of values (B, H, W, heads, channels) by weights, of the shape of ``value``."""
        return aggregate_all(weights, value)


class AggregatedAttention(LengthScaledAttention):
    """Every token attends to its 3 x 3 neighbours and to all cells of a pooled map, in one softmax.

    Args:
        reduction: side of a pooled cell, also that of ``position_bias``.
        args, kwargs: see :class:`LengthScaledAttention`.

    Shape:
        (B, H, W, dim) to the same, at any height and width. There are (H // reduction) x (W // reduction) cells, one at
        least.

    Source:
        arXiv:2311.17132, sections 3.1 (pixel-focused attention) and 3.2 (learnable tokens beside the softmax).
    """

    def __init__(
        self, dim: int, num_heads: int, position_bias: ContinuousPositionBias, reduction: int, **kwargs
    ) -> None:
        super().__init__(dim, num_heads, position_bias, **kwargs)
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.window_size = WINDOW
        slots = WINDOW * WINDOW
        self.reduction = reduction
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.pool_proj = nn.Conv2d(dim, dim, 1, **dd)
        self.pool_norm = LayerNorm(dim, eps=1e-5, **dd)
        self.relative_position_bias = nn.Parameter(torch.empty(num_heads, slots, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, slots, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, slots, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        trunc_normal_(self.relative_position_bias, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x).unflatten(-1, [self.num_heads, -1])
        of_query = inverse_norm(query)
        key, value = self.keys_and_values(x)
        pooled_key, pooled_value = self.keys_and_values(self.pool(x))
        value_weights = self.match_tokens(query, of_query)
        query = self.scale_query(query, of_query, log_keys(x, self.window_size, self.reduction))
        pooled_bias = self.position_bias(x)
        if self.is_fused():
            bias = self.relative_position_bias
            x = aggregated_attention(
                query, key, value, pooled_key, pooled_value, self.window_size, bias, pooled_bias, value_weights
            )
        else:
            x = self.attend_by_weights(query, key, value, pooled_key, pooled_value, pooled_bias, value_weights)
        return self.proj_drop(self.proj(x.flatten(3)))

    def match_tokens(self, query: Tensor, of_query: Tensor) -> Tensor:
        """Products (B, H, W, heads, slots) of the normalised queries with the learnable tokens, and their bias.

        Args: of_query: the :func:`inverse_norm` of the queries as they come.
        """
        heads, _, slots = self.learnable_tokens.shape
        # One product with a block-diagonal matrix whose rows are whole vectors of 16 bytes: the gradient of 9 columns
        # for each head took a fifth of a GPU's time for a step of the network.
        own = torch.eye(heads, dtype=self.learnable_tokens.dtype, device=query.device)
        blocks = self.learnable_tokens[:, :, None] * own[:, None, :, None]
        padding = [0, (8 - heads * slots % 8) % 8]
        weight = F.pad(blocks.flatten(2).flatten(0, 1), padding)
        products = F.linear(query.flatten(3), weight.t())[..., : heads * slots]
        return products.unflatten(-1, [heads, slots]) * of_query + self.learnable_bias[:, 0]

    def keys_and_values(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Normalised keys, and values (B, H, W, heads, head_dim), of the map or of the pooled map."""
        key, value = self.kv(x).unflatten(-1, [2, self.num_heads, -1]).unbind(3)
        return F.normalize(key, dim=-1), value

    def pool(self, x: Tensor) -> Tensor:
        """Pooled map (B, H // reduction, W // reduction, dim)."""
        x = gelu(self.pool_proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.pool_norm(pool_average(x, self.reduction))

    @torch.jit.unused
    def attend_by_weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        pooled_bias: Tensor,
        value_weights: Tensor,
    ) -> Tensor:
        """The attention output, with the weights passing through ``attn_drop``, where hooks can read them."""
        bias = self.relative_position_bias
        scores = aggregated_attention_scores(query, key, pooled_key, self.window_size, bias, pooled_bias)
        return aggregate(self.attn_drop(scores.softmax(dim=-1)), value, pooled_value, self.window_size, value_weights)

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, neighbours + cells) of the queries of a map (B, H, W, dim).

        The learnable tokens, which are added to the weights of the neighbours behind the softmax, have no part in it.
        """
        query = self.q(x).unflatten(-1, [self.num_heads, -1])
        query = self.scale_query(query, inverse_norm(query), log_keys(x, self.window_size, self.reduction))
        key, pooled_key = self.keys_and_values(x)[0], self.keys_and_values(self.pool(x))[0]
        bias, pooled_bias = self.relative_position_bias, self.position_bias(x)
        return aggregated_attention_weights(query, key, pooled_key, self.window_size, bias, pooled_bias)

    @torch.jit.ignore
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of values (B, H, W, heads, channels) and of their averages in the cells, of the shape of ``value``."""
        pooled = pool_average(value.flatten(3), self.reduction).unflatten(3, value.shape[3:])
        return aggregate(weights, value, pooled, self.window_size)


def inverse_norm(x: Tensor) -> Tensor:
    """What normalises the vectors (..., dim) as a factor (..., 1), as F.normalize takes it."""
    return x.norm(p=2.0, dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()


@register_notrace_function
def log_keys(x: Tensor, window_size: int, reduction: int) -> Tensor:
    """Logarithm of the number of keys of each token of a map (B, H, W, C): neighbours inside the map and pooled cells.

    Returns:
        (H, W), or (1, 1) without neighbours.
    """
    height, width = x.shape[1], x.shape[2]
    pooled = pooled_size(height, reduction) * pooled_size(width, reduction)
    if window_size == 0:
        return (torch.zeros(1, 1, device=x.device) + pooled).log()
    down = _neighbours(height, window_size, x)
    across = down if always(height == width) else _neighbours(width, window_size, x)
    return (down[:, None] * across + pooled).log()


def _neighbours(size: int, window_size: int, like: Tensor) -> Tensor:
    """How many places of a window around each token of an axis lie inside the axis."""
    before = torch.arange(size, device=like.device).clamp(max=window_size // 2)
    return before + before.flip(0) + 1
