"""Feed-forward networks of channels-last maps that look at neighbouring tokens."""

import math

import torch
from torch import Tensor, nn

from .activation import gelu


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3 x 3 convolution of a map (B, C, H, W), initialised for the outputs that it feeds."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        # He's normal initialisation; an input of a depthwise kernel feeds nine outputs
        nn.init.normal_(self.weight, std=math.sqrt(2 / 9))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DepthwiseMlp(nn.Module):
    """MLP with a depthwise 3 x 3 convolution before its activation.

    Args:
        dim: channels of the map.
        hidden_dim: channels between the two linear layers.
        drop: dropout after the activation and after the output.

    Shape:
        (B, H, W, dim) to the same.

    Source:
        PVT v2 (Wang et al., arXiv:2106.13797), section 3.2.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(gelu(x))))


class ConvGluMlp(nn.Module):
    """Gated linear unit whose gate passes through a depthwise convolution, ``fc2(gelu(dwconv(a)) * b)``.

    Args:
        dim: channels of the map.
        hidden_dim: channels of the gate and of what it gates.
        drop: dropout after the gate and after the output.

    Shape:
        (B, H, W, dim) to the same.

    Source:
        Convolutional GLU of TransNeXt (Shi, arXiv:2311.17132, section 3.4).
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = torch.chunk(self.fc1(x), 2, dim=-1)
        x = gelu(self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)) * x
        return self.drop(self.fc2(self.drop(x)))
