"""Attention between channels as a module."""

from torch import Tensor, nn

from .base import check_heads


class ChannelAttention(nn.Module):
    """Attention between the channels of a group, over all positions: the features are the tokens.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of channel groups.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.

    Source:
        arXiv:2204.03645, section 3.2. The weights are softmax(k^T v) and act on the queries, scaled by the group's
        width as the released code has it, not by the number of positions.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        super().__init__()
        check_heads(num_heads, dim=dim)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (key.transpose(-2, -1) @ value * self.scale).softmax(dim=-1)
        x = query @ weights.transpose(-2, -1)
        return self.proj(x.transpose(1, 2).reshape(batch, height, width, channels))
