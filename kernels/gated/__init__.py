"""Gated positional attention: each head mixes attention by content with attention by position."""

from math import prod
from typing import Optional

from torch import Tensor

from ..dispatch import Operator
from . import reference, tiled
from .check import check_gated_positional_attention
from .examples import EXAMPLES
from .reference import aggregate, gated_positional_attention_scores, gated_positional_attention_weights

__all__ = [
    "aggregate",
    "gated_positional_attention",
    "gated_positional_attention_scores",
    "gated_positional_attention_weights",
]

_OPERATOR = Operator(
    "gated_positional_attention",
    "Tensor query, Tensor key, Tensor value, Tensor position_scores, Tensor gate, float? scale=None",
    differentiable=("query", "key", "value", "position_scores", "gate"),
    shared=("position_scores", "gate"),
    check=check_gated_positional_attention,
    reference=reference.gated_positional_attention,
    tiled=tiled,
    examples=EXAMPLES,
    keys_per_query=lambda query, *_: prod(query[1:-2]),
)


def gated_positional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_scores: Tensor,
    gate: Tensor,
    *,
    scale: Optional[float] = None,
) -> Tensor:
    """Multi-head attention of all tokens to all tokens, ``(1 - g) softmax(q k) v + g softmax(position_scores) v``.

    Args:
        query, key, value: (batch, *spatial, heads, head_dim) with 1, 2 or 3 spatial axes, of one dtype (float32,
            bfloat16, float16 or float64) with any strides, such as views of a packed projection.
        position_scores: (heads, tokens, tokens) of any floating dtype, row by row: how much each query cares for each
            key because of where they lie.
        gate: (heads,) of any floating dtype; ``g = sigmoid(gate)`` is how much position counts in a head.
        scale: of the scores of content; None for head_dim**-0.5.

    Returns:
        The shape and dtype of query, contiguous. Gradients flow to every tensor, once.

    Raises:
        ValueError: an argument does not fit the above.

    Source: d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", equation
        7. Both softmaxes sum to one, so the normalisation of their mixture that the equation has is the identity.
    """
    return _OPERATOR(query, key, value, position_scores, gate, scale)
