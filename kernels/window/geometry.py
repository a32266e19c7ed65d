"""Where the tokens of a window lie, for both implementations in PyTorch."""

from typing import Sequence

import torch
from torch import Tensor


def bias_index(window: Sequence[int], device: torch.device) -> Tensor:
    """Position in the flattened bias table of each (query, key) pair of a window, (tokens, tokens).

    Per axis the table is read at key - query + window - 1.
    """
    rows, columns = (_offsets(size, device) + size - 1 for size in window)
    index = rows[:, None, :, None] * (2 * window[1] - 1) + columns[None, :, None, :]
    return index.reshape(window[0] * window[1], window[0] * window[1])


def _offsets(size: int, device: torch.device) -> Tensor:
    position = torch.arange(size, device=device)
    return position[None, :] - position[:, None]


def sum_by_offset(of_pairs: Tensor, window: Sequence[int]) -> Tensor:
    """Sum (heads, tokens, tokens) over the pairs of a window that read the same entry of the bias table.

    Returns:
        (heads, 2 * window - 1 per axis). As a product with zeros and ones the sum has a fixed order on every device.
    """
    pairs = of_pairs.double().unflatten(2, tuple(window)).unflatten(1, tuple(window))
    pairs = pairs.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (heads, pairs of rows, pairs of columns)
    rows, columns = (_offset_matrix(size, pairs.device) for size in window)
    return rows.t() @ pairs @ columns


def _offset_matrix(size: int, device: torch.device) -> Tensor:
    """One where a pair of tokens of one axis has an offset, (pairs, offsets)."""
    offsets = torch.arange(1 - size, size, device=device)
    return (_offsets(size, device).flatten()[:, None] == offsets).double()
