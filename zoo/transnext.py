"""TransNeXt: attention to neighbours and to a pooled map at once, with a convolutional gated linear unit.

Paper: TransNeXt: Robust Foveal Visual Perception for Vision Transformers (arXiv:2311.17132). Official code:
DaiShiResearch/TransNeXt (Apache-2.0).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Optional

import torch
from timm.layers import ClassifierHead, LayerNorm
from torch import nn

from ..checkpoints.keys.transnext import LAYOUTS
from ..checkpoints.released.transnext import RELEASED
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn, drop_path_rates
from .blocks.aggregated import AggregatedAttention, CosineAttention, LengthScaledAttention
from .blocks.embed import ConvEmbed
from .blocks.mlp import ConvGluMlp
from .blocks.position import ContinuousPositionBias
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["TransNeXt", "checkpoint_filter_fn"]

POSITION_BIASES = ("recomputed", "interpolated")


class TransNeXt(Backbone):
    """TransNeXt. Its stages end with a norm, whose output is the stage's feature map.

    Args:
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratios: hidden width of the MLP of each stage as a multiple of its input, before the gate's share is taken.
        reductions: side of a pooled cell in each stage; 1 for global attention instead.
        pretrain_size: side of the images in training, which sets the unit of distances in the position bias. It stays
            what it was when the network is used or fine-tuned at another size.
        position_bias: how the bias follows the size of the map: "recomputed" evaluates the network of the bias at the
            new distances (extrapolation), "interpolated" evaluates it at ``pretrain_size`` and resizes.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS
    legacy_onnx = "nothing"  # it mixes up the types of the numbers of keys

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        pretrain_size: int = 224,
        position_bias: str = "recomputed",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_per_stage(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, reductions=reductions
        )
        if position_bias not in POSITION_BIASES:
            raise ValueError(f"position_bias={position_bias!r} must be one of {', '.join(POSITION_BIASES)}")
        drop_paths = drop_path_rates(drop_path_rate, depths)
        strides = [4 * 2**stage for stage in range(len(depths))]

        def attention(stage: int) -> LengthScaledAttention:
            dim, heads, reduction = embed_dims[stage], num_heads[stage], reductions[stage]
            side = max(1, pretrain_size // strides[stage])
            bias = ContinuousPositionBias(heads, reduction, side, position_bias == "interpolated", **dd)
            mixer = CosineAttention if reduction == 1 else partial(AggregatedAttention, reduction=reduction)
            return mixer(dim, heads, bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd)

        def block(stage: int, index: int) -> TransformerBlock:
            dim = embed_dims[stage]
            mlp = ConvGluMlp(dim, int(2 * int(dim * mlp_ratios[stage]) / 3), proj_drop_rate, **dd)
            return TransformerBlock(
                dim, attention(stage), mlp=mlp, drop_path=drop_paths[stage][index], norm_eps=1e-6, **dd
            )

        stages = [
            Stage(
                [block(stage, index) for index in range(depth)],
                ConvEmbed(embed_dims[stage - 1], embed_dims[stage], 3, 2, 1, **dd) if stage else None,
                LayerNorm(embed_dims[stage], eps=1e-6, **dd),
            )
            for stage, depth in enumerate(depths)
        ]
        super().__init__(
            stem=ConvEmbed(in_chans, embed_dims[0], 7, 4, 3, image=True, **dd),
            stages=stages,
            norm=nn.Identity(),
            head=ClassifierHead(
                embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
            ),
            widths=embed_dims,
            reductions=strides,
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    def init_module(self, module: nn.Module, name: str, needs_reset: bool) -> None:
        """Besides the shared rules: convolutions normal by their fan-out."""
        super().init_module(module, name, needs_reset)
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position biases, their networks, query embeddings and temperatures."""
        kept = ("position_bias", "query_embedding", "temperature")
        return {name for name, _ in self.named_parameters() if any(part in name for part in kept)}


def _variant(embed_dim: int, depths: Sequence[int], model_args: Optional[dict[str, Any]] = None, **cfg) -> Variant:
    widths = tuple(embed_dim * 2**stage for stage in range(4))
    heads = tuple(width // 24 for width in widths)
    args = {"embed_dims": widths, "depths": depths, "num_heads": heads, **(model_args or {})}
    return Variant(args, cfg)


_PICO = {"mlp_ratios": (4, 4, 4, 4), "pretrain_size": 32}
_AAAA = {"reductions": (16, 8, 4, 2), "pretrain_size": 256}

VARIANTS = {
    "transnext_pico": _variant(24, (1, 1, 2, 1), _PICO, input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
    "transnext_micro": _variant(48, (2, 2, 15, 2)),
    "transnext_micro_aaaa": _variant(48, (2, 2, 15, 2), _AAAA, input_size=(3, 256, 256), pool_size=(8, 8)),
    "transnext_tiny": _variant(72, (2, 2, 15, 2)),
    "transnext_small": _variant(72, (5, 5, 22, 5)),
    "transnext_base": _variant(96, (5, 5, 23, 5)),
}

default_cfgs = default_cfgs_of(VARIANTS, RELEASED, first_conv="stem.conv")

register_variants(__name__, VARIANTS, partial(build_backbone, TransNeXt))
