"""The argument check of window attention; see :mod:`..checks`."""

from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from ..checks import check_attention_inputs, check_positive, check_relative_position_bias, check_scale, per_axis


def check_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Sequence[int],
    partition: str,
    shift: Sequence[int],
    relative_position_bias: Optional[Tensor],
    scale: Optional[float],
) -> None:
    check_attention_inputs(query, key, value, (5,), "(batch, height, width, heads, head_dim)")
    window, shifts = per_axis("window_size", window_size, 2), per_axis("shift", shift, 2)
    check_positive("window_size", window)
    for axis, size, extent in zip(("height", "width"), query.shape[1:3], window, strict=True):
        if size % extent:
            padded = -(-size // extent) * extent
            raise ValueError(
                f"window_size={list(window)} must divide the {axis} {size} of query; pad the {axis} to {padded}"
            )
    if partition not in ("block", "grid"):
        raise ValueError(f"partition={partition!r} must be 'block' or 'grid'")
    if partition == "grid" and any(shifts):
        raise ValueError(f"shift={list(shifts)} must be 0 with partition='grid'; only block windows are shifted")
    for offset, extent in zip(shifts, window, strict=True):
        if not 0 <= offset < extent:
            raise ValueError(f"shift={list(shifts)} must be at least 0 and less than window_size={list(window)}")
    check_relative_position_bias(relative_position_bias, query, window)
    check_scale(scale, query)
