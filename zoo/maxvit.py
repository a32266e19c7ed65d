"""MaxViT: in every block an inverted bottleneck, attention inside windows, and attention over a grid.

Paper: MaxViT: Multi-Axis Vision Transformer (arXiv:2204.01697). Official code: google-research/maxvit (Apache-2.0),
whose weights timm ported as ``maxvit_*_tf_*``; the parameters are named as in timm but for the bias tables.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Optional, Union

from timm.layers import (
    BatchNormAct2d,
    ClNormMlpClassifierHead,
    DropPath,
    LayerNorm,
    SqueezeExcite,
    to_2tuple,
)
from timm.models import resolve_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.keys.maxvit import LAYOUTS
from ..checkpoints.released.maxvit import RELEASED
from ..timm_internals import update_model_input_size
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn, drop_path_rates
from .blocks.activation import GELUTanh
from .blocks.attention import WindowAttention
from .blocks.padding import pad_by_edge, pad_same
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["MaxViT", "checkpoint_filter_fn"]

_norm_act = partial(BatchNormAct2d, eps=1e-3, act_layer=GELUTanh)


class SameConv2d(nn.Conv2d):
    """3 x 3 convolution of stride 2 with TensorFlow's SAME padding, which is asymmetric on even sizes."""

    def __init__(self, in_chans: int, out_chans: int, groups: int = 1, bias: bool = True, device=None, dtype=None):
        super().__init__(in_chans, out_chans, 3, stride=2, groups=groups, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(pad_same(x, 3, 2), self.weight, self.bias)


class Stem(nn.Module):
    """Image (B, in_chans, H, W) to a map (B, H / 2, W / 2, dim)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = SameConv2d(in_chans, dim, **dd)
        self.norm1 = _norm_act(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm1(self.conv1(x))).permute(0, 2, 3, 1).contiguous()


class PoolShortcut(nn.Module):
    """The residual connection of a strided bottleneck, on (B, C, H, W): mean of 2 x 2, and more channels if needed."""

    def __init__(self, in_chans: int, out_chans: int, device=None, dtype=None) -> None:
        super().__init__()
        self.expand: nn.Module = nn.Identity()
        if in_chans != out_chans:
            self.expand = nn.Conv2d(in_chans, out_chans, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # SAME pooling leaves padding out of the mean; repeating the edge does, and its size is known while tracing
        return self.expand(F.avg_pool2d(pad_by_edge(x, 2), 2))


class MBConv(nn.Module):
    """Pre-norm inverted bottleneck with squeeze and excitation, (B, H, W, in_chans) to (B, H', W', out_chans).

    Unlike MobileNet's, its widths are multiples of the output's: four times inside, a quarter in the squeeze.
    """

    def __init__(
        self, in_chans: int, out_chans: int, strided: bool = False, drop_path: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = 4 * out_chans
        depthwise = SameConv2d if strided else partial(nn.Conv2d, kernel_size=3, padding=1)
        self.shortcut = PoolShortcut(in_chans, out_chans, **dd) if strided else nn.Identity()
        self.pre_norm = _norm_act(in_chans, apply_act=False, **dd)
        self.conv1_1x1 = nn.Conv2d(in_chans, hidden, 1, bias=False, **dd)
        self.norm1 = _norm_act(hidden, **dd)
        self.conv2_kxk = depthwise(hidden, hidden, groups=hidden, bias=False, **dd)
        self.norm2 = _norm_act(hidden, **dd)
        self.se = SqueezeExcite(hidden, rd_channels=out_chans // 4, act_layer=nn.SiLU, **dd)
        self.conv3_1x1 = nn.Conv2d(hidden, out_chans, 1, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        shortcut = self.shortcut(x)
        x = self.norm1(self.conv1_1x1(self.pre_norm(x)))
        x = self.norm2(self.conv2_kxk(x))
        x = self.conv3_1x1(self.se(x))
        return (self.drop_path(x) + shortcut).permute(0, 2, 3, 1)


class MaxViT(Backbone):
    """MaxViT.

    Args:
        img_size: image size that the window is derived from. Any other size runs too: a map that the window does not
            divide is padded.
        stem_width: channels of the stem.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        window_size: tokens per axis of a window and of the grid; None for ``img_size // window_ratio``.
        window_ratio: see ``window_size``.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS

    def __init__(
        self,
        img_size: Union[int, Sequence[int]] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_width: int = 64,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        window_size: Optional[Union[int, Sequence[int]]] = None,
        window_ratio: int = 32,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_per_stage(embed_dims=embed_dims, depths=depths)
        window = _choose_window(img_size, window_size, window_ratio)
        drop_paths = drop_path_rates(drop_path_rate, depths)
        in_widths = [stem_width, *embed_dims[:-1]]

        def attention_block(dim: int, partition: str, drop_path: float) -> TransformerBlock:
            drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
            attn = WindowAttention(dim, dim // 32, window, partition=partition, **drops, **dd)
            return TransformerBlock(dim, attn, proj_drop=proj_drop_rate, drop_path=drop_path, act_layer=GELUTanh, **dd)

        def block(stage: int, index: int) -> nn.Sequential:
            dim, drop_path = embed_dims[stage], drop_paths[stage][index]
            conv = MBConv(dim if index else in_widths[stage], dim, not index, drop_path, **dd)
            attention = [(f"attn_{kind}", attention_block(dim, kind, drop_path)) for kind in ("block", "grid")]
            return nn.Sequential(OrderedDict([("conv", conv), *attention]))

        super().__init__(
            stem=Stem(in_chans, stem_width, **dd),
            stages=[Stage([block(stage, index) for index in range(depth)]) for stage, depth in enumerate(depths)],
            norm=nn.Identity(),
            head=ClNormMlpClassifierHead(
                embed_dims[-1],
                num_classes,
                hidden_size=embed_dims[-1],
                pool_type=global_pool,
                drop_rate=drop_rate,
                norm_layer=partial(LayerNorm, eps=1e-5),
                act_layer="tanh",
                **dd,
            ),
            widths=embed_dims,
            reductions=[4 * 2**stage for stage in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )
        self.img_size = to_2tuple(img_size)
        self.window_size = window
        self.window_ratio = window_ratio

    def init_module(self, module: nn.Module, name: str, needs_reset: bool) -> None:
        """The official code draws every kernel from a normal distribution with deviation 0.02; biases are zero."""
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            super().init_module(module, name, needs_reset)
            return
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

    def set_input_size(
        self,
        img_size: Optional[Union[int, Sequence[int]]] = None,
        window_size: Optional[Union[int, Sequence[int]]] = None,
        window_ratio: Optional[int] = None,
    ) -> None:
        """Prepare for images of another size: windows change, and the bias tables are resized to them.

        Args:
            img_size: None for the present one.
            window_size: of the blocks and the grid. None derives it from the image size if that or the ratio is given,
                and keeps the present one otherwise.
            window_ratio: image pixels per window pixel, None for the present one.
        """
        derived = img_size is not None or window_ratio is not None
        self.img_size = self.img_size if img_size is None else to_2tuple(img_size)
        self.window_ratio = self.window_ratio if window_ratio is None else window_ratio
        if derived or window_size is not None:
            self.window_size = _choose_window(self.img_size, window_size, self.window_ratio)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.set_window_size(self.window_size)
        update_model_input_size(self, self.img_size, window_size=self.window_size, window_ratio=self.window_ratio)

    def adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        state_dict = super().adapt_state_dict(state_dict)
        for name, module in self.named_modules():
            key = f"{name}.relative_position_bias"
            if isinstance(module, WindowAttention) and key in state_dict:
                state_dict[key] = module.resize_table(state_dict[key])
        return state_dict


def _choose_window(
    img_size: Union[int, Sequence[int]], window_size: Optional[Union[int, Sequence[int]]], window_ratio: int
) -> tuple[int, int]:
    if window_size is not None:
        return to_2tuple(window_size)
    window = tuple(side // window_ratio for side in to_2tuple(img_size))
    if min(window) < 1:
        raise ValueError(
            f"img_size={img_size} gives no window at window_ratio={window_ratio}; use at least {window_ratio} pixels, "
            "or set window_size"
        )
    return window


def _variant(embed_dim: int, depths: Sequence[int], stem_width: int = 64) -> Variant:
    dims = tuple(embed_dim * 2**stage for stage in range(4))
    return Variant({"stem_width": stem_width, "embed_dims": dims, "depths": depths})


VARIANTS = {
    "maxvit_pico": Variant(
        {"img_size": 32, "window_size": 4, "stem_width": 32, "embed_dims": (32, 64, 96, 128), "depths": (1, 1, 1, 1)},
        {"input_size": (3, 32, 32), "pool_size": (1, 1), "crop_pct": 1.0},
    ),
    "maxvit_tiny": _variant(64, (2, 2, 5, 2)),
    "maxvit_small": _variant(96, (2, 2, 5, 2)),
    "maxvit_base": _variant(96, (2, 6, 14, 2)),
    "maxvit_large": _variant(128, (2, 6, 14, 2), 128),
    "maxvit_xlarge": _variant(192, (2, 6, 14, 2), 192),
}

default_cfgs = default_cfgs_of(VARIANTS, RELEASED, first_conv="stem.conv1", crop_pct=0.95)


def _build(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    cfg = kwargs.get("pretrained_cfg")
    if pretrained or cfg:
        # weights for 384 and 512 pixels have windows of 12 and 16
        cfg = resolve_pretrained_cfg(variant, cfg, kwargs.get("pretrained_cfg_overlay"))
        kwargs.setdefault("img_size", cfg.input_size[-2:])
    if not pretrained:
        # the 21k weights have 21843 classes; an untrained network has the official constructor's 1000
        kwargs.setdefault("num_classes", 1000)
    return build_backbone(MaxViT, variant, pretrained, **kwargs)


register_variants(__name__, VARIANTS, _build)
