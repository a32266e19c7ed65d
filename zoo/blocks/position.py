"""Position encodings by depthwise convolution."""

from torch import Tensor, nn


class ConvPositionEncoding(nn.Module):
    """Adds a depthwise convolution of a channels-last map (B, H, W, C) to it, which tells tokens where they are.

    Source: conditional position encodings (Chu et al., arXiv:2102.10882), as DaViT and BiFormer place them.
    """

    def __init__(self, dim: int, kernel_size: int = 3, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
