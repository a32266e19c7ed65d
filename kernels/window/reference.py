"""Window attention in plain PyTorch: tokens are put in window order, attend inside their window, and are put back."""

from typing import Optional, Sequence

import torch
from torch import Tensor

from ..checks import per_axis
from ..dispatch import accumulation_dtype
from .geometry import bias_index


def window_attention_scores(
    query: Tensor,
    key: Tensor,
    window_size: Sequence[int],
    partition: str = "block",
    shift: Sequence[int] = (0,),
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """Scores of window attention, (batch, height, width, heads, keys), in float32 (float64 stays).

    The last axis holds the tokens of the query's window, row by row, with -inf for those that it must not see.
    Arguments as in :func:`~vicinal.kernels.window_attention`.
    """
    window, shifts = per_axis("window_size", window_size, 2), per_axis("shift", shift, 2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = accumulation_dtype(query.dtype)
    queries = _to_windows(query.to(dtype), window, partition, shifts)
    keys = _to_windows(key.to(dtype), window, partition, shifts)
    scores = queries @ keys.transpose(-1, -2) * scale  # (batch, rows, columns, heads, tokens, tokens)
    if relative_position_bias is not None:
        scores = scores + relative_position_bias.to(dtype).flatten(1)[:, bias_index(window, query.device)]
    if any(shifts):
        regions = _regions(query, window, shifts)
        scores = scores.masked_fill(regions.transpose(-1, -2) != regions, float("-inf"))
    return _to_map(scores, query, window, partition, shifts)


def window_attention_weights(
    query: Tensor,
    key: Tensor,
    window_size: Sequence[int],
    partition: str = "block",
    shift: Sequence[int] = (0,),
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """Softmax over the keys of :func:`window_attention_scores`, of the same arguments."""
    return window_attention_scores(query, key, window_size, partition, shift, relative_position_bias, scale).softmax(-1)


def aggregate(
    weights: Tensor, value: Tensor, window_size: Sequence[int], partition: str = "block", shift: Sequence[int] = (0,)
) -> Tensor:
    """Sum of the values of each query's window, weighted by `weights` of :func:`window_attention_weights`."""
    window, shifts = per_axis("window_size", window_size, 2), per_axis("shift", shift, 2)
    weights = _to_windows(weights, window, partition, shifts)
    values = _to_windows(value.to(weights.dtype), window, partition, shifts)
    # Transposed: the ONNX exporter takes a plain product apart where batch, rows, columns and heads are one number.
    windows = (values.mT @ weights.mT).mT
    return _to_map(windows, value, window, partition, shifts).to(value.dtype)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Sequence[int],
    partition: str,
    shift: Sequence[int],
    relative_position_bias: Optional[Tensor],
    scale: Optional[float],
) -> Tensor:
    weights = window_attention_weights(query, key, window_size, partition, shift, relative_position_bias, scale)
    return aggregate(weights, value, window_size, partition, shift)


def _to_windows(tokens: Tensor, window: Sequence[int], partition: str, shift: Sequence[int]) -> Tensor:
    """(batch, height, width, heads, channels) to (batch, rows, columns, heads, tokens of a window, channels)."""
    for axis in (0, 1):
        order = _order(tokens, axis, window, partition, shift)
        tokens = tokens.index_select(1 + axis, order)
    batch, height, width, heads, channels = tokens.shape
    blocks = tokens.reshape(batch, height // window[0], window[0], width // window[1], window[1], heads, channels)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def _to_map(windows: Tensor, like: Tensor, window: Sequence[int], partition: str, shift: Sequence[int]) -> Tensor:
    """The inverse of :func:`_to_windows`; `like` gives the size of the map."""
    batch, height, width, heads = like.shape[:4]
    tokens = windows.unflatten(4, tuple(window)).permute(0, 1, 4, 2, 5, 3, 6)
    tokens = tokens.reshape(batch, height, width, heads, windows.shape[-1])
    for axis in (0, 1):
        order = _order(like, axis, window, partition, shift)
        tokens = tokens.index_select(1 + axis, order.argsort())
    return tokens


def _order(like: Tensor, axis: int, window: Sequence[int], partition: str, shift: Sequence[int]) -> Tensor:
    """The positions of one axis, window after window."""
    position = torch.arange(like.shape[1 + axis], device=like.device)
    if partition == "grid":
        # not a reshape: where one window covers the axis, its size of 1 would become a constant of the traced graph
        spacing = _size(position) // window[axis]
        return position % window[axis] * spacing + position // window[axis]
    size = _size(position)
    return (position + _effective_shift(size, window[axis], shift[axis])) % size


def _size(position: Tensor) -> Tensor:
    """The size of an axis as a tensor: ONNX has no arithmetic between tensors and symbolic sizes."""
    return position[-1:] + 1


def _effective_shift(size: Tensor, window: int, shift: int) -> Tensor:
    """The shift, or zero where one window covers the axis, without a branch on a size that may be symbolic."""
    return (size - window).clamp(max=shift)


def _regions(like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Label of the part of the map that each token of the shifted windows comes from, (rows, columns, 1, 1, tokens).

    Swin Transformer, section 3.2: the tokens that the cyclic shift brought from the opposite border form regions of
    their own, and attention stays inside a region.
    """
    rows, columns = (_axis_regions(like, axis, window[axis], shift[axis]) for axis in (0, 1))
    labels = 2 * rows[:, None, :, None] + columns[None, :, None, :]
    return labels.flatten(2)[:, :, None, None, :]


def _axis_regions(like: Tensor, axis: int, window: int, shift: int) -> Tensor:
    position = torch.arange(like.shape[1 + axis], device=like.device)
    size = _size(position)
    wrapped = position >= size - _effective_shift(size, window, shift)
    return wrapped.long().reshape(-1, window)
