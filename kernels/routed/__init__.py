"""Routed attention: the tokens of each region attend to the tokens of the regions that it is routed to."""

from typing import Optional

from torch import Tensor

from ..dispatch import Operator
from ..packed import PackedOperator
from . import reference, tiled
from .check import check_routed_attention
from .examples import EXAMPLES
from .geometry import as_list, count_tokens, in_form_of
from .reference import aggregate, routed_attention_weights

__all__ = [
    "aggregate",
    "as_list",
    "in_form_of",
    "routed_attention",
    "routed_attention_packed",
    "routed_attention_weights",
]

_OPERATOR = Operator(
    "routed_attention",
    "Tensor query, Tensor key, Tensor value, Tensor routes, float? scale=None",
    differentiable=("query", "key", "value"),
    check=check_routed_attention,
    reference=reference.routed_attention,
    tiled=tiled,
    examples=EXAMPLES,
    fused=f"{__name__}.fused",
    keys_per_query=lambda query, key, value, routes, *_: routes[-1] * count_tokens(key),
)
_PACKED = PackedOperator(_OPERATOR)


def routed_attention(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, *, scale: Optional[float] = None
) -> Tensor:
    """Multi-head attention between regions: each region's queries attend to the tokens of the regions it is routed to.

    The caller divides the map into regions, of any shape, and chooses the routes.

    Args:
        query, key: (batch, regions, tokens, heads, head_dim) of one dtype (float32, bfloat16, float16 or float64) with
            any strides. Where heads come before regions in memory, tiled reads them without a copy. Or a map with both
            axes unflattened, (batch, rows, y, columns, x, heads, head_dim): its regions, and the tokens of each, count
            row by row; fused reads and writes it in place.
        value: (batch, regions, tokens, heads, value_dim) or as a map, of the dtype of query.
        routes: (batch, regions, k), int32 or int64: the regions, of 0 to regions - 1, whose tokens the queries of a
            region attend to, the same for all heads. The order does not matter; a region that is listed twice has its
            tokens twice in the softmax. There is no gradient through the choice.
        scale: of the scores; None for head_dim**-0.5.

    Returns:
        The shape of query with the channels of value, of the dtype of query, contiguous. Gradients flow to query, key
        and value, once.

    Raises:
        ValueError: an argument does not fit the above. Regions out of range are found on the CPU; on other devices
            looking for them would wait for the device, whose own indexing checks apply.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv:2303.08810), section 3.2.
    """
    return _OPERATOR(query, key, value, routes, scale)


def routed_attention_packed(packed: Tensor, routes: Tensor, *, scale: Optional[float] = None) -> Tensor:
    """:func:`routed_attention` of a packed projection, whose gradient the fused kernels write in place.

    Args:
        packed: (batch, regions, tokens, 3, heads, head_dim) or, as a map, (batch, rows, y, columns, x, 3, heads,
            head_dim): query, key and value, of any strides.
        routes, scale: see :func:`routed_attention`.

    Returns:
        (batch, regions, tokens, heads, head_dim) or (batch, rows, y, columns, x, heads, head_dim), contiguous.

    Raises:
        ValueError: an argument does not fit the above.
    """
    return _PACKED(packed, routes, scale)
