"""DaViT: spatial window attention and channel group attention in turn.

Paper: DaViT: Dual Attention Vision Transformers (arXiv:2204.03645). Official code: dingmyu/davit. The parameters are
named as in timm's ``davit``, whose checkpoints load unchanged.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import ClNormMlpClassifierHead, LayerNorm
from torch import nn

from ..checkpoints.keys.davit import LAYOUTS
from ..checkpoints.released.davit import RELEASED
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn, drop_path_rates
from .blocks.attention import WindowAttention
from .blocks.channel import ChannelAttention
from .blocks.embed import ConvEmbed
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["DaViT", "checkpoint_filter_fn"]


class DaViT(Backbone):
    """DaViT.

    Args:
        embed_dims: channels of each stage.
        depths: pairs of a spatial and a channel block in each stage.
        num_heads: heads, and channel groups, of each stage.
        window_size: of the spatial attention.
        mlp_ratio: hidden width of the MLP as a multiple of its input.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout on the weights of spatial attention.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_per_stage(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        # the official rates run over single blocks, two a pair
        drop_paths = drop_path_rates(drop_path_rate, [2 * depth for depth in depths])

        def pair(stage: int, index: int) -> nn.Sequential:
            dim, heads = embed_dims[stage], num_heads[stage]
            rates = drop_paths[stage][2 * index : 2 * index + 2]
            spatial = WindowAttention(
                dim,
                heads,
                window_size,
                relative_position_bias=False,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                **dd,
            )
            block: Callable[..., nn.Module] = partial(
                TransformerBlock, dim, mlp_ratio=mlp_ratio, position_encodings=2, proj_drop=proj_drop_rate, **dd
            )
            channel = ChannelAttention(dim, heads, **dd)
            return nn.Sequential(block(spatial, drop_path=rates[0]), block(channel, drop_path=rates[1]))

        stages = [
            Stage(
                [pair(stage, index) for index in range(depth)],
                ConvEmbed(embed_dims[stage - 1], embed_dims[stage], 2, 2, norm_first=True, multiple=2, **dd)
                if stage
                else None,
            )
            for stage, depth in enumerate(depths)
        ]
        super().__init__(
            stem=ConvEmbed(in_chans, embed_dims[0], 7, 4, 3, image=True, multiple=4, **dd),
            stages=stages,
            norm=nn.Identity(),
            head=ClNormMlpClassifierHead(
                embed_dims[-1],
                num_classes,
                pool_type=global_pool,
                drop_rate=drop_rate,
                norm_layer=partial(LayerNorm, eps=1e-5),
                **dd,
            ),
            widths=embed_dims,
            reductions=[4 * 2**stage for stage in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )


def _variant(embed_dims: Sequence[int], depths: Sequence[int], window_size: int = 7, **cfg) -> Variant:
    heads = tuple(dim // 32 for dim in embed_dims)
    args = {"embed_dims": tuple(embed_dims), "depths": depths, "num_heads": heads, "window_size": window_size}
    return Variant(args, cfg)


VARIANTS = {
    "davit_pico_vicinal": _variant(
        (32, 64, 96, 160), (1, 1, 1, 1), 4, input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0
    ),
    "davit_tiny_vicinal": _variant((96, 192, 384, 768), (1, 1, 3, 1)),
    "davit_small_vicinal": _variant((96, 192, 384, 768), (1, 1, 9, 1)),
    "davit_base_vicinal": _variant((128, 256, 512, 1024), (1, 1, 9, 1)),
    "davit_large_vicinal": _variant((192, 384, 768, 1536), (1, 1, 9, 1)),
    "davit_large_window12_384_vicinal": _variant(
        (192, 384, 768, 1536), (1, 1, 9, 1), 12, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
    ),
    "davit_huge_vicinal": _variant((256, 512, 1024, 2048), (1, 1, 9, 1), crop_pct=0.95),
    "davit_giant_vicinal": _variant((384, 768, 1536, 3072), (1, 1, 12, 3), crop_pct=0.95),
}

default_cfgs = default_cfgs_of(VARIANTS, RELEASED, first_conv="stem.conv", crop_pct=0.9)

register_variants(__name__, VARIANTS, partial(build_backbone, DaViT))
