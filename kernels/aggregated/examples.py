"""Example arguments of aggregated attention; see :mod:`..examples`."""

from typing import Optional

import torch

from ..examples import Example, Examples, Operand, map_for_compilation, tokens_of_one_projection

WINDOW_SIZE = 3
"""The window of TransNeXt."""
POOLED = 49
"""Pooled tokens of TransNeXt at 224 pixels, 7 x 7."""


def example(
    *shape: int,
    pooled: int = POOLED,
    window_size: int = WINDOW_SIZE,
    bias_dtype: Optional[torch.dtype] = None,
    value_weights: bool = False,
    scale: Optional[float] = 1,
) -> Example:
    """Args: shape: (batch, height, width, heads, head_dim); bias_dtype: None for that of the call."""
    batch, height, width, heads, head_dim = shape
    pooled_tokens = Operand((batch, pooled, heads, head_dim), part_of="pooled")
    weights = Operand((*shape[:-1], window_size**2)) if value_weights else None
    return Example(
        {
            **tokens_of_one_projection(shape),
            "pooled_key": pooled_tokens,
            "pooled_value": pooled_tokens,
            "window_size": window_size,
            "local_bias": Operand((heads, window_size**2), bias_dtype),
            "pooled_bias": Operand((heads, height * width, pooled), bias_dtype),
            "value_weights": weights,
            "scale": scale,
        }
    )


EXAMPLES = Examples(
    small={
        "every argument": example(2, 3, 4, 2, 3, pooled=2, value_weights=True, scale=0.7),
        "neighbours": example(2, 8, 8, 2, 8, pooled=4),
    },
    stage=example,
    shapes={
        "gpu": [(128, 56, 56, 3, 24), (128, 28, 28, 6, 24), (128, 14, 14, 12, 24)],
        "full": [(8, 56, 56, 3, 24), (8, 28, 28, 6, 24), (8, 14, 14, 12, 24)],
        "small": [(1, 14, 14, 2, 24)],
    },
    compile=lambda window, rank, head_dim: example(
        *map_for_compilation(window, rank, head_dim),
        window_size=window,
        bias_dtype=torch.float32,
        value_weights=True,
        scale=1.0,
    ),
    compiled=[(3, 2)],
)
"""The stages are those of TransNeXt-Tiny."""
