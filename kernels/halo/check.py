"""The argument check of halo attention; see :mod:`..checks`."""

from typing import Optional

from torch import Tensor

from ..checks import (
    check_device,
    check_floating,
    check_positive,
    check_reach,
    check_same_kind,
    check_scale,
    check_shape,
)


def check_halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    halo_size: int,
    relative_height_logits: Optional[Tensor],
    relative_width_logits: Optional[Tensor],
    mask_padding: bool,
    scale: Optional[float],
) -> None:
    check_same_kind(query, key, value, "(batch, height, width, heads, channels)")
    check_positive("block_size", [block_size])
    if halo_size < 0:
        raise ValueError(f"halo_size={halo_size} must be at least 0")
    check_reach("halo_size", halo_size, 1, key)
    batch, *_, heads, head_dim = query.shape
    check_shape("key", key, (batch, *key.shape[1:3], heads, head_dim), "with the batch, heads and head_dim of query")
    check_shape("value", value, (*key.shape[:4], value.shape[4]), "with the batch, map and heads of key")
    for axis, size in zip(("height", "width"), key.shape[1:3], strict=True):
        if size % block_size:
            padded = -(-size // block_size) * block_size
            raise ValueError(
                f"block_size={block_size} must divide the {axis} {size} of key; pad the {axis} to {padded}"
            )
    _check_query_map(query, key, block_size)
    for name, logits in (
        ("relative_height_logits", relative_height_logits),
        ("relative_width_logits", relative_width_logits),
    ):
        if logits is not None:
            check_floating(name, logits)
            check_device(name, logits, "query", query)
            shape = (*query.shape[:4], block_size + 2 * halo_size)
            check_shape(name, logits, shape, "(batch, height, width, heads, block_size + 2 * halo_size) of query")
    check_scale(scale, query)


def _check_query_map(query: Tensor, key: Tensor, block_size: int) -> None:
    """The queries of halo attention lie on the map of the keys, or on every other row and column of it."""
    full = tuple(key.shape[1:3])
    if tuple(query.shape[1:3]) == full:
        return
    half = tuple(size // 2 for size in full)
    if tuple(query.shape[1:3]) != half or block_size % 2:
        allowed = f"{full}, the map of key" + (f", or half of it, {half}" if block_size % 2 == 0 else "")
        raise ValueError(
            f"query has a map of {tuple(query.shape[1:3])}; with block_size={block_size} it must be {allowed}"
        )
