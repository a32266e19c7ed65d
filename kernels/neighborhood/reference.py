"""Neighborhood attention in plain PyTorch: the keys and values of every window are gathered, then attended to."""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from .check import neighborhood_options


def neighborhood_attention_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1,),
    dilation: Sequence[int] = (1,),
    is_causal: Sequence[bool] = (False,),
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """Scores of neighborhood attention, (batch, *spatial, heads, keys), in float32 (float64 stays).

    The last axis holds the keys of the query's window, row by row; keys that a causal window lacks have -inf.
    Arguments as in :func:`~vicinal.kernels.neighborhood_attention`, options as one element or one per axis.
    """
    dtype = accumulation_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    index, offset, visible = _neighborhoods(query, kernel_size, stride, dilation, is_causal)
    queries = query.to(dtype).flatten(1, -3)  # (batch, tokens, heads, head_dim)
    keys = _gather(key.to(dtype), index)  # (batch, tokens, keys, heads, head_dim)
    scores = torch.einsum("bqhd,bqkhd->bqhk", queries, keys) * scale
    if relative_position_bias is not None:
        bias = relative_position_bias.to(dtype).flatten(1)[:, offset]  # (heads, tokens, keys)
        scores = scores + bias.transpose(0, 1)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return scores.reshape(*query.shape[:-1], index.shape[-1])


def neighborhood_attention_weights(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1,),
    dilation: Sequence[int] = (1,),
    is_causal: Sequence[bool] = (False,),
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """Softmax over the keys of :func:`neighborhood_attention_scores`, of the same arguments."""
    options = (kernel_size, stride, dilation, is_causal)
    return neighborhood_attention_scores(query, key, *options, relative_position_bias, scale).softmax(-1)


def aggregate(
    weights: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1,),
    dilation: Sequence[int] = (1,),
    is_causal: Sequence[bool] = (False,),
) -> Tensor:
    """Sum of the values of each window, weighted by `weights` of :func:`neighborhood_attention_weights`."""
    index, _, _ = _neighborhoods(value, kernel_size, stride, dilation, is_causal)
    values = _gather(value.to(weights.dtype), index)
    output = torch.einsum("bqhk,bqkhd->bqhd", weights.flatten(1, -3), values)
    return output.reshape(value.shape).to(value.dtype)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    relative_position_bias: Optional[Tensor],
    scale: Optional[float],
) -> Tensor:
    options = (kernel_size, stride, dilation, is_causal)
    weights = neighborhood_attention_weights(query, key, *options, relative_position_bias, scale)
    return aggregate(weights, value, *options)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.flatten(1, -3)[:, index]


def _neighborhoods(
    tokens: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every token, each (tokens, keys) with all axes flattened row by row.

    Returns:
        index of the key in the map, its place in the relative position bias, and whether the query sees it.
    """
    rank = tokens.ndim - 3
    index = offset = torch.zeros(1, 1, dtype=torch.long, device=tokens.device)
    visible = torch.ones(1, 1, dtype=torch.bool, device=tokens.device)
    options = neighborhood_options(rank, kernel_size, stride, dilation, is_causal)
    for axis in zip(tokens.shape[1:-2], *options, strict=True):
        axis_index, axis_offset, axis_visible = _axis_windows(*axis, tokens.device)
        size, kernel = axis[:2]
        index = _outer(index * size, axis_index, torch.add)
        offset = _outer(offset * (2 * kernel - 1), axis_offset, torch.add)
        visible = _outer(visible, axis_visible, torch.logical_and)
    return index, offset, visible


def _outer(rows: Tensor, columns: Tensor, combine) -> Tensor:
    """Combines (tokens, keys) of the axes so far with those of the next axis, which runs fastest."""
    return combine(rows[:, None, :, None], columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def _axis_windows(
    size: int, kernel: int, stride: int, dilation: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every position of one axis, (size, kernel): index of the key, key - query + kernel - 1, visible.

    Positions `dilation` apart form a group, and places count inside it. A window follows the leader of its stride
    and is shifted inwards at the ends of the group (Hassani et al., Generalized Neighborhood Attention, section 3).
    """
    position = torch.arange(size, device=device)
    residue, place = position % dilation, position // dilation
    length = (size - residue + dilation - 1) // dilation  # of the position's group
    leader = place // stride * stride + (stride - 1 if causal else stride // 2)
    leader = torch.minimum(leader, length - 1)
    centred = torch.minimum((leader - kernel // 2).clamp(min=0), length - kernel)
    start = leader - kernel + 1 if causal else centred
    keys = start[:, None] + torch.arange(kernel, device=device)
    query = place[:, None]
    visible = (keys >= 0) & (keys <= query) if causal else torch.ones_like(keys, dtype=torch.bool)
    keys = torch.where(visible, keys, query)  # an invisible key still needs a place to be read from
    return keys * dilation + residue[:, None], keys - query + kernel - 1, visible
