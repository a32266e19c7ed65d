"""Halo attention in plain PyTorch: overlapping windows are gathered from the padded map, one for each block."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import accumulation_dtype


def halo_attention_scores(
    query: Tensor,
    key: Tensor,
    block_size: int,
    halo_size: int,
    relative_height_logits: Optional[Tensor] = None,
    relative_width_logits: Optional[Tensor] = None,
    mask_padding: bool = False,
    scale: Optional[float] = None,
) -> Tensor:
    """Scores of halo attention, (batch, height', width', heads, keys), in float32 (float64 stays).

    The last axis holds the window of the query's block, row by row, with -inf for what is masked. Arguments as in
    :func:`~vicinal.kernels.halo_attention`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = accumulation_dtype(query.dtype)
    queries = _to_blocks(query.to(dtype), key, block_size)
    keys = _to_windows(key.to(dtype), block_size, halo_size)
    scores = queries @ keys.transpose(-1, -2) * scale  # (batch, rows, columns, heads, queries, keys)
    window = block_size + 2 * halo_size
    if relative_height_logits is not None:
        rows = _to_blocks(relative_height_logits.to(dtype), key, block_size)
        scores = scores + rows.repeat_interleave(window, -1)
    if relative_width_logits is not None:
        columns = _to_blocks(relative_width_logits.to(dtype), key, block_size)
        scores = scores + columns.repeat(1, 1, 1, 1, 1, window)
    if mask_padding:
        inside = _to_windows(torch.ones_like(key[:1, :, :, :1, :1]), block_size, halo_size).transpose(-1, -2)
        scores = scores.masked_fill(inside == 0, float("-inf"))
    return _to_map(scores, query)


def halo_attention_weights(
    query: Tensor,
    key: Tensor,
    block_size: int,
    halo_size: int,
    relative_height_logits: Optional[Tensor] = None,
    relative_width_logits: Optional[Tensor] = None,
    mask_padding: bool = False,
    scale: Optional[float] = None,
) -> Tensor:
    """Softmax over the keys of :func:`halo_attention_scores`, of the same arguments."""
    logits = (relative_height_logits, relative_width_logits)
    return halo_attention_scores(query, key, block_size, halo_size, *logits, mask_padding, scale).softmax(-1)


def aggregate(weights: Tensor, value: Tensor, block_size: int, halo_size: int) -> Tensor:
    """Sum of the values of each query's window, weighted by `weights` of :func:`halo_attention_weights`."""
    values = _to_windows(value.to(weights.dtype), block_size, halo_size)
    # Transposed: the ONNX exporter takes a plain product apart where batch, rows, columns and heads are one number.
    blocks = (values.mT @ _to_blocks(weights, value, block_size).mT).mT
    return _to_map(blocks, weights).to(value.dtype)


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    halo_size: int,
    relative_height_logits: Optional[Tensor],
    relative_width_logits: Optional[Tensor],
    mask_padding: bool,
    scale: Optional[float],
) -> Tensor:
    weights = halo_attention_weights(
        query, key, block_size, halo_size, relative_height_logits, relative_width_logits, mask_padding, scale
    )
    return aggregate(weights, value, block_size, halo_size)


def _to_blocks(tokens: Tensor, like: Tensor, block: int) -> Tensor:
    """Queries (batch, height', width', heads, channels) to (batch, rows, columns, heads, queries of a block, channels).

    `like` is a map of the size of the keys.
    """
    rows, columns = like.shape[1] // block, like.shape[2] // block
    batch, height, width, heads, channels = tokens.shape
    blocks = tokens.reshape(batch, rows, height // rows, columns, width // columns, heads, channels)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def _to_map(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_to_blocks`; `like` gives the size of the map."""
    batch, height, width, heads = like.shape[:4]
    rows, columns = blocks.shape[1:3]
    tokens = blocks.unflatten(4, (height // rows, width // columns)).permute(0, 1, 4, 2, 5, 3, 6)
    return tokens.reshape(batch, height, width, heads, blocks.shape[-1])


def _to_windows(tokens: Tensor, block: int, halo: int) -> Tensor:
    """(batch, height, width, heads, channels) to (batch, rows, columns, heads, tokens of a window, channels)."""
    batch, height, width, heads, channels = tokens.shape
    padded = F.pad(tokens, [0, 0, 0, 0, halo, halo, halo, halo])
    window = block + 2 * halo
    for axis, size in ((1, height), (2, width)):
        corner = torch.arange(size // block, device=tokens.device) * block
        offset = torch.arange(window, device=tokens.device)
        padded = padded.index_select(axis, (corner[:, None] + offset).flatten())
    windows = padded.reshape(batch, height // block, window, width // block, window, heads, channels)
    return windows.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)
