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
from torch.fx.experimental.proxy_tensor import get_proxy_mode

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
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={_shown(value)} does not fit into 64 bits; no map is that large")
    return int(value)


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


def check_pooled(name: str, pooled: Tensor, query: Tensor) -> None:
    """Keys or values of pooled tokens, in a row or as a map, beside a query over a map."""
    layout = "(batch, pooled, heads, head_dim) or (batch, pooled_height, pooled_width, heads, head_dim)"
    check_rank(name, pooled, (4, 5), layout)
    check_dtype(name, pooled, "query", query)
    check_device(name, pooled, "query", query)
    shape = (query.shape[0], *pooled.shape[1:-2], *query.shape[-2:])
    check_shape(name, pooled, shape, "with the batch, heads and head_dim of query")
    if math.prod(pooled.shape[1:-2]) < 1:
        raise ValueError(f"{name} has shape {tuple(pooled.shape)}; it must hold at least 1 pooled token")


def check_broadcast(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    """Args: shape: what the tensor must broadcast to; layout: its axes in words, for the message."""
    trailing = shape[len(shape) - tensor.ndim :]
    fits = tensor.ndim <= len(shape) and all(
        size in (1, wanted) for size, wanted in zip(tensor.shape, trailing, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, {layout}, or broadcast to it"
        )


def check_aggregated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: int,
    local_bias: Optional[Tensor],
    pooled_bias: Optional[Tensor],
    value_weights: Optional[Tensor],
    scale: Optional[float],
) -> None:
    check_attention_inputs(query, key, value, (5,), "(batch, height, width, heads, head_dim)")
    check_pooled("pooled_key", pooled_key, query)
    check_pooled("pooled_value", pooled_value, query)
    check_shape("pooled_value", pooled_value, pooled_key.shape, "the shape of pooled_key")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size={window_size} must be odd and at least 1; use {max(1, window_size + 1)}")
    optional = (("local_bias", local_bias), ("pooled_bias", pooled_bias), ("value_weights", value_weights))
    for name, tensor in optional:
        if tensor is not None:
            check_floating(name, tensor)
            check_device(name, tensor, "query", query)
    _check_reach("window_size", window_size, 2, query)
    neighbours, heads = window_size**2, query.shape[3]
    if local_bias is not None:
        check_shape("local_bias", local_bias, (heads, neighbours), "(heads, window_size**2)")
    if pooled_bias is not None:
        shape = (heads, query.shape[1] * query.shape[2], math.prod(pooled_key.shape[1:-2]))
        check_broadcast("pooled_bias", pooled_bias, shape, "(heads, height * width, pooled)")
    if value_weights is not None:
        shape = (*query.shape[:4], neighbours)
        check_shape("value_weights", value_weights, shape, "(batch, height, width, heads, window_size**2)")
    check_scale(scale, query)


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
    _check_reach("halo_size", halo_size, 1, key)
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


def _check_reach(name: str, reach: int, sides: int, tokens: Tensor) -> None:
    """Beyond the map there is nothing to reach; a few cells more are allowed, so that one setting serves small maps."""
    if reach <= SMALL_REACH:  # first, so that a traced graph does not depend on the size of the map
        return
    largest = max(SMALL_REACH, sides * max(tokens.shape[1:3]))
    if reach > largest:
        raise ValueError(
            f"{name}={reach} reaches far beyond the map of {tuple(tokens.shape[1:3])}; use at most {largest}"
        )


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


def check_gated_positional_attention(
    query: Tensor, key: Tensor, value: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float]
) -> None:
    layout = "(batch, *spatial, heads, head_dim) with 1, 2 or 3 spatial axes"
    check_attention_inputs(query, key, value, (4, 5, 6), layout)
    for name, tensor in (("position_scores", position_scores), ("gate", gate)):
        check_floating(name, tensor)
        check_device(name, tensor, "query", query)
    heads, tokens = query.shape[-2], math.prod(query.shape[1:-2])
    check_shape("position_scores", position_scores, (heads, tokens, tokens), "(heads, tokens, tokens)")
    check_shape("gate", gate, (heads,), "(heads,)")
    check_scale(scale, query)


def check_routed_attention(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: Optional[float]) -> None:
    layout = "(batch, regions, tokens, heads, channels) or (batch, rows, y, columns, x, heads, channels)"
    check_same_kind(query, key, value, layout, (5, 7))
    check_shape("key", key, query.shape, "the shape of query")
    check_shape(
        "value", value, (*query.shape[:-1], value.shape[-1]), "with the batch, regions, tokens and heads of query"
    )
    regions = math.prod(query.shape[1:-2:2])  # a map has its tokens' axes between
    if routes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"routes has dtype {routes.dtype}; use int64 or int32")
    check_rank("routes", routes, (3,), "(batch, regions, k)")
    check_device("routes", routes, "query", query)
    check_shape("routes", routes, (query.shape[0], regions, routes.shape[2]), "(batch, regions, k) of query")
    if routes.shape[2] < 1:
        raise ValueError(f"routes has shape {tuple(routes.shape)}; each region needs at least 1 route")
    _check_routes_in_range(routes, regions)
    check_scale(scale, query)


def _check_routes_in_range(routes: Tensor, regions: int) -> None:
    """On the CPU: elsewhere reading the values would wait for the device, and while tracing there are none."""
    if routes.device.type != "cpu" or torch.compiler.is_compiling() or get_proxy_mode() or routes.numel() == 0:
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(routes):  # by vmap, which allows nobody to read a value
        routes = torch._C._functorch.get_unwrapped(routes)
    least, largest = (bound.item() for bound in routes.aminmax())
    if least < 0 or largest >= regions:
        raise ValueError(f"routes has entries from {least} to {largest}; they must be from 0 to {regions - 1}, regions")
