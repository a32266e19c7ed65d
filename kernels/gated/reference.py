"""Gated positional attention in plain PyTorch: both softmaxes over all tokens, then their mixture."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import accumulation_dtype


def gated_positional_attention_scores(
    query: Tensor, key: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float] = None
) -> Tensor:
    """Scores whose softmax the mixed weights are: their logarithm, (batch, *spatial, heads, tokens).

    Arguments as in :func:`~vicinal.kernels.gated_positional_attention`.
    """
    content = _content_scores(query, key, scale).log_softmax(-1)
    position = position_scores.to(content.dtype).log_softmax(-1)
    gate = gate.to(content.dtype)[:, None, None]
    scores = torch.logaddexp(F.logsigmoid(-gate) + content, F.logsigmoid(gate) + position)
    return scores.transpose(1, 2).unflatten(1, query.shape[1:-2])


def gated_positional_attention_weights(
    query: Tensor, key: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float] = None
) -> Tensor:
    """Mixed weights, (batch, *spatial, heads, tokens), in float32 (float64 stays).

    Arguments as in :func:`~vicinal.kernels.gated_positional_attention`.
    """
    content = _content_scores(query, key, scale).softmax(-1)
    position = position_scores.to(content.dtype).softmax(-1)
    gate = gate.to(content.dtype).sigmoid()[:, None, None]
    weights = (1 - gate) * content + gate * position
    return weights.transpose(1, 2).unflatten(1, query.shape[1:-2])


def _content_scores(query: Tensor, key: Tensor, scale: Optional[float]) -> Tensor:
    """(batch, heads, tokens, tokens)."""
    dtype = accumulation_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = (tokens.to(dtype).flatten(1, -3) for tokens in (query, key))
    return torch.einsum("bnhd,bmhd->bhnm", queries, keys) * scale


def aggregate(weights: Tensor, value: Tensor) -> Tensor:
    """Sum of all values, weighted by `weights` of :func:`gated_positional_attention_weights`."""
    values = value.to(weights.dtype).flatten(1, -3)
    output = torch.einsum("bnhm,bmhd->bnhd", weights.flatten(1, -3), values)
    return output.unflatten(1, value.shape[1:-2]).to(value.dtype)


def gated_positional_attention(
    query: Tensor, key: Tensor, value: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float]
) -> Tensor:
    return aggregate(gated_positional_attention_weights(query, key, position_scores, gate, scale), value)
