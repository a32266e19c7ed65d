"""The operators as TorchScript takes them, positional and typed: what a layer calls that may be scripted.

Eager code, torch.compile, torch.export and torch.fx go through the public function; a scripted program holds the
registered operator. Each name, argument and result is that of the public function; options that no layer sets are
left out.
"""

from typing import List, Optional

import torch
from torch import Tensor

from . import aggregated, gated, halo, neighborhood, routed, window


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
) -> Tensor:
    """:func:`vicinal.kernels.aggregated_attention`, whose scale is 1."""
    if torch.jit.is_scripting():
        return torch.ops.vicinal.aggregated_attention(
            query, key, value, pooled_key, pooled_value, window_size, local_bias, pooled_bias, value_weights, 1.0
        )[0]
    return aggregated.aggregated_attention(
        query,
        key,
        value,
        pooled_key,
        pooled_value,
        window_size=window_size,
        local_bias=local_bias,
        pooled_bias=pooled_bias,
        value_weights=value_weights,
    )


def gated_positional_attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, gate: Tensor) -> Tensor:
    """:func:`vicinal.kernels.gated_positional_attention`."""
    if torch.jit.is_scripting():
        return torch.ops.vicinal.gated_positional_attention(query, key, value, scores, gate, None)[0]
    return gated.gated_positional_attention(query, key, value, scores, gate)


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    halo_size: int,
    relative_height_logits: Optional[Tensor],
    relative_width_logits: Optional[Tensor],
) -> Tensor:
    """:func:`vicinal.kernels.halo_attention`."""
    rows, columns = relative_height_logits, relative_width_logits
    if torch.jit.is_scripting():
        return torch.ops.vicinal.halo_attention(query, key, value, block_size, halo_size, rows, columns, False, None)[0]
    return halo.halo_attention(
        query, key, value, block_size, halo_size, relative_height_logits=rows, relative_width_logits=columns
    )


def neighborhood_attention_packed(
    packed: Tensor, kernel_size: List[int], dilation: List[int], relative_position_bias: Optional[Tensor]
) -> Tensor:
    """:func:`vicinal.kernels.neighborhood_attention_packed`."""
    if torch.jit.is_scripting():
        return torch.ops.vicinal.neighborhood_attention_packed(
            packed, kernel_size, [1], dilation, [False], relative_position_bias, None
        )[0]
    return neighborhood.neighborhood_attention_packed(
        packed, kernel_size, dilation=dilation, relative_position_bias=relative_position_bias
    )


def routed_attention_packed(packed: Tensor, routes: Tensor, scale: float) -> Tensor:
    """:func:`vicinal.kernels.routed_attention_packed`."""
    if torch.jit.is_scripting():
        return torch.ops.vicinal.routed_attention_packed(packed, routes, scale)[0]
    return routed.routed_attention_packed(packed, routes, scale=scale)


def window_attention_packed(
    packed: Tensor, window_size: List[int], partition: str, relative_position_bias: Optional[Tensor]
) -> Tensor:
    """:func:`vicinal.kernels.window_attention_packed`."""
    if torch.jit.is_scripting():
        return torch.ops.vicinal.window_attention_packed(
            packed, window_size, partition, [0], relative_position_bias, None
        )[0]
    return window.window_attention_packed(
        packed, window_size, partition=partition, relative_position_bias=relative_position_bias
    )
