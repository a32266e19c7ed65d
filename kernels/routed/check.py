"""The argument check of routed attention; see :mod:`..checks`."""

import math
from typing import Optional

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ...torch_internals import unwrapped
from ..checks import check_device, check_rank, check_same_kind, check_scale, check_shape


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
    # vmap allows nobody to read a value of what it wraps
    least, largest = (bound.item() for bound in unwrapped(routes).aminmax())
    if least < 0 or largest >= regions:
        raise ValueError(f"routes has entries from {least} to {largest}; they must be from 0 to {regions - 1}, regions")
