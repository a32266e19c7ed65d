"""Routed attention: the tokens of each region attend to the tokens of the regions that it is routed to."""

from typing import Optional

from torch import Tensor

from .. import checks
from ..dispatch import Operator
from . import reference, tiled
from .reference import aggregate, routed_attention_weights

__all__ = ["aggregate", "routed_attention", "routed_attention_weights"]

_OPERATOR = Operator(
    "routed_attention",
    "Tensor query, Tensor key, Tensor value, Tensor routes, float? scale=None",
    differentiable=("query", "key", "value"),
    check=checks.check_routed_attention,
    reference=reference.routed_attention,
    tiled=tiled,
    fused=f"{__name__}.fused",
    keys_per_query=lambda query, key, value, routes, *_: routes[-1] * key[2],
)


def routed_attention(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, *, scale: Optional[float] = None
) -> Tensor:
    """Multi-head attention between regions: each region's queries attend to the tokens of the regions it is routed to.

    The caller divides the map into regions, of any shape, and chooses the routes.

    Args:
        query, key: (batch, regions, tokens, heads, head_dim) of one dtype (float32, bfloat16, float16 or float64) with
            any strides. Where heads come before regions in memory, tiled reads them without a copy.
        value: (batch, regions, tokens, heads, value_dim), of the dtype of query.
        routes: (batch, regions, k), int32 or int64: the regions, of 0 to regions - 1, whose tokens the queries of a
            region attend to, the same for all heads. The order does not matter; a region that is listed twice has its
            tokens twice in the softmax. There is no gradient through the choice.
        scale: of the scores; None for head_dim**-0.5.

    Returns:
        (batch, regions, tokens, heads, value_dim), of the dtype of query, contiguous. Gradients flow to query, key and
        value, once.

    Raises:
        ValueError: an argument does not fit the above. Regions out of range are found on the CPU; on other devices
            looking for them would wait for the device, whose own indexing checks apply.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv:2303.08810), section 3.2.
    """
    return _OPERATOR(query, key, value, routes, scale)
