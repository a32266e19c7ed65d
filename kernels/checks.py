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
        if not fits:
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
