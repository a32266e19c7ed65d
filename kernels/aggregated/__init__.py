"""Aggregated attention: each token attends to its neighbours and to a pooled copy of the whole map."""

from math import prod
from typing import Optional

from torch import Tensor

from ..dispatch import Operator
from . import reference, tiled
from .check import check_aggregated_attention
from .examples import EXAMPLES
from .reference import aggregate, aggregated_attention_scores, aggregated_attention_weights

__all__ = ["aggregate", "aggregated_attention", "aggregated_attention_scores", "aggregated_attention_weights"]

_OPERATOR = Operator(
    "aggregated_attention",
    "Tensor query, Tensor key, Tensor value, Tensor pooled_key, Tensor pooled_value, int window_size=3, "
    "Tensor? local_bias=None, Tensor? pooled_bias=None, Tensor? value_weights=None, float? scale=1.0",
    differentiable=(
        "query",
        "key",
        "value",
        "pooled_key",
        "pooled_value",
        "local_bias",
        "pooled_bias",
        "value_weights",
    ),
    autocast=("query", "key", "value", "pooled_key", "pooled_value"),
    shared=("local_bias", "pooled_bias"),
    check=check_aggregated_attention,
    reference=reference.aggregated_attention,
    tiled=tiled,
    examples=EXAMPLES,
    fused=f"{__name__}.fused",
    keys_per_query=lambda query, key, value, pooled_key, pooled_value, window_size, *_: (
        window_size**2 + prod(pooled_key[1:-2])
    ),
)


def aggregated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    *,
    window_size: int = 3,
    local_bias: Optional[Tensor] = None,
    pooled_bias: Optional[Tensor] = None,
    value_weights: Optional[Tensor] = None,
    scale: Optional[float] = 1,  # of a default 1.0 torch.compile would make a symbol, and compile twice
) -> Tensor:
    """Multi-head attention with one softmax over the neighbours of a token and all pooled tokens.

    Args:
        query, key, value: (batch, height, width, heads, head_dim) of one dtype (float32, bfloat16, float16 or float64)
            with any strides: views of a packed projection are read in place.
        pooled_key, pooled_value: (batch, pooled, heads, head_dim) of the same dtype, with at least one pooled token.
            They may be maps too, (batch, pooled_height, pooled_width, heads, head_dim), in row-major order.
        window_size: odd side of the square of neighbours around each token. Neighbours outside the map are masked.
        local_bias: (heads, window_size**2) of any floating dtype, added to the scores of the neighbours, row by row.
        pooled_bias: (heads, height * width, pooled), or anything that broadcasts to it, of any floating dtype, added to
            the scores of the pooled tokens.
        value_weights: (batch, height, width, heads, window_size**2) of any floating dtype, added to the weights of the
            neighbours after the softmax (the learnable tokens of TransNeXt).
        scale: of the scores; None for head_dim**-0.5. The default leaves it to query, as cosine attention does.

    Returns:
        The shape and dtype of query, contiguous. Gradients flow to every tensor, once.

    Raises:
        ValueError: an argument does not fit the above.

    Source: Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", sections 3.1 to 3.3.
    """
    return _OPERATOR(
        query, key, value, pooled_key, pooled_value, window_size, local_bias, pooled_bias, value_weights, scale
    )
