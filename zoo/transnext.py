"""TransNeXt: attention to neighbours and to a pooled map at once, with a convolutional gated linear unit.

Paper: TransNeXt: Robust Foveal Visual Perception for Vision Transformers (arXiv:2311.17132). Official code:
DaiShiResearch/TransNeXt (Apache-2.0).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Optional, Tuple

import torch
from timm.layers import (
    ClassifierHead,
    LayerNorm,
    calculate_drop_path_rates,
    register_notrace_function,
    trunc_normal_,
    use_fused_attn,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.keys.transnext import LAYOUTS
from ..checkpoints.released.transnext import RELEASED
from ..kernels import aggregated_attention
from ..kernels.aggregated import aggregate, aggregated_attention_scores
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn
from .blocks.activation import gelu
from .blocks.attention import attend_with_bias, becomes_program
from .blocks.embed import ConvEmbed
from .blocks.mlp import ConvGluMlp
from .blocks.pooling import pool_average, pooled_size
from .blocks.position import ContinuousPositionBias
from .blocks.sizes import always
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["TransNeXt", "checkpoint_filter_fn"]

POSITION_BIASES = ("recomputed", "interpolated")
WINDOW = 3

register_notrace_function(aggregated_attention_scores)
register_notrace_function(aggregate)


class LengthScaledAttention(nn.Module):
    """What both attentions of TransNeXt share: cosine attention whose scale grows with the number of keys.

    Args:
        dim: channels of the map, a multiple of ``num_heads``.
        num_heads: number of heads.
        position_bias: bias of the scores of global or pooled keys.
        attn_drop: dropout on the attention weights, which takes the unfused path while training.
        proj_drop: dropout after the output projection.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Source:
        arXiv:2311.17132, sections 3.2 (query embedding) and 3.3 (length-scaled cosine attention).
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        position_bias: ContinuousPositionBias,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.position_bias = position_bias
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        # softplus of this is 1 / 0.24
        nn.init.constant_(self.temperature, math.log(math.expm1(1 / 0.24)))
        trunc_normal_(self.query_embedding, std=0.02)

    def is_fused(self) -> bool:
        """Whether the weights are never formed, as they are for dropout and for hooks."""
        dropping = self.training and self.attn_drop.p > 0.0
        return (self.fused_attn or becomes_program()) and not dropping

    def scale_query(self, query: Tensor, of_query: Tensor, length: Tensor) -> Tensor:
        """The query (B, H, W, heads, head_dim) normalised, with embedding and scale, in fewer passes than one by one.

        Args:
            of_query: its :func:`inverse_norm`.
            length: (H, W) or (1, 1).
        """
        scale = F.softplus(self.temperature[:, 0]) * length.to(of_query.dtype)[:, :, None, None]
        return query * (of_query * scale) + self.query_embedding[:, 0] * scale


class CosineAttention(LengthScaledAttention):
    """Every token attends to every token."""

    def __init__(self, dim: int, num_heads: int, position_bias: ContinuousPositionBias, **kwargs) -> None:
        super().__init__(dim, num_heads, position_bias, **kwargs)
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, [3, self.num_heads, -1]).unbind(3)
        query = self.scale_query(query, inverse_norm(query), log_keys(x, 0, 1))
        bias = self.position_bias(x).to(query.dtype)[None]
        query, key, value = [t.flatten(1, 2).transpose(1, 2) for t in (query, F.normalize(key, dim=-1), value)]
        if self.is_fused():
            attended = attend_with_bias(query, key, value, bias, 1.0)
        else:
            weights = (query @ key.transpose(-2, -1) + bias).softmax(dim=-1)
            attended = self.attn_drop(weights).to(value.dtype) @ value
        attended = attended.transpose(1, 2).unflatten(1, [x.shape[1], x.shape[2]])
        return self.proj_drop(self.proj(attended.flatten(3)))


