"""Routed attention in plain PyTorch: the keys and values of the routed regions are gathered for every region."""

from typing import Optional

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from .geometry import as_list, in_form_of


def routed_attention_weights(query: Tensor, key: Tensor, routes: Tensor, scale: Optional[float] = None) -> Tensor:
    """Softmax weights, (batch, regions, tokens, heads, k * tokens), in float32 (float64 stays).

    The last axis holds the tokens of the first routed region, then those of the second. Arguments as in
    :func:`~vicinal.kernels.routed_attention`, as lists of regions.
    """
    dtype = accumulation_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _by_head(query.to(dtype)) @ _by_head(_gather(key.to(dtype), routes)).transpose(-1, -2)
    return (scores * scale).softmax(-1).transpose(2, 3)


def aggregate(weights: Tensor, value: Tensor, routes: Tensor) -> Tensor:
    """Sum of the values of the routed regions, weighted by `weights` of :func:`routed_attention_weights`."""
    values = _by_head(_gather(value.to(weights.dtype), routes))
    return (_by_head(weights) @ values).transpose(2, 3).to(value.dtype)


def routed_attention(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: Optional[float]) -> Tensor:
    weights = routed_attention_weights(as_list(query), as_list(key), routes, scale)
    return in_form_of(value, aggregate(weights, as_list(value), routes))


def _by_head(tokens: Tensor) -> Tensor:
    """(batch, regions, tokens, heads, channels) to (batch, regions, heads, tokens, channels)."""
    return tokens.transpose(2, 3)


def _gather(tokens: Tensor, routes: Tensor) -> Tensor:
    """(batch, regions, tokens, heads, channels) to (batch, regions, k * tokens, heads, channels)."""
    batch, regions = tokens.shape[:2]
    first = torch.arange(batch, device=tokens.device)[:, None, None] * regions
    gathered = tokens.flatten(0, 1).index_select(0, (routes + first).flatten())
    return gathered.unflatten(0, (batch, regions, routes.shape[2])).flatten(2, 3)
