"""Neighborhood attention: each token attends to the window of tokens around it."""

from collections.abc import Sequence
from math import prod
from typing import Optional, Union

from torch import Tensor

from ..checks import per_axis
from ..dispatch import Operator
from ..packed import PackedOperator
from . import reference, tiled
from .check import check_neighborhood_attention
from .examples import EXAMPLES
from .reference import aggregate, neighborhood_attention_scores, neighborhood_attention_weights

__all__ = [
    "aggregate",
    "neighborhood_attention",
    "neighborhood_attention_packed",
    "neighborhood_attention_scores",
    "neighborhood_attention_weights",
]

_OPERATOR = Operator(
    "neighborhood_attention",
    # SymInt: the kernel may be the size of the map, which is symbolic in an exported graph.
    "Tensor query, Tensor key, Tensor value, SymInt[] kernel_size, int[] stride=[1], int[] dilation=[1], "
    "bool[] is_causal=[False], Tensor? relative_position_bias=None, float? scale=None",
    differentiable=("query", "key", "value", "relative_position_bias"),
    shared=("relative_position_bias",),
    check=check_neighborhood_attention,
    reference=reference.neighborhood_attention,
    tiled=tiled,
    examples=EXAMPLES,
    fused=f"{__name__}.fused",
    keys_per_query=lambda query, key, value, kernel_size, *_: prod(
        per_axis("kernel_size", kernel_size, len(query) - 3)
    ),
)
_PACKED = PackedOperator(_OPERATOR)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Union[int, Sequence[int]],
    *,
    stride: Union[int, Sequence[int]] = 1,
    dilation: Union[int, Sequence[int]] = 1,
    is_causal: Union[bool, Sequence[bool]] = False,
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """Multi-head attention of each token to its nearest tokens (NA, DiNA, strided and causal NA).

    Every option is one number for all axes, or one per axis. Along an axis, tokens `dilation` apart form a group and
    attention stays inside it. A window holds the `kernel_size` tokens of the group around its query, `kernel_size // 2`
    of them before it; at the ends of the group it is shifted inwards and never shrinks. Windows of several axes combine
    to their product.

    Args:
        query, key, value: (batch, *spatial, heads, head_dim) with one to three spatial axes, of one dtype (float32,
            bfloat16, float16 or float64) with any strides: views of a packed projection are read in place.
        kernel_size: tokens of a window, from 1 to size // dilation. A window of the size of the map is plain attention.
        stride: so many neighbouring queries of a group share the window of the middle one, from 1 (each has its own) to
            kernel_size (the windows of `window_attention` where they divide the map).
        dilation: distance of neighbouring tokens of a window.
        is_causal: along this axis a window ends at its query; near the start of the group it holds fewer tokens. With
            a stride it follows the last of the queries that share it, and each sees the tokens up to itself.
        relative_position_bias: (heads, 2 * kernel_size - 1 per axis) of any floating dtype, added to the scores at
            [(key - query) / dilation + kernel_size - 1].
        scale: of the scores; None for head_dim**-0.5.

    Returns:
        The shape and dtype of query, contiguous. Gradients flow to query, key, value and the bias, once.

    Raises:
        ValueError: an argument does not fit the above.

    Sources: Hassani et al., "Neighborhood Attention Transformer", section 3.1; Hassani and Shi, "Dilated Neighborhood
    Attention Transformer", section 3.2; Hassani et al., "Generalized Neighborhood Attention", section 3.
    """
    return _OPERATOR(query, key, value, kernel_size, stride, dilation, is_causal, relative_position_bias, scale)


def neighborhood_attention_packed(
    packed: Tensor,
    kernel_size: Union[int, Sequence[int]],
    *,
    stride: Union[int, Sequence[int]] = 1,
    dilation: Union[int, Sequence[int]] = 1,
    is_causal: Union[bool, Sequence[bool]] = False,
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """:func:`neighborhood_attention` of ``packed.unbind(-3)``, whose backward writes the gradient without a copy.

    Args:
        packed: (batch, *spatial, 3, heads, head_dim), query, key and value in this order.
        kernel_size, stride, dilation, is_causal, relative_position_bias, scale: see :func:`neighborhood_attention`.

    Returns:
        (batch, *spatial, heads, head_dim).

    Raises:
        ValueError: an argument does not fit.
    """
    return _PACKED(packed, kernel_size, stride, dilation, is_causal, relative_position_bias, scale)