class AggregatedAttention(LengthScaledAttention):
    """Every token attends to its 3 x 3 neighbours and to all cells of a pooled map, in one softmax.

    Args:
        reduction: side of a pooled cell.
        args, kwargs: see :class:`LengthScaledAttention`.

    Source:
        arXiv:2311.17132, sections 3.1 (pixel-focused attention) and 3.2 (learnable tokens beside the softmax).
    """

    def __init__(
        self, dim: int, num_heads: int, position_bias: ContinuousPositionBias, reduction: int, **kwargs
    ) -> None:
        super().__init__(dim, num_heads, position_bias, **kwargs)
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.window_size = WINDOW
        slots = WINDOW * WINDOW
        self.reduction = reduction
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.pool_proj = nn.Conv2d(dim, dim, 1, **dd)
        self.pool_norm = LayerNorm(dim, eps=1e-5, **dd)
        self.relative_position_bias = nn.Parameter(torch.empty(num_heads, slots, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, slots, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, slots, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        trunc_normal_(self.relative_position_bias, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x).unflatten(-1, [self.num_heads, -1])
        of_query = inverse_norm(query)
        key, value = self.keys_and_values(x)
        pooled_key, pooled_value = self.keys_and_values(self.pool(x))
        value_weights = self.match_tokens(query, of_query)
        query = self.scale_query(query, of_query, log_keys(x, self.window_size, self.reduction))
        pooled_bias = self.position_bias(x)
        if self.is_fused():
            x = self.attend(query, key, value, pooled_key, pooled_value, pooled_bias, value_weights)
        else:
            x = self.attend_by_weights(query, key, value, pooled_key, pooled_value, pooled_bias, value_weights)
        return self.proj_drop(self.proj(x.flatten(3)))

    def match_tokens(self, query: Tensor, of_query: Tensor) -> Tensor:
        """Products (B, H, W, heads, slots) of the normalised queries with the learnable tokens, and their bias.

        Args: of_query: the :func:`inverse_norm` of the queries as they come.
        """
        heads, _, slots = self.learnable_tokens.shape
        # One product with a block-diagonal matrix whose rows are whole vectors of 16 bytes: the gradient of 9 columns
        # for each head took a fifth of a GPU's time for a step of the network.
        own = torch.eye(heads, dtype=self.learnable_tokens.dtype, device=query.device)
        blocks = self.learnable_tokens[:, :, None] * own[:, None, :, None]
        padding = [0, (8 - heads * slots % 8) % 8]
        weight = F.pad(blocks.flatten(2).flatten(0, 1), padding)
        products = F.linear(query.flatten(3), weight.t())[..., : heads * slots]
        return products.unflatten(-1, [heads, slots]) * of_query + self.learnable_bias[:, 0]

    def keys_and_values(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Normalised keys, and values (B, H, W, heads, head_dim), of the map or of the pooled map."""
        key, value = self.kv(x).unflatten(-1, [2, self.num_heads, -1]).unbind(3)
        return F.normalize(key, dim=-1), value

    def pool(self, x: Tensor) -> Tensor:
        """Pooled map (B, H // reduction, W // reduction, dim)."""
        x = gelu(self.pool_proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.pool_norm(pool_average(x, self.reduction))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        pooled_bias: Tensor,
        value_weights: Tensor,
    ) -> Tensor:
        """Attention output, of the shape of ``query``."""
        tensors = (query, key, value, pooled_key, pooled_value)
        bias = self.relative_position_bias
        if torch.jit.is_scripting():
            return torch.ops.vicinal.aggregated_attention(
                query, key, value, pooled_key, pooled_value, self.window_size, bias, pooled_bias, value_weights, 1.0
            )[0]
        return aggregated_attention(
            *tensors,
            window_size=self.window_size,
            local_bias=bias,
            pooled_bias=pooled_bias,
            value_weights=value_weights,
        )

    @torch.jit.unused
    def attend_by_weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        pooled_bias: Tensor,
        value_weights: Tensor,
    ) -> Tensor:
        """The same, with the weights passing through ``attn_drop``, where hooks can read them."""
        bias = self.relative_position_bias
        scores = aggregated_attention_scores(query, key, pooled_key, self.window_size, bias, pooled_bias)
        return aggregate(self.attn_drop(scores.softmax(dim=-1)), value, pooled_value, self.window_size, value_weights)


def inverse_norm(x: Tensor) -> Tensor:
    """What normalises the vectors (..., dim) as a factor (..., 1), as F.normalize takes it."""
    return x.norm(p=2.0, dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()


@register_notrace_function
def log_keys(x: Tensor, window_size: int, reduction: int) -> Tensor:
    """Logarithm of the number of keys of each token of a map (B, H, W, C): neighbours inside the map and pooled cells.

    Returns:
        (H, W), or (1, 1) without neighbours.
    """
    height, width = x.shape[1], x.shape[2]
    pooled = pooled_size(height, reduction) * pooled_size(width, reduction)
    if window_size == 0:
        return (torch.zeros(1, 1, device=x.device) + pooled).log()
    down = _neighbours(height, window_size, x)
    across = down if always(height == width) else _neighbours(width, window_size, x)
    return (down[:, None] * across + pooled).log()


def _neighbours(size: int, window_size: int, like: Tensor) -> Tensor:
    """How many places of a window around each token of an axis lie inside the axis."""
    before = torch.arange(size, device=like.device).clamp(max=window_size // 2)
    return before + before.flip(0) + 1


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
        dd = {"device": device, "dtype": dtype}
        check_per_stage(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, reductions=reductions
        )
        if position_bias not in POSITION_BIASES:
            raise ValueError(f"position_bias={position_bias!r} must be one of {', '.join(POSITION_BIASES)}")
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
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
