"""NAT, DiNAT and their relatives: neighborhood attention in a convolutional, a Swin-like and an isotropic pyramid.

Papers: Neighborhood Attention Transformer (arXiv:2204.07143), Dilated Neighborhood Attention Transformer
(arXiv:2209.15001). Official code: SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional, Union

from timm.layers import (
    ClassifierHead,
    LayerNorm,
    calculate_drop_path_rates,
    resize_rel_pos_bias_table_simple,
    to_2tuple,
)
from torch import Tensor, nn

from ..checkpoints.keys.nat import LAYOUTS
from ..checkpoints.released.nat import RELEASED
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn, drop_path_rates
from .blocks.attention import GlobalAttention, NeighborhoodAttention
from .blocks.embed import ConvEmbed, PatchMerging
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["IsotropicNeighborhoodTransformer", "NeighborhoodTransformer", "checkpoint_filter_fn"]


class NeighborhoodTransformer(Backbone):
    """NAT, DiNAT and DiNAT_s.

    Args:
        embed_dim: channels of the first stage; they double with each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        kernel_size: neighbours per axis.
        dilations: dilation of the odd blocks of each stage, or of all (the even blocks have 1); in place of a stage's
            number, a sequence of its blocks' dilations, repeated as needed.
        mlp_ratio: hidden width of the MLP as a multiple of its input.
        layer_scale: initial layer scale, None for none.
        swin_layout: patchify stem and patch merging (DiNAT_s) in place of overlapping convolutions.
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
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Union[int, Sequence[Union[int, Sequence[int]]]] = 1,
        mlp_ratio: float = 3.0,
        layer_scale: Optional[float] = None,
        swin_layout: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dilations = [dilations] * len(depths) if isinstance(dilations, int) else dilations
        check_per_stage(depths=depths, num_heads=num_heads, dilations=dilations)
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        drop_paths = drop_path_rates(drop_path_rate, depths)
        downsample = PatchMerging if swin_layout else _conv_downsample

        def block(stage: int, index: int) -> TransformerBlock:
            attn = NeighborhoodAttention(
                widths[stage],
                num_heads[stage],
                kernel_size=kernel_size,
                dilation=_block_dilation(dilations[stage], index),
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                **dd,
            )
            return TransformerBlock(
                widths[stage],
                attn,
                mlp_ratio=mlp_ratio,
                init_values=layer_scale,
                proj_drop=proj_drop_rate,
                drop_path=drop_paths[stage][index],
                **dd,
            )

        stages = [
            Stage(
                [block(stage, index) for index in range(depth)],
                downsample(widths[stage - 1], widths[stage], **dd) if stage else None,
            )
            for stage, depth in enumerate(depths)
        ]
        super().__init__(
            stem=(_patch_stem if swin_layout else _conv_stem)(in_chans, embed_dim, **dd),
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


class IsotropicNeighborhoodTransformer(Backbone):
    """NAT, DiNAT and ViT with relative position bias at one resolution, 1/16 of the image.

    Every block is a stage of its own, so that features can be taken after any of them.

    Args:
        img_size: image size that the bias tables of global attention are for; other sizes resize them.
        embed_dim: channels.
        depth: number of blocks.
        num_heads: heads of each block.
        kernel_size: neighbours per axis, None for global attention.
        dilation: dilation of the odd blocks (the even ones have 1).
        mlp_ratio: hidden width of the MLP as a multiple of its input.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: see :class:`NeighborhoodTransformer`.
    """

    layouts = LAYOUTS

    def __init__(
        self,
        img_size: Union[int, Sequence[int]] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: Optional[int] = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        grid_size = tuple(-(-side // 16) for side in to_2tuple(img_size))

        def attention(index: int) -> nn.Module:
            kwargs = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **dd}
            if kernel_size is None:
                return GlobalAttention(embed_dim, num_heads, grid_size, **kwargs)
            step = dilation if index % 2 else 1
            return NeighborhoodAttention(embed_dim, num_heads, kernel_size, step, **kwargs)

        block: Callable[..., nn.Module] = partial(
            TransformerBlock, embed_dim, mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, **dd
        )
        super().__init__(
            stem=ConvEmbed(in_chans, embed_dim, 16, 16, image=True, multiple=16, **dd),
            stages=[Stage([block(attention(index), drop_path=drop_paths[index])]) for index in range(depth)],
            norm=LayerNorm(embed_dim, eps=1e-5, **dd),
            head=ClassifierHead(
                embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
            ),
            widths=[embed_dim] * depth,
            reductions=[16] * depth,
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    def adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        state_dict = super().adapt_state_dict(state_dict)
        for name, module in self.named_modules():
            key = f"{name}.relative_position_bias"
            if isinstance(module, GlobalAttention) and module.relative_position_bias is not None and key in state_dict:
                _, height, width = shape = module.relative_position_bias.shape
                window = ((height + 1) // 2, (width + 1) // 2)
                state_dict[key] = resize_rel_pos_bias_table_simple(state_dict[key], window, tuple(shape))
        return state_dict


def _block_dilation(of_stage: Union[int, Sequence[int]], index: int) -> int:
    if isinstance(of_stage, int):
        return of_stage if index % 2 else 1
    return of_stage[index % len(of_stage)]


def _conv_stem(in_chans: int, embed_dim: int, device=None, dtype=None) -> nn.Module:
    """Two overlapping convolutions of stride 2, nothing between them."""
    dd = {"device": device, "dtype": dtype}
    first = nn.Conv2d(in_chans, embed_dim // 2, 3, 2, 1, **dd)
    embed = ConvEmbed(embed_dim // 2, embed_dim, 3, 2, 1, image=True, **dd)
    return nn.Sequential(OrderedDict(conv1=first, embed=embed))


def _patch_stem(in_chans: int, embed_dim: int, device=None, dtype=None) -> nn.Module:
    return ConvEmbed(in_chans, embed_dim, 4, 4, image=True, multiple=4, device=device, dtype=dtype)


def _conv_downsample(in_chans: int, out_chans: int, device=None, dtype=None) -> nn.Module:
    return ConvEmbed(in_chans, out_chans, 3, 2, 1, bias=False, device=device, dtype=dtype)


def _pyramid(embed_dim: int, depths: Sequence[int], mlp_ratio: float, cfg: Optional[dict] = None, **kwargs) -> Variant:
    heads = [embed_dim // 32 * 2**stage for stage in range(len(depths))]
    args = {"embed_dim": embed_dim, "depths": tuple(depths), "num_heads": tuple(heads), "mlp_ratio": mlp_ratio}
    return Variant({**args, **kwargs}, {"first_conv": "stem.conv1", **(cfg or {})})


def _swin_like(embed_dim: int, depths: Sequence[int], cfg: Optional[dict] = None, **kwargs) -> Variant:
    kwargs = {"dilations": (8, 4, 2, 1), "swin_layout": True, **kwargs}
    return _pyramid(embed_dim, depths, 4.0, {"first_conv": "stem.conv", **(cfg or {})}, **kwargs)


def _isotropic(embed_dim: int, **kwargs) -> Variant:
    args = {"embed_dim": embed_dim, "num_heads": embed_dim // 32, **kwargs}
    return Variant(args, {"first_conv": "stem.conv", "pool_size": (14, 14)})


_MINI, _LARGE = (3, 4, 6, 5), (3, 4, 18, 5)
_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_PICO = {"input_size": (3, 32, 32), "pool_size": (1, 1), "crop_pct": 1.0}

PYRAMIDS = {
    "nat_pico": _pyramid(32, (1, 1, 3, 1), 3.0, _PICO, kernel_size=3),
    "nat_mini": _pyramid(64, _MINI, 3.0),
    "nat_tiny": _pyramid(64, _LARGE, 3.0),
    "nat_small": _pyramid(96, _LARGE, 2.0, layer_scale=1e-5),
    "nat_base": _pyramid(128, _LARGE, 2.0, layer_scale=1e-5),
    "dinat_pico": _pyramid(32, (2, 2, 2, 1), 3.0, _PICO, kernel_size=3, dilations=(2, 2, 1, 1)),
    "dinat_mini": _pyramid(64, _MINI, 3.0, dilations=(8, 4, 2, 1)),
    "dinat_tiny": _pyramid(64, _LARGE, 3.0, dilations=(8, 4, 2, 1)),
    "dinat_small": _pyramid(96, _LARGE, 2.0, dilations=(8, 4, 2, 1)),
    "dinat_base": _pyramid(128, _LARGE, 2.0, dilations=(8, 4, 2, 1), layer_scale=1e-5),
    "dinat_large": _pyramid(192, _LARGE, 2.0, dilations=(8, 4, 2, 1)),
    "dinat_large_21k": _pyramid(192, _LARGE, 2.0, dilations=(8, 4, 2, 1)),
    "dinat_large_21k_11x11": _pyramid(192, _LARGE, 2.0, dilations=(8, 4, 2, 1), kernel_size=11),
    "dinat_large_384": _pyramid(192, _LARGE, 2.0, _384, dilations=(13, 6, 3, 1)),
    "dinat_large_384_11x11": _pyramid(192, _LARGE, 2.0, _384, dilations=(8, 4, 2, 1), kernel_size=11),
    "dinat_s_tiny": _swin_like(96, (2, 2, 6, 2)),
    "dinat_s_small": _swin_like(96, (2, 2, 18, 2)),
    "dinat_s_base": _swin_like(128, (2, 2, 18, 2)),
    "dinat_s_large": _swin_like(192, (2, 2, 18, 2)),
    "dinat_s_large_21k": _swin_like(192, (2, 2, 18, 2)),
    "dinat_s_large_384": _swin_like(192, (2, 2, 18, 2), _384, dilations=(13, 6, 3, 1)),
}

ISOTROPIC = {
    "nat_isotropic_small": _isotropic(384),
    "nat_isotropic_base": _isotropic(768),
    "dinat_isotropic_small": _isotropic(384, dilation=2),
    "dinat_isotropic_base": _isotropic(768, dilation=2),
    "vitrpb_small": _isotropic(384, kernel_size=None),
    "vitrpb_base": _isotropic(768, kernel_size=None),
}

default_cfgs = default_cfgs_of({**PYRAMIDS, **ISOTROPIC}, RELEASED, license="mit")


def _build_pyramid(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if not pretrained:
        # the 22k weights have 21841 classes; an untrained network has the official constructor's 1000
        kwargs.setdefault("num_classes", 1000)
    return build_backbone(NeighborhoodTransformer, variant, pretrained, **kwargs)


register_variants(__name__, PYRAMIDS, _build_pyramid)
register_variants(__name__, ISOTROPIC, partial(build_backbone, IsotropicNeighborhoodTransformer, feature_levels=3))
