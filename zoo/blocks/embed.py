"""Stems and downsampling steps: a strided convolution and its norm, from images or between channels-last maps."""

from typing import Callable, Final

from timm.layers import LayerNorm
from timm.models import swin_transformer
from torch import Tensor, nn

from .padding import pad_to_multiple


class ChannelsLastBatchNorm(nn.Module):
    """Batch norm of a channels-last map (B, H, W, dim).

    It holds torch's module, so that what converts or freezes batch norms finds it.

    Args:
        dim: channels.
        eps: added to the variance.

    Shape:
        (B, H, W, dim) to the same.
    """

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # tokens as images of one pixel: of a permuted map compiled graphs mistake the strides of the gradient
        return self.bn(x.flatten(0, 2)[:, :, None, None]).view(x.shape)


class ConvEmbed(nn.Module):
    """Strided convolution with a norm, to a channels-last map.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output.
        kernel_size: of the convolution.
        stride: of the convolution, and the reduction of the map.
        padding: of the convolution.
        bias: whether the convolution has one.
        norm_first: norm the input instead of the output.
        image: the input is an image (B, C, H, W) instead of a map (B, H, W, C).
        multiple: pad the input at the bottom and right to a multiple of this (after ``norm_first``); 1 for none.
        norm_eps: of the norm.
        norm_layer: of channels-last maps: LayerNorm over channels, or :class:`ChannelsLastBatchNorm`.

    Shape:
        (B, in_chans, H, W) or (B, H, W, in_chans) to (B, H', W', out_chans).
    """

    norm_first: Final[bool]
    image: Final[bool]

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        bias: bool = True,
        norm_first: bool = False,
        image: bool = False,
        multiple: int = 1,
        norm_eps: float = 1e-5,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm_first = norm_first
        self.image = image
        self.multiple = [multiple, multiple]
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding, bias=bias, **dd)
        self.norm = norm_layer(in_chans if norm_first else out_chans, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.image:
            x = x.permute(0, 2, 3, 1)
        if self.norm_first:
            x = self.norm(x)
        x = pad_to_multiple(x, self.multiple)
        # the permuted view has channels-last strides, which convolutions take and return without a copy
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x if self.norm_first else self.norm(x)


class PatchMerging(swin_transformer.PatchMerging):
    """Swin's downsampling, 2 x 2 tokens to one, of a map of any size; timm's cannot be exported so.

    Arguments are those of timm's, ``(dim, out_dim)``.

    Shape:
        (B, H, W, dim) to (B, ceil(H / 2), ceil(W / 2), out_dim).

    Source:
        Liu et al., arXiv:2103.14030, section 3.1.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, [2, 2])
        x = x.unflatten(1, [-1, 2]).unflatten(3, [-1, 2])  # (B, H / 2, 2, W / 2, 2, dim)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))
