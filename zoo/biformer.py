"""BiFormer: attention between regions of the map that find each other by their averages.

Paper: BiFormer: Vision Transformer with Bi-Level Routing Attention (arXiv:2303.08810). Official code:
rayleizhu/BiFormer (MIT).
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Optional, Union

from timm.layers import ClassifierHead, ConvNormAct
from torch import nn

from ..checkpoints.keys.biformer import LAYOUTS
from ..checkpoints.released.biformer import RELEASED
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn, drop_path_rates
from .blocks.attention import GlobalAttention, PackedAttention
from .blocks.embed import ChannelsLastBatchNorm, ConvEmbed
from .blocks.routed import ProjectedRoutedAttention, RoutedAttention
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["BiFormer", "checkpoint_filter_fn"]


class BiFormer(Backbone):
    """BiFormer, and its ablation network in the layout of Swin-T.

    Args:
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        topks: regions that each region attends to, by stage; None for attention to the whole map, with 8 heads.
        grid: regions down and across in the stages with routing, or one number for both (16 in the official detectors,
            8 in segmentation).
        head_dim: channels of a head in the stages with routing.
        mlp_ratio: hidden width of the MLP as a multiple of its input.
        swin_layout: patchify stem, merging without overlap, and no position encoding before the attention.
        pad_projected: the refactored form, which pads maps after the projection (and is the same where nothing is to
            be padded), and enhances the last stage by its values instead of its inputs.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        topks: Sequence[Optional[int]] = (1, 4, 16, None),
        grid: Union[int, Sequence[int]] = 7,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        swin_layout: bool = False,
        pad_projected: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.swin_layout = swin_layout
        check_per_stage(embed_dims=embed_dims, depths=depths, topks=topks)
        drop_paths = drop_path_rates(drop_path_rate, depths)
        routed = ProjectedRoutedAttention if pad_projected else RoutedAttention

        def attention(stage: int) -> PackedAttention:
            dim, topk = embed_dims[stage], topks[stage]
            if topk is not None and dim % head_dim:
                raise ValueError(f"head_dim={head_dim} must divide every width of a routed stage; {embed_dims=}")
            options = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **dd}
            if topk is None:
                encoding = "values" if pad_projected else "input"
                return GlobalAttention(dim, 8, local_encoding=encoding, qkv_bias=False, **options)
            return routed(dim, dim // head_dim, grid=grid, topk=topk, **options)

        def block(stage: int, index: int) -> TransformerBlock:
            return TransformerBlock(
                embed_dims[stage],
                attention(stage),
                mlp_ratio=mlp_ratio,
                position_encodings=0 if swin_layout else 1,
                proj_drop=proj_drop_rate,
                drop_path=drop_paths[stage][index],
                norm_eps=1e-6,
                **dd,
            )

        downsample = _patch_merging if swin_layout else _conv_downsample
        stages = [
            Stage(
                [block(stage, index) for index in range(depth)],
                downsample(embed_dims[stage - 1], embed_dims[stage], **dd) if stage else None,
            )
            for stage, depth in enumerate(depths)
        ]
        super().__init__(
            stem=(_patch_stem if swin_layout else _conv_stem)(in_chans, embed_dims[0], **dd),
            stages=stages,
            norm=ChannelsLastBatchNorm(embed_dims[-1], **dd),
            head=ClassifierHead(
                embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
            ),
            widths=embed_dims,
            reductions=[4 * 2**stage for stage in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    def smallest_example(self) -> int:
        smallest = super().smallest_example()
        # the swin-like form leaves out what its merging does not divide
        return 2 * (smallest - 1) if self.swin_layout else smallest


_embed = partial(ConvEmbed, norm_layer=ChannelsLastBatchNorm)
_conv_downsample = partial(_embed, kernel_size=3, stride=2, padding=1)
_patch_stem = partial(_embed, kernel_size=4, stride=4, image=True)
_patch_merging = partial(_embed, kernel_size=2, stride=2, norm_first=True)


def _conv_stem(in_chans: int, embed_dim: int, device=None, dtype=None) -> nn.Module:
    """Two overlapping convolutions of stride 2."""
    dd = {"device": device, "dtype": dtype}
    first = ConvNormAct(in_chans, embed_dim // 2, 3, stride=2, bias=True, act_layer=nn.GELU, **dd)
    return nn.Sequential(OrderedDict(conv1=first, embed=_conv_downsample(embed_dim // 2, embed_dim, image=True, **dd)))


def _variant(embed_dim: int, depths: Sequence[int], cfg: Optional[dict[str, Any]] = None, **kwargs) -> Variant:
    args = {"embed_dims": tuple(embed_dim * 2**stage for stage in range(4)), "depths": depths, **kwargs}
    first_conv = "stem.conv" if kwargs.get("swin_layout") else "stem.conv1.conv"
    return Variant(args, {"first_conv": first_conv, **(cfg or {})})


_swin_tiny = partial(_variant, 96, (2, 2, 6, 2), mlp_ratio=4.0, swin_layout=True)
_PICO_CFG = {"input_size": (3, 32, 32), "pool_size": (1, 1), "crop_pct": 1.0}

VARIANTS = {
    "biformer_pico": _variant(32, (1, 1, 2, 1), _PICO_CFG, grid=2, topks=(1, 2, 4, None)),
    "biformer_tiny": _variant(64, (2, 2, 8, 2)),
    "biformer_small": _variant(64, (4, 4, 18, 4)),
    "biformer_base": _variant(96, (4, 4, 18, 4)),
    "biformer_stl": _swin_tiny(),
    "biformer_stl_nchw": _swin_tiny(pad_projected=True),
}

default_cfgs = default_cfgs_of(VARIANTS, RELEASED, license="mit")

register_variants(__name__, VARIANTS, partial(build_backbone, BiFormer))
