"""Necks for backbones whose maps are not those of a four-stage pyramid with strides 4 to 32."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, xavier_init
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

EXTRA_LEVELS = ("pool", "conv")


@MODELS.register_module()
class ExtendedFPN(BaseModule):
    """Feature pyramid network that also goes to finer maps than the backbone has, by transposed convolutions.

    SHViT's detectors use it: three maps of strides 16, 32, 64 become five of strides 4 to 64 (``num_finer`` 2) or of
    8 to 128 (``num_finer`` 1).

    Args:
        in_channels: of each map of the backbone.
        out_channels: of every map returned.
        num_outs: number of maps returned.
        num_finer: how many of them are finer than the backbone's first.
        extra_levels: how coarser ones are made: "pool" from the coarsest output, "conv" from the backbone's last map.
        init_cfg: as for every module of MMEngine.

    Raises:
        ValueError: fewer outputs than maps, or another kind of extra level.

    Source:
        arXiv:1612.03144; the transposed convolutions are those of LightViT's and EfficientViT's detectors.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        num_finer: int = 0,
        extra_levels: str = "pool",
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_coarser = num_outs - len(in_channels) - num_finer
        if self.num_coarser < 0:
            raise ValueError(f"num_outs={num_outs} is less than {len(in_channels)} maps and num_finer={num_finer}")
        if extra_levels not in EXTRA_LEVELS:
            raise ValueError(f"extra_levels={extra_levels!r} must be one of {', '.join(EXTRA_LEVELS)}")
        self.lateral_convs = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        self.finer_convs = nn.ModuleList(nn.ConvTranspose2d(out_channels, out_channels, 2, 2) for _ in range(num_finer))
        count = len(in_channels) + num_finer
        self.output_convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(count))
        widths = [in_channels[-1]] + [out_channels] * (self.num_coarser - 1)
        self.coarser_convs = nn.ModuleList(
            nn.Conv2d(width, out_channels, 3, stride=2, padding=1)
            for width in (widths[: self.num_coarser] if extra_levels == "conv" else [])
        )

    def init_weights(self) -> None:
        """Xavier initialisation of the convolutions, as MMDetection's FPN has it."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                xavier_init(module, distribution="uniform")

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for level in range(len(maps) - 1, 0, -1):
            maps[level - 1] = maps[level - 1] + F.interpolate(maps[level], size=maps[level - 1].shape[2:])
        for conv in self.finer_convs:
            maps.insert(0, conv(maps[0]))
        outputs = [conv(x) for conv, x in zip(self.output_convs, maps, strict=True)]
        coarsest = inputs[-1]
        for conv in self.coarser_convs:
            coarsest = conv(coarsest)
            outputs.append(coarsest)
        if not self.coarser_convs:
            outputs += self._pooled(outputs[-1])
        return tuple(outputs)

    def _pooled(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, :: 2**step, :: 2**step] for step in range(1, self.num_coarser + 1)]


@MODELS.register_module()
class RescaledPyramid(BaseModule):
    """A pyramid from maps of one stride: isotropic networks before an FPN or UPerNet head.

    Args:
        channels: of every map.
        scales: factor by which each map is resized: a power of two.
        init_cfg: as for every module of MMEngine.

    Source:
        the resizing of arXiv:2106.08254 (BEiT), with layer norm as in arXiv:2203.16527 (ViTDet).
    """

    def __init__(self, channels: int, scales: Sequence[float] = (4, 2, 1, 0.5), init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.resizes = nn.ModuleList(_resize(channels, scale) for scale in scales)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(resize(x) for resize, x in zip(self.resizes, inputs, strict=True))


def _resize(channels: int, scale: float) -> nn.Module:
    steps = torch.tensor(float(scale)).log2().item()
    if steps != int(steps):
        raise ValueError(f"scale {scale} must be a power of two, such as 4, 2, 1 or 0.5")
    if steps <= 0:
        factor = 2 ** int(-steps)
        return nn.MaxPool2d(factor, factor, ceil_mode=True) if factor > 1 else nn.Identity()
    layers: list[nn.Module] = []
    for step in range(int(steps)):
        layers += [LayerNorm2d(channels), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(channels, channels, 2, 2))
    return nn.Sequential(*layers)
