"""Window attention: each token attends to the tokens of its own window."""

from typing import Optional, Sequence, Union

from torch import Tensor

from ..dispatch import Operator
from ..packed import PackedOperator
from . import reference, tiled
from .check import check_window_attention
from .examples import EXAMPLES
from .reference import aggregate, window_attention_scores, window_attention_weights

__all__ = [
    "aggregate",
    "window_attention",
    "window_attention_packed",
    "window_attention_scores",
    "window_attention_weights",
]

_OPERATOR = Operator(
    "window_attention",
    "Tensor query, Tensor key, Tensor value, int[] window_size, str partition='block', int[] shift=[0], "
    "Tensor? relative_position_bias=None, float? scale=None",
    differentiable=("query", "key", "value", "relative_position_bias"),
    shared=("relative_position_bias",),
    check=check_window_attention,
    reference=reference.window_attention,
    tiled=tiled,
    examples=EXAMPLES,
    fused=f"{__name__}.fused",
    keys_per_query=lambda query, key, value, window_size, *_: window_size[0] * window_size[-1],
)
_PACKED = PackedOperator(_OPERATOR)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Union[int, Sequence[int]],
    *,
    partition: str = "block",
    shift: Union[int, Sequence[int]] = 0,
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """Multi-head attention inside the windows of a 2-D map.

    Args:
        query, key, value: (batch, height, width, heads, head_dim) of one dtype (float32, bfloat16, float16 or float64)
            with any strides: views of a packed projection are read in place. Height and width are multiples of the
            window; the caller pads.
        window_size: tokens of a window along (height, width), or one number for both.
        partition: "block" for windows of adjacent tokens; "grid" for windows of tokens that lie height / window and
            width / window apart (MaxViT, section 3.2).
        shift: cyclic shift of the block windows towards the lower right by this many tokens, per axis or one number
            for both, less than the window. Tokens that the shift would join across the border of the map do not see
            each other (Swin Transformer, section 3.2). On an axis that one window covers there is no shift, whatever
            this says, so that one setting serves every map size.
        relative_position_bias: (heads, 2 * window_height - 1, 2 * window_width - 1) of any floating dtype, added to the
            scores at [key - query + window - 1].
        scale: of the scores; None for head_dim**-0.5.

    Returns:
        The shape and dtype of query, contiguous. Gradients flow to query, key, value and the bias, once.

    Raises:
        ValueError: an argument does not fit the above.
    """
    return _OPERATOR(query, key, value, window_size, partition, shift, relative_position_bias, scale)


def window_attention_packed(
    packed: Tensor,
    window_size: Union[int, Sequence[int]],
    *,
    partition: str = "block",
    shift: Union[int, Sequence[int]] = 0,
    relative_position_bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """:func:`window_attention` of ``packed.unbind(3)``, whose backward writes the gradient of `packed` without a copy.

    Args:
        packed: (batch, height, width, 3, heads, head_dim), query, key and value in this order.
        window_size, partition, shift, relative_position_bias, scale: see :func:`window_attention`.

    Returns:
        (batch, height, width, heads, head_dim).

    Raises:
        ValueError: an argument does not fit.
    """
    return _PACKED(packed, window_size, partition, shift, relative_position_bias, scale)
