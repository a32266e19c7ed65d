"""Regions in the two forms that the operator takes.

A list of regions is (batch, regions, tokens, heads, channels). A divided map is (batch, rows, y, columns, x, heads,
channels): a map with both axes unflattened, so that tokens lie where they lie in the map. Regions are counted row by
row, and so are the tokens of a region.
"""

import math
from typing import Sequence

from torch import Tensor

LIST_AXES = 5


def count_tokens(shape: Sequence[int]) -> int:
    """Tokens of a region, of tensors with channels."""
    return math.prod(shape[2:-2:2])


def as_list(tokens: Tensor) -> Tensor:
    """Regions in either form as a list; a divided map is copied with heads first in memory, as tiled reads them."""
    if tokens.ndim == LIST_AXES:
        return tokens
    by_head = tokens.permute(0, 5, 1, 3, 2, 4, 6)  # (batch, heads, rows, columns, y, x, channels)
    return by_head.flatten(4, 5).flatten(2, 3).permute(0, 2, 3, 1, 4)


def in_form_of(like: Tensor, regions: Tensor) -> Tensor:
    """A list of regions (batch, regions, tokens, heads, ...) as a view in the form of `like`, which has channels."""
    if like.ndim == LIST_AXES:
        return regions
    _, rows, height, columns, width, *_ = like.shape
    return regions.unflatten(2, (height, width)).unflatten(1, (rows, columns)).transpose(2, 3)
