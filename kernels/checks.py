"""Argument checks of all operators: one function per operator, built from the generic ones above it.

Every check raises ValueError with the argument's name, the value given and what is allowed. Checks read real sizes, so
they run once per eager call, inside the operator, and never while a graph is traced.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Optional

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def canonicalize(name: str, kind: str, value: Any) -> Any:
    """Bring one option to the type that the schema declares: a number becomes a list, a tuple a list.

    Sizes of a map may be given as options, so elements of a list may be symbolic while a graph is traced.

    Args:
        name: of the argument, for the message.
        kind: the type in the schema: "List[int]", "List[bool]", "str", "Optional[float]"; tensors pass untouched.
        value: as the caller gave it.
    """
    if kind in ("List[int]", "List[bool]"):
        return _as_list(name, value, bool if kind == "List[bool]" else int)
    if kind == "str" and not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a string")
    if kind == "Optional[float]" and value is not None and not _is_number(value, Real, torch.SymFloat):
        raise ValueError(f"{name}={value!r} must be a number or None; a learnable scale is multiplied into query")
    return value


def _is_number(value: Any, abstract: type, symbolic: type) -> bool:
    return isinstance(value, (abstract, symbolic, torch.SymInt)) and not isinstance(value, bool)


def _as_list(name: str, value: Any, kind: type) -> list:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for item in items:
        fits = isinstance(item, bool) if kind is bool else _is_number(item, Integral, torch.SymInt)
        if not fits and not isinstance(item, torch.fx.Proxy):
            raise ValueError(f"{name}={value!r} must be one {kind.__name__} or one {kind.__name__} per axis")
    return items


def per_axis(name: str, values: Sequence, rank: int) -> tuple:
    """Broadcast a list of one element over the axes, and refuse any other length than the rank."""
    if len(values) not in (1, rank):
        raise ValueError(f"{name}={list(values)} must have 1 element or {rank}, one per spatial axis")
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
        raise ValueError(f"{name} has dtype {tensor.dtype}; use one of {allowed}")


def check_rank(name: str, tensor: Tensor, ranks: Sequence[int], layout: str) -> None:
    """Args: ranks: allowed numbers of dimensions; layout: what they are, for the message."""
    if tensor.ndim not in ranks:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {layout}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {other.device}, like {other_name}")


def check_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {other.dtype}, like {other_name}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    """Args: shape: the only one allowed; layout: its axes in words, for the message."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, {layout}")


def check_scale(scale: Optional[float]) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite, or None for head_dim**-0.5")


def check_positive(name: str, values: Sequence[int]) -> None:
    if min(values) < 1:
        raise ValueError(f"{name}={list(values)} must be at least 1 on every axis")


def check_attention_inputs(query: Tensor, key: Tensor, value: Tensor, ranks: Sequence[int], layout: str) -> None:
    """The checks of query, key and value of one shape."""
    check_rank("query", query, ranks, layout)
    check_floating("query", query)
    for name, tensor in (("key", key), ("value", value)):
        check_dtype(name, tensor, "query", query)
        check_device(name, tensor, "query", query)
        check_shape(name, tensor, query.shape, "the shape of query")


def check_relative_position_bias(bias: Optional[Tensor], query: Tensor, window: Sequence[int]) -> None:
    """A table of shape (heads, 2 * window - 1 per axis), of any floating dtype, on the device of query."""
    if bias is None:
        return
    check_floating("relative_position_bias", bias)
    check_device("relative_position_bias", bias, "query", query)
    shape = (query.shape[-2], *(2 * size - 1 for size in window))
    check_shape("relative_position_bias", bias, shape, "(heads, 2 * window - 1 on each axis)")


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
    check_scale(scale)


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
    check_scale(scale)
