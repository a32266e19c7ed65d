"""LITv2: convolutional MLPs in the early stages, HiLo attention in the late ones, deformable token merging between.

Paper: Fast Vision Transformers with HiLo Attention (arXiv:2205.13213); deformable token merging: Less is More: Pay
Less Attention in Vision Transformers (arXiv:2105.14217). Official code: ziplab/LITv2 (Apache-2.0).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional, Tuple

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm, register_notrace_function
from torch import Tensor, nn

from ..checkpoints.keys.litv2 import LAYOUTS
from ..checkpoints.released.litv2 import RELEASED
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn, drop_path_rates
from .blocks.activation import GELU
from .blocks.deformable import deform_conv2d
from .blocks.deformable_formula import deformable_convolution
from .blocks.embed import ConvEmbed
from .blocks.hilo import HiLoAttention
from .blocks.mlp import DepthwiseMlp
from .blocks.tracing import takes_formula
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["LITv2", "checkpoint_filter_fn"]


class LITBlock(nn.Module):
    """Attention, if any, and an MLP with a depthwise convolution, pre-norm and residual, on maps (B, H, W, dim)."""

    def __init__(
        self,
        dim: int,
        attn: Optional[nn.Module],
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd,
    ) -> None:
        super().__init__()
        self.norm1 = None if attn is None else LayerNorm(dim, eps=1e-5, **dd)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OffsetConv(nn.Conv2d):
    """Predicts where a deformable 2 x 2 convolution samples: (dy, dx) of each tap, none at first."""

    def __init__(self, in_chans: int, **dd) -> None:
        super().__init__(in_chans, 8, 2, 2, **dd)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DeformableConv(nn.Module):
    """Deformable 2 x 2 convolution of stride 2, of a map (B, in_chans, H, W) and the offsets of its taps.

    Not a ``Conv2d``, so that what wraps or quantizes those leaves it alone: they know no offsets.
    """

    def __init__(self, in_chans: int, out_chans: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_chans, in_chans, 2, 2, **dd))
        self.bias = nn.Parameter(torch.empty(out_chans, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # as every convolution of torch begins
        bound = (4 * self.weight.shape[1]) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return sample_and_merge(x, offset, self.weight, self.bias)


class DeformableMerging(nn.Module):
    """Merges 2 x 2 tokens that lie where the image has them, not on the grid; an odd last row or column is left out.

    Shape:
        (B, H, W, in_chans) to (B, H // 2, W // 2, out_chans).

    Source:
        arXiv:2105.14217, section 3.3.
    """

    def __init__(self, in_chans: int, out_chans: int, **dd) -> None:
        super().__init__()
        self.offset = OffsetConv(in_chans, **dd)
        self.conv = DeformableConv(in_chans, out_chans, **dd)
        self.norm = nn.BatchNorm2d(out_chans, **dd)
        self.act = GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x = self.conv(x, self.offset(x))
        return self.act(self.norm(x)).permute(0, 2, 3, 1).contiguous()


@register_notrace_function
def sample_and_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Deformable 2 x 2 convolution of stride 2, at least in float32: a position in a map needs more than bfloat16's
    eight bits, and torchvision has no bfloat16 on the CPU."""
    dtype = x.dtype
    if dtype != torch.float64:
        x, offset, weight = x.float(), offset.float(), weight.float()
        bias = None if bias is None else bias.float()
    if takes_formula(x, offset, weight, bias):
        return deformable_convolution(x, offset, weight, bias, (2, 2)).to(dtype)
    return deform_conv2d(x, offset, weight, bias, stride=(2, 2)).to(dtype)


class LITv2(Backbone):
    """LITv2.

    Args:
        embed_dim: channels of the first stage; they double with each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_sizes: windows of HiLo attention in each stage: 0 for no attention at all, 1 for plain attention.
        alpha: share of the heads that are low-frequency, where there are windows.
        mlp_ratio: hidden width of the MLP as a multiple of its input.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS
    legacy_onnx = "nothing"  # it has no deformable convolution

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_per_stage(depths=depths, num_heads=num_heads, window_sizes=window_sizes)
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        drop_paths = drop_path_rates(drop_path_rate, depths)
        hilo: Callable[..., nn.Module] = partial(
            HiLoAttention, alpha=alpha, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd
        )

        def block(stage: int, index: int) -> LITBlock:
            dim, window_size = widths[stage], window_sizes[stage]
            attn = hilo(dim, num_heads[stage], window_size) if window_size else None
            return LITBlock(dim, attn, mlp_ratio, proj_drop_rate, drop_paths[stage][index], **dd)

        stages = [
            Stage(
                [block(stage, index) for index in range(depth)],
                DeformableMerging(widths[stage - 1], widths[stage], **dd) if stage else None,
            )
            for stage, depth in enumerate(depths)
        ]
        super().__init__(
            stem=ConvEmbed(in_chans, embed_dim, 4, 4, image=True, multiple=4, **dd),
            stages=stages,
            norm=LayerNorm(widths[-1], eps=1e-5, **dd),
            head=ClassifierHead(
                widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
            ),
            widths=widths,
            reductions=[4 * 2**stage for stage in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    def smallest_example(self) -> int:
        return 2 * (super().smallest_example() - 1)  # merging leaves out what it does not divide

    @torch.jit.ignore
    def learning_rate_scales(self) -> dict[str, float]:
        """A hundredth for the weights that place the samples of deformable merging; their biases learn as all do."""
        return {f"{name}.weight": 0.01 for name, module in self.named_modules() if isinstance(module, OffsetConv)}


def _variant(embed_dim: int, depths: Tuple[int, ...], args: Optional[dict] = None, **cfg) -> Variant:
    heads = tuple(embed_dim // 32 * 2**stage for stage in range(len(depths)))
    return Variant({"embed_dim": embed_dim, "depths": depths, "num_heads": heads, **(args or {})}, cfg)


VARIANTS = {
    "litv2_pico": _variant(32, (1, 1, 2, 1), {"alpha": 0.5}, input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
    "litv2_small": _variant(96, (2, 2, 6, 2)),
    "litv2_medium": _variant(96, (2, 2, 18, 2)),
    "litv2_base": _variant(128, (2, 2, 18, 2)),
}

default_cfgs = default_cfgs_of(VARIANTS, RELEASED, first_conv="stem.conv")

register_variants(__name__, VARIANTS, partial(build_backbone, LITv2))
