"""Example arguments of gated positional attention; see :mod:`..examples`."""

from math import prod
from typing import Optional

import torch

from ..examples import Example, Examples, Operand, tokens_of_one_projection


def example(*shape: int, scale: Optional[float] = None) -> Example:
    """Args: shape: (batch, *spatial, heads, head_dim)."""
    tokens, heads = prod(shape[1:-2]), shape[-2]
    position_scores, gate = Operand((heads, tokens, tokens)), Operand((heads,), torch.float32)
    return Example(
        {**tokens_of_one_projection(shape), "position_scores": position_scores, "gate": gate, "scale": scale}
    )


EXAMPLES = Examples(
    small={
        "every argument": example(2, 2, 3, 2, 3, scale=0.7),
        "map": example(2, 8, 8, 2, 8),
    },
    stage=example,
    shapes={
        "gpu": [(128, 196, 4, 48)],
        "full": [(8, 196, 4, 48)],
        "small": [(1, 196, 4, 48)],
    },
)
"""The stage is that of ConViT-Tiny."""
