"""BiFormer: attention between regions of the map that find each other by their averages.

Paper: BiFormer: Vision Transformer with Bi-Level Routing Attention (arXiv:2303.08810). Official code:
rayleizhu/BiFormer (MIT).
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, List, Optional, Union

import torch
from timm.layers import ClassifierHead, ConvNormAct, calculate_drop_path_rates, register_notrace_module
from torch import Tensor, nn

from ..checkpoints.keys.biformer import LAYOUTS
from ..checkpoints.released.biformer import RELEASED
from ..kernels import routed_attention_packed
from ..kernels.routed import aggregate, as_list, in_form_of, routed_attention_weights
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn
from .blocks.attention import GlobalAttention, positive_pair
from .blocks.embed import ChannelsLastBatchNorm, ConvEmbed
from .blocks.padding import crop, pad_to_multiple
from .blocks.sizes import larger, smaller
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["BiFormer", "checkpoint_filter_fn"]


class EnhancedAttention(GlobalAttention):
    """Attention whose output a depthwise convolution enhances by what lies around each token.

    Args:
        encode_values: the convolution reads the values, else the input.
        **kwargs: see :class:`LocalAttention`.

    Source:
        The locally enhanced position encoding of CSWin (Dong et al., arXiv:2107.00652), section 3.3.
    """

    encode_values: Final[bool]

    def __init__(self, dim: int, num_heads: int, encode_values: bool = True, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.encode_values = encode_values
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype)

    def enhance(self, attended: Tensor, x: Tensor, value: Tensor) -> Tensor:
        if self.encode_values:
            x = value.flatten(3)
        return attended + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module  # its forward is inherited, so torch.fx would not find the functions that it must not enter
class RoutedAttention(EnhancedAttention):
    """Attention of each region of the map to the tokens of the ``topk`` regions whose average keys suit it best.

    The map is zero-padded before the projection to a multiple of the grid, as the official code for dense tasks does.

    Args:
        grid: regions down and across, or one number for both.
        topk: regions that each region attends to.
        **kwargs: see :class:`LocalAttention`.

    Source:
        arXiv:2303.08810, section 3.2. The scale is dim**-0.5, not that of a head, as in the released code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Union[int, Sequence[int]] = 7,
        topk: int = 4,
        **kwargs,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.grid = positive_pair("grid", grid)
        if not 1 <= topk <= self.grid[0] * self.grid[1]:
            raise ValueError(f"topk={topk} must be from 1 to the {self.grid[0] * self.grid[1]} regions of {grid=}")
        self.topk = topk
        self.scale = dim**-0.5

    def pad(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, self.grid)

    def divide(self, x: Tensor) -> Tensor:
        """A map (B, H, W, ...) divided into its regions, (B, rows, y, columns, x, ...), a view."""
        return unflatten_map(x, self.grid)

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse, to a map of the size of ``like``."""
        return flatten_map(x, [like.shape[1], like.shape[2]])

    def average(self, x: Tensor) -> Tensor:
        """Averages (B, rows, columns, ...) of the regions of a map (B, H, W, ...)."""
        return self.divide(x).mean(dim=4).mean(dim=2)  # one axis at a time: both at once take a CPU ten times as long

    def route(self, packed: Tensor) -> Tensor:
        """Routes (B, regions, topk), without gradient: the regions whose average keys suit an average query best."""
        averages = self.average(packed.detach()[:, :, :, :2])  # (B, rows, columns, 2, heads, head_dim)
        query, key = averages.flatten(4).flatten(1, 2).unbind(2)
        return choose_routes(query, key, self.topk)

    def attend_packed(self, packed: Tensor) -> Tensor:
        regions, routes = self.divide(packed), self.route(packed)
        if torch.jit.is_scripting():
            x = torch.ops.vicinal.routed_attention_packed(regions, routes, self.scale)[0]
        else:
            x = routed_attention_packed(regions, routes, scale=self.scale)
        return self.join(x, packed)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend_packed(torch.stack([query, key, value], dim=3))

    @torch.jit.unused
    def attend_by_weights(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights, routes = self.weights_of_routes(query, key)
        values = self.divide(value)
        attended = aggregate(self.attn_drop(weights), as_list(values), routes)
        return self.join(in_form_of(values, attended), value)

    @torch.jit.unused
    def weights_of_routes(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax weights (B, regions, tokens, heads, topk * tokens), and the routes."""
        routes = self.route(torch.stack([query, key], dim=3))
        queries, keys = as_list(self.divide(query)), as_list(self.divide(key))
        return routed_attention_weights(queries, keys, routes, self.scale), routes

    @torch.jit.unused
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, H * W), zero where a region is not routed to.

        Padding that takes part in the softmax has the rest of a sum below one.
        """
        height, width = query.shape[1:3]
        weights, routes = self.weights_of_routes(query, key)
        places = torch.arange(1, height * width + 1, device=query.device).view(1, height, width, 1, 1)
        places = as_list(self.divide(places))[0, routes, :, 0, 0].flatten(2)  # (B, regions, keys); padding is at 0
        everywhere = weights.new_zeros(*weights.shape[:-1], height * width + 1)
        everywhere.scatter_(-1, places[:, :, None, None].expand(weights.shape), weights)
        return self.join(in_form_of(self.divide(query), everywhere[..., 1:]), query)


@register_notrace_module
class ProjectedRoutedAttention(RoutedAttention):
    """The refactored form: regions of ``size // grid`` tokens, and queries, keys and values that are padded with zeros.

    A map that the grid does not divide has more regions than the grid; padding does not count in their averages.
    """

    def pad(self, x: Tensor) -> Tensor:
        return x

    def region(self, x: Tensor) -> List[int]:
        """Height and width of the regions of a map."""
        return [larger(1, x.shape[1] // self.grid[0]), larger(1, x.shape[2] // self.grid[1])]

    def divide(self, x: Tensor) -> Tensor:
        region = self.region(x)
        x = pad_to_multiple(x.flatten(3), region).unflatten(3, x.shape[3:])
        return unflatten_map(x, [x.shape[1] // region[0], x.shape[2] // region[1]])

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        return crop(flatten_map(x, [x.shape[1] * x.shape[2], x.shape[3] * x.shape[4]]), like.shape[1], like.shape[2])

    def average(self, x: Tensor) -> Tensor:
        counts = self.divide(torch.ones_like(x[:1, :, :, :1, :1, :1])).sum(dim=4).sum(dim=2)
        return self.divide(x).sum(dim=4).sum(dim=2) / counts


def unflatten_map(x: Tensor, grid: List[int]) -> Tensor:
    """A map (B, H, W, ...) with its axes split in regions and places, a view (B, rows, y, columns, x, ...)."""
    return x.unflatten(2, [grid[1], x.shape[2] // grid[1]]).unflatten(1, [grid[0], x.shape[1] // grid[0]])


def flatten_map(x: Tensor, size: List[int]) -> Tensor:
    """The inverse of :func:`unflatten_map`; size: height and width of the map."""
    # all at once: torch.export cannot reason about the size of one axis made of a number and a symbol
    return x.flatten(1, 4).unflatten(1, size)


def choose_routes(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """For each average query (B, regions, dim) the ``topk`` best average keys, all if there are fewer."""
    affinity = query @ key.transpose(1, 2)
    return affinity.topk(smaller(topk, affinity.shape[2]), dim=-1)[1]


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
        dd = {"device": device, "dtype": dtype}
        self.swin_layout = swin_layout
        check_per_stage(embed_dims=embed_dims, depths=depths, topks=topks)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        routed = ProjectedRoutedAttention if pad_projected else RoutedAttention

        def attention(stage: int) -> EnhancedAttention:
            dim, topk = embed_dims[stage], topks[stage]
            if topk is not None and dim % head_dim:
                raise ValueError(f"head_dim={head_dim} must divide every width of a routed stage; {embed_dims=}")
            options = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **dd}
            if topk is None:
                return EnhancedAttention(dim, 8, encode_values=pad_projected, qkv_bias=False, **options)
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
