"""The argument check of gated positional attention; see :mod:`..checks`."""

import math
from typing import Optional

from torch import Tensor

from ..checks import check_attention_inputs, check_device, check_floating, check_scale, check_shape


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
