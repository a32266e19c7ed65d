"""HaloNet: residual networks with halo attention in place of some or all of their 3 x 3 convolutions.

timm's hybrids mix it with lambda layers (arXiv:2102.08602) and bottleneck attention (arXiv:2101.11605).

Paper: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (arXiv:2103.12731). Its authors released
neither code nor weights. ``halonet_h0`` to ``halonet_h7`` follow the paper's table; timm's networks (``byoanet``) are
built from timm's configurations. timm's ``halonet_h1``, with 8 heads in every stage, is ``halonet_h1_vicinal`` here;
the paper's, with 4 in the first, is ``halonet_h1_paper``.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Union, cast

from timm.layers import ClassifierHead
from timm.models import named_apply
from timm.models.byoanet import model_cfgs as TIMM_CFGS
from timm.models.byobnet import (
    ByoBlockCfg,
    ByobNet,
    ByoModelCfg,
    LayerFn,
    SelfAttnBlock,
    _init_weights,
    expand_blocks_cfg,
    interleave_blocks,
)
from torch import Tensor, nn

from ..checkpoints.keys.halonet import LAYOUTS
from ..checkpoints.released.halonet import RELEASED
from .backbone import Backbone, Stage, build_backbone, checkpoint_filter_fn, reset_parameters
from .blocks.bottleneck import BottleneckAttention, LambdaAttention, resize_relative_table
from .blocks.halo import HaloAttention
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["HaloNet", "checkpoint_filter_fn"]


class HaloBlock(SelfAttnBlock):
    """timm's block of 1 x 1 convolution, attention and 1 x 1 convolution, for attention that changes the width.

    Arguments are :class:`SelfAttnBlock`'s.
    """

    def __init__(self, in_chs: int, out_chs: int, *, layers: LayerFn, device=None, dtype=None, **kwargs: Any) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chs, out_chs, layers=layers, **kwargs, **dd)
        width = self.self_attn.dim_out
        self.post_attn = layers.norm_act(width, **dd)
        self.conv3_1x1 = layers.conv_norm_act(width, out_chs, 1, apply_act=False, **dd)


class HaloNet(Backbone):
    """A network of timm's bring-your-own-blocks kind whose attention takes maps of any size.

    Args:
        cfg: blocks, stem and layers, as timm configures them.
        mask_padding: cells outside the map get no weight in halo attention. Otherwise they are zero keys that take
            part in the softmax, as in timm.
        img_size: size of the images that the position tables of bottleneck attention are for; images of another size
            resize them. Networks without it have no such tables.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS
    legacy_onnx = "nothing"  # it gets the shapes of blocks and of lambda layers wrong

    def __init__(
        self,
        cfg: ByoModelCfg,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mask_padding: bool = False,
        img_size: Union[int, Sequence[int]] = 256,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        cfg = _with_our_attention(cfg, mask_padding)
        size = cast(Union[int, tuple[int, int]], img_size)
        parts = ByobNet(cfg, num_classes=0, in_chans=in_chans, img_size=size, drop_path_rate=drop_path_rate, **dd)
        firsts = [cast(Sequence[ByoBlockCfg], stage)[0] for stage in cfg.blocks]
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
        if needs_reset:
            reset_parameters(module)
        _init_weights(module, name, zero_init_last=True)

    def adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """As :meth:`Backbone.adapt_state_dict`; tables of bottleneck attention for another image size are resized."""
        state_dict = super().adapt_state_dict(state_dict)
        for name, module in self.named_modules():
            if isinstance(module, BottleneckAttention):
                for axis, table in module.pos_embed.named_parameters():
                    _resize_entry(state_dict, f"{name}.pos_embed.{axis}", len(table) // 2 + 1)
        return state_dict


def _resize_entry(state_dict: dict[str, Tensor], key: str, size: int) -> None:
    if key in state_dict:
        state_dict[key] = resize_relative_table(state_dict[key].float(), size).to(state_dict[key].dtype)


def _with_our_attention(cfg: ByoModelCfg, mask_padding: bool) -> ByoModelCfg:
    """The same network with one configuration for each block, and our modules where timm's are named."""
    ours = {
        "halo": partial(HaloAttention, mask_padding=mask_padding),
        "bottleneck": partial(BottleneckAttention),
        "lambda": partial(LambdaAttention),
    }

    def swap(part: Any) -> Any:
        return replace(part, self_attn_layer=ours.get(part.self_attn_layer, part.self_attn_layer))

    stages = tuple(tuple(swap(block) for block in expand_blocks_cfg(stage)) for stage in cfg.blocks)
    return replace(swap(cfg), blocks=stages)


def _paper(
    block_size: int,
    halo_size: int,
    value_ratio: float,
    width_ratio: float,
    depth: int,
    img_size: int,
    num_features: int = 0,
) -> Variant:
    """A row of the paper's table.

    Args:
        block_size: tokens of a block per axis.
        halo_size: tokens around a block per axis and side.
        value_ratio: width of the values as a multiple of the bottleneck's.
        width_ratio: width of a block's output as a multiple of the bottleneck's.
        depth: blocks of the third stage; the others have three.
        img_size: side of the training images.
        num_features: width of the last convolution, 0 for none.
    """

    def stage(index: int, depth: int, num_heads: int) -> ByoBlockCfg:
        width = 64 * 2**index
        window = {"block_size": block_size, "halo_size": halo_size}
        heads = {"num_heads": num_heads, "dim_head": width // num_heads, "dim_out": int(width * value_ratio)}
        out = int(width * width_ratio)
        stride = 2 if index else 1
        # timm takes a class of ours as a partial
        return ByoBlockCfg(
            cast(nn.Module, partial(HaloBlock)),
            d=depth,
            c=out,
            s=stride,
            br=width / out,
            self_attn_kwargs={**window, **heads},
        )

    cfg = ByoModelCfg(
        blocks=tuple(stage(index, *row) for index, row in enumerate(((3, 4), (3, 8), (depth, 8), (3, 8)))),
        stem_type="7x7",
        stem_chs=64,
        num_features=num_features,
        self_attn_layer="halo",
    )
    return Variant({"cfg": cfg}, {"input_size": (3, img_size, img_size), "pool_size": (-(-img_size // 32),) * 2})


_PICO_HALO = {"block_size": 4, "halo_size": 1, "num_heads": 4}
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
    self_attn_kwargs=_PICO_HALO,
)


def _timm(name: str, size: int = 256, crop_pct: float = 0.94, **cfg: Any) -> Variant:
    return Variant(
        {"cfg": TIMM_CFGS[name.removesuffix("_256")]},
        {"input_size": (3, size, size), "pool_size": (size // 32,) * 2, "crop_pct": crop_pct, **cfg},
    )


_HYBRID_PICO = ByoModelCfg(
    blocks=(
        ByoBlockCfg("bottle", d=1, c=32, s=1, br=0.5),
        interleave_blocks(
            ("bottle", "self_attn"), d=2, c=64, s=2, br=0.5, self_attn_layer="lambda", self_attn_kwargs={"r": 5}
        ),
        ByoBlockCfg("self_attn", d=1, c=128, s=2, br=0.5, self_attn_layer="halo", self_attn_kwargs=_PICO_HALO),
        ByoBlockCfg("self_attn", d=2, c=192, s=2, br=0.5, self_attn_layer="bottleneck", self_attn_kwargs={}),
    ),
    stem_type="tiered",
    stem_pool="",
    act_layer="silu",
)

_HALF = (0.5, 0.5, 0.5)

VARIANTS = {
    "halonet_pico": Variant({"cfg": _PICO}, {"input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0}),
    "lamhalobotnet_pico": Variant(
        {"cfg": _HYBRID_PICO, "img_size": 64}, {"input_size": (3, 64, 64), "pool_size": (2, 2), "crop_pct": 1.0}
    ),
    "halonet26t_vicinal": _timm("halonet26t", crop_pct=0.95),
    "halonet50ts_vicinal": _timm("halonet50ts"),
    "sehalonet33ts_vicinal": _timm("sehalonet33ts"),
    "eca_halonext26ts_vicinal": _timm("eca_halonext26ts"),
    "haloregnetz_b_vicinal": _timm("haloregnetz_b", 224, mean=_HALF, std=_HALF, first_conv="stem.conv"),
    "halonet_h1_vicinal": _timm("halonet_h1", crop_pct=0.95),
    "halo2botnet50ts_256_vicinal": _timm("halo2botnet50ts_256", crop_pct=0.95),
    "lamhalobotnet50ts_256_vicinal": _timm("lamhalobotnet50ts_256", crop_pct=0.95),
    "halonet_h0_paper": _paper(8, 3, 1, 0.5, 7, 256),
    "halonet_h1_paper": _paper(8, 3, 1, 1, 10, 256),
    "halonet_h2_paper": _paper(8, 3, 1, 1.25, 11, 256),
    "halonet_h3_paper": _paper(10, 3, 1, 1.5, 12, 320, 1024),
    "halonet_h4_paper": _paper(12, 2, 1, 3, 12, 384, 1280),
    "halonet_h5_paper": _paper(14, 2, 2.5, 2, 23, 448, 1536),
    "halonet_h6_paper": _paper(8, 4, 3, 2.75, 24, 512, 1536),
    "halonet_h7_paper": _paper(10, 3, 4, 3.5, 26, 600, 2048),
}

default_cfgs = default_cfgs_of(VARIANTS, RELEASED, first_conv="stem.conv1.conv")

register_variants(__name__, VARIANTS, partial(build_backbone, HaloNet))
