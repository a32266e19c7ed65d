"""GELU that overwrites its input where no gradient will ask for it: inference spares a map as large as an MLP's."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F


@register_notrace_function
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU of a tensor that nothing else reads; ``approximate`` as for ``torch.nn.functional.gelu``.

    On a CPU the pages of a fresh result cost more than the function: in place it takes half of the time.
    """
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # torch.jit.trace compares graphs with and without gradients
        return F.gelu(x, approximate=approximate)
    return torch.ops.aten.gelu_(x, approximate=approximate)


class GELU(nn.Module):
    """:func:`gelu` as a layer; ``inplace`` is there because timm's layers pass it, and changes nothing."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class GELUTanh(GELU):
    """GELU by its approximation with tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, approximate="tanh")
