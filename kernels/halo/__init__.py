"""Halo attention: blocks of queries attend to their own block and a halo of tokens around it."""

from typing import Optional

from torch import Tensor

from ..dispatch import Operator
from . import reference, tiled
from .check import check_halo_attention
from .examples import EXAMPLES
from .reference import aggregate, halo_attention_scores, halo_attention_weights

__all__ = ["aggregate", "halo_attention", "halo_attention_scores", "halo_attention_weights"]

_OPERATOR = Operator(
    "halo_attention",
    "Tensor query, Tensor key, Tensor value, int block_size, int halo_size, Tensor? relative_height_logits=None, "
    "Tensor? relative_width_logits=None, bool mask_padding=False, float? scale=None",
    differentiable=("query", "key", "value", "relative_height_logits", "relative_width_logits"),
    check=check_halo_attention,
    reference=reference.halo_attention,
    tiled=tiled,
    examples=EXAMPLES,
    keys_per_query=lambda query, key, value, block, halo, *_: (block + 2 * halo) ** 2,
    fused=f"{__name__}.fused",
)


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    halo_size: int,
    *,
    relative_height_logits: Optional[Tensor] = None,
    relative_width_logits: Optional[Tensor] = None,
    mask_padding: bool = False,
    scale: Optional[float] = None,
) -> Tensor:
    """Multi-head attention of the blocks of a 2-D map to windows that reach beyond the block by a halo.

    Source: Vaswani et al., arXiv:2103.12731, section 2.2.

    Args:
        query: (batch, height', width', heads, head_dim), one of float32, bfloat16, float16 and float64, with any
            strides. Its map is that of key, or half of it on both axes (attention that downsamples: a block then has
            block_size / 2 queries per axis).
        key: (batch, height, width, heads, head_dim), of the dtype of query. Height and width are multiples of
            block_size; the caller pads.
        value: (batch, height, width, heads, value_dim), of the dtype of query.
        block_size: tokens of a block per axis.
        halo_size: tokens per axis by which the window of a block reaches beyond it on each side. Each query has
            (block_size + 2 * halo_size) ** 2 keys.
        relative_height_logits, relative_width_logits: (batch, height', width', heads, block_size + 2 * halo_size)
            of any floating dtype, added to the scores of all keys of a row and of a column of the window, unscaled.
        mask_padding: keys outside the map get no weight. Otherwise they are zeros, which take part in the softmax.
        scale: of the scores; None for head_dim**-0.5.

    Returns:
        (batch, height', width', heads, value_dim), of the dtype of query, contiguous. Gradients flow to all tensors,
        once.

    Raises:
        ValueError: an argument does not fit the above.
    """
    return _OPERATOR(
        query, key, value, block_size, halo_size, relative_height_logits, relative_width_logits, mask_padding, scale
    )
