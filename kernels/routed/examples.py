"""Example arguments of routed attention; see :mod:`..examples`."""

from math import prod
from typing import Optional

from ..examples import Example, Examples, Routes, tokens_of_one_projection

REGIONS = 7
"""Regions of a map of BiFormer along each axis."""
ROUTES = 4
"""Regions that a region is routed to in its second stage."""


def example(*shape: int, scale: Optional[float] = None) -> Example:
    """Args: shape: (batch, regions, tokens, heads, head_dim, k), or a map of regions in the place of the list."""
    batch, *spatial, _, _, k = shape
    regions = prod(spatial[::2])
    return Example({**tokens_of_one_projection(shape[:-1]), "routes": Routes((batch, regions, k)), "scale": scale})


EXAMPLES = Examples(
    small={
        "every argument": example(2, 4, 2, 2, 3, 2, scale=0.7),
        "regions": example(2, 8, 8, 2, 8, 2),
    },
    stage=example,
    shapes={
        "gpu": [(128, 49, 64, 2, 32, 1), (128, 49, 16, 4, 32, 4), (128, 49, 4, 8, 32, 16)],
        "full": [(8, 49, 64, 2, 32, 1), (8, 49, 16, 4, 32, 4), (8, 49, 4, 8, 32, 16)],
        "small": [(1, 9, 4, 2, 16, 4)],
    },
    compile=lambda window, rank, head_dim: example(8, REGIONS, window, REGIONS, window, 4, head_dim, ROUTES),
    compiled=[(8, 2), (2, 2)],
)
"""The stages are those of BiFormer."""
