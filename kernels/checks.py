"""What the argument checks of the operators (`check.py` in the folder of each) are made of.

Every check raises ValueError with the argument's name, the value given and what is allowed. Checks read real sizes, so
they run once per eager call, inside the operator, and never while a graph is traced.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Optional

import torch
from torch import Tensor

SMALL_REACH = 64
"""Tokens that a window or halo may reach over on any map."""
FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def canonicalize(name: str, kind: str, value: Any) -> Any:
    """Bring one option to the type that the schema declares: a number becomes a list, a tuple a list.

    Sizes of a map may be given as options, so elements of a list may be symbolic while a graph is traced.

    Args:
        name: of the argument, for the message.
        kind: the type in the schema: "List[int]", "List[bool]", "int", "bool", "str" or "Optional[float]"; others pass.
        value: as the caller gave it.
    """
    if kind in ("List[int]", "List[bool]"):
        return _as_list(name, value, bool if kind == "List[bool]" else int)
    if kind == "int":
        if not _is_number(value, Integral, torch.SymInt):
            raise ValueError(f"{name}={_shown(value)} must be one int")
        return _in_64_bits(name, value)
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name}={_shown(value)} must be True or False")
    if kind == "str" and not isinstance(value, str):
        raise ValueError(f"{name}={_shown(value)} must be a string")
    if kind == "Optional[float]" and value is not None:
        if not _is_number(value, Real, torch.SymFloat):
            raise ValueError(
                f"{name}={_shown(value)} must be a number or None; a learnable scale is multiplied into query"
            )
        return _as_float(name, value)
    return value


def _is_number(value: Any, abstract: type, symbolic: type) -> bool:
    return isinstance(value, (abstract, symbolic, torch.SymInt)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """The value in one short line: a tensor or a long number would fill the screen."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an int of more digits than Python prints
        text = f"an int of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _in_64_bits(name: str, value: Any) -> Any:
    """A plain int from any kind of them, as torch's operators take no other; symbols pass."""
    if torch.compiler.is_compiling() or not isinstance(value, Integral):
        return value
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}={_shown(value)} does not fit into 64 bits; no map is that large")
    return number


def _as_float(name: str, value: Any) -> Any:
    """A plain float from any real number, as TorchScript takes no int for one; symbols pass."""
    if isinstance(value, float) or not isinstance(value, Real):
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}={_shown(value)} is too large for a float") from None


def _as_list(name: str, value: Any, kind: type) -> list:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for item in items:
        fits = isinstance(item, bool) if kind is bool else _is_number(item, Integral, torch.SymInt)
        if not fits and not isinstance(item, torch.fx.Proxy):
            raise ValueError(f"{name}={_shown(value)} must be one {kind.__name__} or one {kind.__name__} per axis")
    return items if kind is bool else [_in_64_bits(name, item) for item in items]


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


def check_scale(scale: Optional[float], query: Tensor) -> None:
    """Scores are held in base 2, 1.4 times as large, in float32; for float64 inputs in float64."""
    if scale is None:
        return
    # not math.isfinite: a compiler may hold the number as a symbol
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale={scale} must be finite, or None for head_dim**-0.5")
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    largest = torch.finfo(dtype).max / 2
    if not -largest <= scale <= largest:
        raise ValueError(f"scale={scale} is too large for scores in {dtype}; use at most {largest:.3g}")


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


def check_same_kind(query: Tensor, key: Tensor, value: Tensor, layout: str, ranks: Sequence[int] = (5,)) -> None:
    """The checks of query, key and value that may have different shapes."""
    check_floating("query", query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_rank(name, tensor, ranks, layout)
        check_dtype(name, tensor, "query", query)
        check_device(name, tensor, "query", query)


def check_relative_position_bias(bias: Optional[Tensor], query: Tensor, window: Sequence[int]) -> None:
    """A table of shape (heads, 2 * window - 1 per axis), of any floating dtype, on the device of query."""
    if bias is None:
        return
    check_floating("relative_position_bias", bias)
    check_device("relative_position_bias", bias, "query", query)
    shape = (query.shape[-2], *(2 * size - 1 for size in window))
    check_shape("relative_position_bias", bias, shape, "(heads, 2 * window - 1 on each axis)")


def check_reach(name: str, reach: int, sides: int, tokens: Tensor) -> None:
    """Beyond the map there is nothing to reach; a few cells more are allowed, so that one setting serves small maps."""
    if reach <= SMALL_REACH:  # first, so that a traced graph does not depend on the size of the map
        return
    largest = max(SMALL_REACH, sides * max(tokens.shape[1:3]))
    if reach > largest:
        raise ValueError(
            f"{name}={reach} reaches far beyond the map of {tuple(tokens.shape[1:3])}; use at most {largest}"
        )
