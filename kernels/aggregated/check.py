"""The argument check of aggregated attention; see :mod:`..checks`."""

import math
from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from ..checks import (
    check_attention_inputs,
    check_device,
    check_dtype,
    check_floating,
    check_rank,
    check_reach,
    check_scale,
    check_shape,
)


def check_aggregated_attention(
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
) -> None:
    check_attention_inputs(query, key, value, (5,), "(batch, height, width, heads, head_dim)")
    _check_pooled("pooled_key", pooled_key, query)
    _check_pooled("pooled_value", pooled_value, query)
    check_shape("pooled_value", pooled_value, pooled_key.shape, "the shape of pooled_key")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size={window_size} must be odd and at least 1; use {max(1, window_size + 1)}")
    optional = (("local_bias", local_bias), ("pooled_bias", pooled_bias), ("value_weights", value_weights))
    for name, tensor in optional:
        if tensor is not None:
            check_floating(name, tensor)
            check_device(name, tensor, "query", query)
    check_reach("window_size", window_size, 2, query)
    neighbours, heads = window_size**2, query.shape[3]
    if local_bias is not None:
        check_shape("local_bias", local_bias, (heads, neighbours), "(heads, window_size**2)")
    if pooled_bias is not None:
        shape = (heads, query.shape[1] * query.shape[2], math.prod(pooled_key.shape[1:-2]))
        _check_broadcast("pooled_bias", pooled_bias, shape, "(heads, height * width, pooled)")
    if value_weights is not None:
        shape = (*query.shape[:4], neighbours)
        check_shape("value_weights", value_weights, shape, "(batch, height, width, heads, window_size**2)")
    check_scale(scale, query)


def _check_pooled(name: str, pooled: Tensor, query: Tensor) -> None:
    """Keys or values of pooled tokens, in a row or as a map, beside a query over a map."""
    layout = "(batch, pooled, heads, head_dim) or (batch, pooled_height, pooled_width, heads, head_dim)"
    check_rank(name, pooled, (4, 5), layout)
    check_dtype(name, pooled, "query", query)
    check_device(name, pooled, "query", query)
    shape = (query.shape[0], *pooled.shape[1:-2], *query.shape[-2:])
    check_shape(name, pooled, shape, "with the batch, heads and head_dim of query")
    if math.prod(pooled.shape[1:-2]) < 1:
        raise ValueError(f"{name} has shape {tuple(pooled.shape)}; it must hold at least 1 pooled token")


def _check_broadcast(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    """Args: shape: what the tensor must broadcast to; layout: its axes in words, for the message."""
    trailing = shape[len(shape) - tensor.ndim :]
    fits = tensor.ndim <= len(shape) and all(
        size in (1, wanted) for size, wanted in zip(tensor.shape, trailing, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, {layout}, or broadcast to it"
        )
