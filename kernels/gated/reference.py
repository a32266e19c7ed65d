"""Gated positional attention in plain PyTorch: both softmaxes over all tokens, then their mixture."""

from typing import Optional

import torch
from torch import Tensor

from ..dispatch import statistics_dtype


def gated_positional_attention_weights(
    query: Tensor, key: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float] = None
) -> Tensor:
    """Mixed weights, (batch, *spatial, heads, tokens), in float32 (float64 stays).

    Arguments as in :func:`~vicinal.kernels.gated_positional_attention`.
    """
    dtype = statistics_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = (tokens.to(dtype).flatten(1, -3) for tokens in (query, key))
    content = (torch.einsum("bnhd,bmhd->bhnm", queries, keys) * scale).softmax(-1)
    position = position_scores.to(dtype).softmax(-1)
    share = gate.to(dtype).sigmoid()[:, None, None]
    weights = (1 - share) * content + share * position
    return weights.transpose(1, 2).unflatten(1, query.shape[1:-2])


def aggregate(weights: Tensor, value: Tensor) -> Tensor:
    """Sum of all values, weighted by `weights` of :func:`gated_positional_attention_weights`."""
    values = value.to(weights.dtype).flatten(1, -3)
    output = torch.einsum("bnhm,bmhd->bnhd", weights.flatten(1, -3), values)
    return output.unflatten(1, value.shape[1:-2]).to(value.dtype)


def gated_positional_attention(
    query: Tensor, key: Tensor, value: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float]
) -> Tensor:
    return aggregate(gated_positional_attention_weights(query, key, position_scores, gate, scale), value)
