"""Aggregated attention in plain PyTorch: the neighbours of every token are stacked, then attended to."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import accumulation_dtype


def aggregated_attention_scores(
    query: Tensor,
    key: Tensor,
    pooled_key: Tensor,
    window_size: int = 3,
    local_bias: Optional[Tensor] = None,
    pooled_bias: Optional[Tensor] = None,
    scale: Optional[float] = 1.0,
) -> Tensor:
    """Scores, (batch, height, width, heads, window_size**2 + pooled), in float32 (float64 stays).

    Neighbours come first, row by row, those outside the map with -inf; then the pooled tokens. Arguments as in
    :func:`~vicinal.kernels.aggregated_attention`.
    """
    dtype = accumulation_dtype(query.dtype)
    queries = query.to(dtype) * (query.shape[-1] ** -0.5 if scale is None else scale)
    local = torch.einsum("byxhd,byxhkd->byxhk", queries, _neighbours(key.to(dtype), window_size))
    if local_bias is not None:
        local = local + local_bias.to(dtype)
    outside = ~inside_map(query.shape[1], query.shape[2], window_size, query.device)
    local = local.masked_fill(outside[:, :, None], float("-inf"))
    pooled = torch.einsum("byxhd,bphd->byxhp", queries, pooled_key.to(dtype).flatten(1, -3))
    if pooled_bias is not None:
        pooled = pooled + _bias_by_token(pooled_bias.to(dtype), pooled)
    return torch.cat([local, pooled], -1)


def aggregated_attention_weights(
    query: Tensor,
    key: Tensor,
    pooled_key: Tensor,
    window_size: int = 3,
    local_bias: Optional[Tensor] = None,
    pooled_bias: Optional[Tensor] = None,
    scale: Optional[float] = 1.0,
) -> Tensor:
    """Softmax over neighbours and pooled tokens of :func:`aggregated_attention_scores`, of the same arguments."""
    return aggregated_attention_scores(query, key, pooled_key, window_size, local_bias, pooled_bias, scale).softmax(-1)


def aggregate(
    weights: Tensor,
    value: Tensor,
    pooled_value: Tensor,
    window_size: int = 3,
    value_weights: Optional[Tensor] = None,
) -> Tensor:
    """Sum of the values of neighbours and pooled tokens by `weights` of :func:`aggregated_attention_weights`."""
    local, pooled = weights[..., : window_size**2], weights[..., window_size**2 :]
    if value_weights is not None:
        local = local + value_weights.to(weights.dtype)
    values = _neighbours(value.to(weights.dtype), window_size)
    output = torch.einsum("byxhk,byxhkd->byxhd", local, values)
    output = output + torch.einsum("byxhp,bphd->byxhd", pooled, pooled_value.to(weights.dtype).flatten(1, -3))
    return output.to(value.dtype)


def aggregated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: int,
    local_bias: Optional[Tensor],
    pooled_bias: Optional[Tensor],
    value_weights: Optional[Tensor],
    scale: Optional[float],
) -> Tensor:
    weights = aggregated_attention_weights(query, key, pooled_key, window_size, local_bias, pooled_bias, scale)
    return aggregate(weights, value, pooled_value, window_size, value_weights)


def inside_map(height: int, width: int, window_size: int, device: torch.device) -> Tensor:
    """Which neighbours of each token are tokens of the map, (height, width, window_size**2)."""
    rows, columns = (_inside_axis(size, window_size, device) for size in (height, width))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)


def _inside_axis(size: int, window_size: int, device: torch.device) -> Tensor:
    positions = torch.arange(size, device=device)[:, None] + torch.arange(window_size, device=device)
    positions = positions - window_size // 2
    return (positions >= 0) & (positions < size)


def _neighbours(tokens: Tensor, window_size: int) -> Tensor:
    """(batch, height, width, heads, window_size**2, channels), zero outside the map."""
    height, width = tokens.shape[1:3]
    radius = window_size // 2
    padded = F.pad(tokens, (0, 0, 0, 0, radius, radius, radius, radius))
    shifts = [(row, column) for row in range(window_size) for column in range(window_size)]
    return torch.stack([padded[:, row : row + height, column : column + width] for row, column in shifts], 4)


def _bias_by_token(bias: Tensor, scores: Tensor) -> Tensor:
    """(height, width, heads, pooled) from the pooled bias; `scores` gives the size."""
    _, height, width, heads, pooled = scores.shape
    return bias.expand(heads, height * width, pooled).reshape(heads, height, width, pooled).permute(1, 2, 0, 3)
