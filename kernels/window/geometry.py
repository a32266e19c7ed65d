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
