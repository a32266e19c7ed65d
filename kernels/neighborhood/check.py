"""The argument check of neighborhood attention; see :mod:`..checks`."""

from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from ..checks import check_attention_inputs, check_positive, check_relative_position_bias, check_scale, per_axis


def neighborhood_options(
    rank: int, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]
) -> tuple[tuple, tuple, tuple, tuple]:
    """The options of neighborhood attention, in this order, each as a tuple with one element per axis."""
    return (
        per_axis("kernel_size", kernel_size, rank),
        per_axis("stride", stride, rank),
        per_axis("dilation", dilation, rank),
        per_axis("is_causal", is_causal, rank),
    )


def check_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    relative_position_bias: Optional[Tensor],
    scale: Optional[float],
) -> None:
    layout = "(batch, *spatial, heads, head_dim) with 1, 2 or 3 spatial axes"
    check_attention_inputs(query, key, value, (4, 5, 6), layout)
    rank = query.ndim - 3
    kernel, strides, dilations, _ = neighborhood_options(rank, kernel_size, stride, dilation, is_causal)
    check_positive("kernel_size", kernel)
    check_positive("stride", strides)
    check_positive("dilation", dilations)
    for axis, (size, extent, step) in enumerate(zip(query.shape[1:-2], kernel, dilations, strict=True)):
        if extent * step > size:
            smaller = f" or use kernel_size={size // step} there" if size >= step else ""
            raise ValueError(
                f"kernel_size={list(kernel)} with dilation={list(dilations)} spans {extent * step} tokens of spatial "
                f"axis {axis}, which has {size}; pad the axis to {extent * step}{smaller}"
            )
    for axis, (shared, extent) in enumerate(zip(strides, kernel, strict=True)):
        if shared > extent:
            raise ValueError(
                f"stride={list(strides)} must be at most kernel_size={list(kernel)} on spatial axis {axis}; "
                f"use stride={extent} there"
            )
    check_relative_position_bias(relative_position_bias, query, kernel)
    check_scale(scale, query)
