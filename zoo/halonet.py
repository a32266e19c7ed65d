"""HaloNet: residual networks with halo attention in place of some or all of their 3 x 3 convolutions.

Paper: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (arXiv:2103.12731). Its authors released
neither code nor weights; timm's networks (``byoanet``) are built from timm's configurations, with our attention.
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from timm.layers import ClassifierHead
from timm.models import named_apply
from timm.models.byoanet import model_cfgs as TIMM_CFGS
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, _init_weights, expand_blocks_cfg
from torch import nn

from .backbone import Backbone, Stage, build_backbone, checkpoint_filter_fn
from .blocks.halo import HaloAttention
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["HaloNet", "checkpoint_filter_fn"]


class HaloNet(Backbone):
    """A network of timm's bring-your-own-blocks kind whose halo attention takes maps of any size.

    Args:
        cfg: blocks, stem and layers, as timm configures them.
        mask_padding: cells outside the map get no weight in halo attention. Otherwise they are zero keys that take
            part in the softmax, as in timm.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        cfg: ByoModelCfg,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mask_padding: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        cfg = _with_our_attention(cfg, mask_padding)
        parts = ByobNet(cfg, num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate, **dd)
        firsts = [stage[0] for stage in cfg.blocks]
        strides = [block.s for block in firsts]
        total = parts.feature_info[-1]["reduction"]
        super().__init__(
            stem=parts.stem,
            stages=[Stage(list(stage)) for stage in parts.stages],
            norm=parts.final_conv,
            head=ClassifierHead(parts.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=[block.c for block in firsts],
            reductions=[total // prod(strides[stage + 1 :]) for stage in range(len(strides))],
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NCHW",
            num_features=parts.num_features,
        )

    def init_weights(self, needs_reset: bool = True) -> None:
        # children first: a block sets the last norm of its branch to zero after that norm's own rule
        named_apply(partial(self.init_module, needs_reset=needs_reset), self)

    def init_module(self, module: nn.Module, name: str, needs_reset: bool) -> None:
        """timm's rule: convolutions by their fan-out, a residual branch that starts as zero."""
        if needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        _init_weights(module, name, zero_init_last=True)


def _with_our_attention(cfg: ByoModelCfg, mask_padding: bool) -> ByoModelCfg:
    """The same network with one configuration for each block, and our module where timm's says "halo"."""
    attention = partial(HaloAttention, mask_padding=mask_padding)

    def swap(part: Any) -> Any:
        return replace(part, self_attn_layer=attention) if part.self_attn_layer == "halo" else part

    stages = tuple(tuple(swap(block) for block in expand_blocks_cfg(stage)) for stage in cfg.blocks)
    return replace(swap(cfg), blocks=stages)


_PICO = ByoModelCfg(
    blocks=(
        ByoBlockCfg("bottle", d=1, c=32, s=1, br=0.5),
        ByoBlockCfg("self_attn", d=1, c=64, s=2, br=0.5),
        (ByoBlockCfg("bottle", d=1, c=128, s=2, br=0.5), ByoBlockCfg("self_attn", d=1, c=128, s=2, br=0.5)),
        ByoBlockCfg("self_attn", d=1, c=192, s=2, br=0.5, self_attn_kwargs={"block_size": 3, "halo_size": 1}),
    ),
    stem_type="tiered",
    stem_pool="",
    num_features=256,
    act_layer="silu",
    attn_layer="se",
    self_attn_layer="halo",
    self_attn_kwargs={"block_size": 4, "halo_size": 1, "num_heads": 4},
)


def _timm(name: str, size: int = 256, crop_pct: float = 0.94, **cfg: Any) -> Variant:
    return Variant(
        {"cfg": TIMM_CFGS[name]},
        {"input_size": (3, size, size), "pool_size": (size // 32,) * 2, "crop_pct": crop_pct, **cfg},
    )


_HALF = (0.5, 0.5, 0.5)

VARIANTS = {
    "halonet_pico": Variant({"cfg": _PICO}, {"input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0}),
    "halonet26t": _timm("halonet26t", crop_pct=0.95),
    "halonet50ts": _timm("halonet50ts"),
    "sehalonet33ts": _timm("sehalonet33ts"),
    "eca_halonext26ts": _timm("eca_halonext26ts"),
    "haloregnetz_b": _timm("haloregnetz_b", 224, mean=_HALF, std=_HALF, first_conv="stem.conv"),
    "halonet_h1": _timm("halonet_h1", crop_pct=0.95),
}

default_cfgs = default_cfgs_of(VARIANTS, first_conv="stem.conv1.conv")

register_variants(__name__, VARIANTS, partial(build_backbone, HaloNet))
