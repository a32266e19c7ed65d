"""SHViT: a patchifying stem of stride 16 and attention of one head over a part of the channels.

Paper: SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (arXiv:2401.16456). Official code:
ysj9909/SHViT (MIT). The parameters of the stages are named as in timm's ``shvit``.
"""

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any, Tuple, Union, cast

import torch
from timm.layers import ClassifierHead, DropPath, GroupNorm1, SqueezeExcite
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..checkpoints.keys.shvit import LAYOUTS
from ..checkpoints.released.shvit import RELEASED
from .backbone import Backbone, Stage, build_backbone, check_per_stage, checkpoint_filter_fn, drop_path_rates
from .blocks.base import aggregate_all
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["SHViT", "checkpoint_filter_fn"]


class ConvNorm(nn.Sequential):
    """Convolution without bias, padded by half its kernel, and batch norm; ``fuse`` makes one convolution of both."""

    def __init__(
        self, in_chans: int, out_chans: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, **dd
    ) -> None:
        conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, **dd)
        super().__init__(OrderedDict(c=conv, bn=nn.BatchNorm2d(out_chans, **dd)))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        bn: Any = self.bn
        fused = cast(nn.Conv2d, deepcopy(self.c))
        fused.weight, fused.bias = fuse_conv_bn_weights(
            fused.weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        return fused


class NormLinear(nn.Sequential):
    """Batch norm before a linear layer; ``fuse`` makes one linear layer of both."""

    def __init__(self, in_features: int, out_features: int, **dd) -> None:
        super().__init__(
            OrderedDict(bn=nn.BatchNorm1d(in_features, **dd), l=nn.Linear(in_features, out_features, **dd))
        )

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        bn: Any = self.bn
        fused = cast(nn.Linear, deepcopy(self.l))
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        fused.bias.add_(fused.weight @ (bn.bias - bn.running_mean * scale))
        fused.weight.mul_(scale)
        return fused


class Residual(nn.Module):
    """``x + m(x)``; ``fuse`` adds the identity to the centre of a depthwise convolution."""

    def __init__(self, m: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.m(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        if not isinstance(self.m, ConvNorm):
            return self
        fused = self.m.fuse()
        fused.weight[:, 0, 1, 1] += 1.0
        return fused


class PlainAttention(nn.Module):
    """Attention of (B, tokens, channels), with its weights where timm's ``AttentionExtract`` looks for them.

    Attributes:
        attn_drop: what the weights (B, tokens, tokens) pass through, for hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = nn.Identity()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attn_drop(self.weights(query, key)) @ value

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax weights (B, tokens, tokens)."""
        return (query @ key.transpose(1, 2)).softmax(dim=2)


class SingleHeadAttention(nn.Module):
    """Attention of one head over the first channels of a map; the others join at the output projection.

    Args:
        dim: channels of the map.
        partial_dim: channels that attend, and that are values.
        key_dim: channels of queries and keys.

    Shape:
        (B, dim, H, W) to the same.

    Source:
        arXiv:2401.16456, section 3.2.
    """

    input_fmt = "NCHW"

    def __init__(self, dim: int, partial_dim: int, key_dim: int = 16, **dd) -> None:
        super().__init__()
        self.splits = [partial_dim, dim - partial_dim]
        self.qkv_splits = [key_dim, key_dim, partial_dim]
        self.scale = key_dim**-0.5
        self.pre_norm = GroupNorm1(partial_dim, **dd)
        self.attn = PlainAttention()
        self.qkv = ConvNorm(partial_dim, 2 * key_dim + partial_dim, **dd)
        self.proj = nn.Sequential(nn.ReLU(inplace=True), ConvNorm(dim, dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        attending, rest = x.split(self.splits, dim=1)
        query, key, value = self.project(attending)
        attended = self.attn(query, key, value).transpose(1, 2).unflatten(2, [x.shape[2], x.shape[3]])
        return self.proj(torch.cat([attended, rest], dim=1))

    def project(self, attending: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values (B, H * W, channels) of the channels that attend."""
        tokens = self.qkv(self.pre_norm(attending)).flatten(2).transpose(1, 2)
        query, key, value = tokens.split(self.qkv_splits, dim=2)
        return query * self.scale, key, value

    @torch.jit.ignore
    def pad(self, x: Tensor) -> Tensor:
        """See :class:`vicinal.zoo.blocks.AttentionModule`: the map as it is."""
        return x

    @torch.jit.ignore
    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, 1, H * W) of the queries of a map (B, dim, H, W)."""
        query, key, _ = self.project(x[:, : self.splits[0]])
        return self.attn.weights(query, key).unflatten(1, x.shape[2:])[:, :, :, None]

    @torch.jit.ignore
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of values (B, H, W, 1, channels) by weights, of the shape of ``value``."""
        return aggregate_all(weights, value)


class FeedForward(nn.Sequential):
    """Two pointwise convolutions with batch norm, through twice the channels."""

    def __init__(self, dim: int, **dd) -> None:
        layers = {
            "pw1": ConvNorm(dim, 2 * dim, **dd),
            "act": nn.ReLU(inplace=True),
            "pw2": ConvNorm(2 * dim, dim, **dd),
        }
        super().__init__(OrderedDict(layers))


class BasicBlock(nn.Sequential):
    """Depthwise convolution, attention (if any channels attend) and feed-forward network, each residual."""

    def __init__(self, dim: int, partial_dim: int, drop_path: float = 0.0, **dd) -> None:
        residual = partial(Residual, drop_path=drop_path)
        mixer = residual(SingleHeadAttention(dim, partial_dim, **dd)) if partial_dim else nn.Identity()
        conv, ffn = residual(_depthwise(dim, **dd)), residual(FeedForward(dim, **dd))
        super().__init__(OrderedDict(conv=conv, mixer=mixer, ffn=ffn))


class InvertedMerging(nn.Sequential):
    """Halves the map by a depthwise convolution inside an inverted bottleneck with squeeze and excitation."""

    def __init__(self, in_chans: int, out_chans: int, **dd) -> None:
        hidden = 4 * in_chans
        layers = {
            "conv1": ConvNorm(in_chans, hidden, **dd),
            "act1": nn.ReLU(inplace=True),
            "conv2": ConvNorm(hidden, hidden, 3, 2, groups=hidden, **dd),
            "act2": nn.ReLU(inplace=True),
            "se": SqueezeExcite(hidden, 0.25, **dd),
            "conv3": ConvNorm(hidden, out_chans, **dd),
        }
        super().__init__(OrderedDict(layers))


class BatchNormClassifierHead(ClassifierHead):
    """timm's classifier with a batch norm before it, and optionally a second one that learns from a teacher.

    Args:
        distilled: have the second classifier. The logits are the mean of both, except in training after
            ``set_distilled_training``, when both are returned.
        args, kwargs: as for timm's ``ClassifierHead``.
    """

    def __init__(self, *args, distilled: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.distilled = distilled
        self.distilled_training = False
        self._add_norms()

    def reset(self, *args, **kwargs) -> None:
        super().reset(*args, **kwargs)
        self._add_norms()

    def _add_norms(self) -> None:
        linear, self.fc_dist = self.fc, None
        if isinstance(linear, nn.Identity):
            return
        dd = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        build = partial(NormLinear, self.num_features, linear.out_features, **dd)
        self.fc = build().train(self.training)
        if self.distilled:
            self.fc_dist = build().train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False):
        x = self.drop(self.global_pool(x))
        if pre_logits:
            return x
        logits = self.fc(x)
        if self.fc_dist is not None:
            from_teacher = self.fc_dist(x)
            if self.training and self.distilled_training and not torch.jit.is_scripting():
                return logits, from_teacher
            logits = (logits + from_teacher) / 2
        return logits


class SHViT(Backbone):
    """SHViT.

    Args:
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        partial_dims: channels that attend in each stage, 0 for a stage without attention.
        distilled: add a second classifier for distillation, see ``set_distilled_training``.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS
    legacy_onnx = "any size"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        partial_dims: Sequence[int] = (0, 48, 68),
        distilled: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_per_stage(embed_dims=embed_dims, depths=depths, partial_dims=partial_dims)
        drop_paths = drop_path_rates(drop_path_rate, depths)
        stages = [
            Stage(
                [BasicBlock(dim, partial_dim, drop_path, **dd) for drop_path in rates],
                _downsample(embed_dims[stage - 1], dim, **dd) if stage else None,
            )
            for stage, (dim, partial_dim, rates) in enumerate(zip(embed_dims, partial_dims, drop_paths, strict=True))
        ]
        super().__init__(
            stem=_stem(in_chans, embed_dims[0], **dd),
            stages=stages,
            norm=nn.Identity(),
            head=BatchNormClassifierHead(
                embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, distilled=distilled, **dd
            ),
            widths=embed_dims,
            reductions=[16 * 2**stage for stage in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NCHW",
        )

    def init_module(self, module: nn.Module, name: str, needs_reset: bool) -> None:
        """Besides the shared rules: every residual branch of a block, and every FFN, begins as zero."""
        super().init_module(module, name, needs_reset)
        if name.endswith((".conv.m.bn", ".proj.1.bn", ".pw2.bn")):
            nn.init.zeros_(cast(nn.BatchNorm2d, module).weight)

    @torch.jit.ignore
    def get_classifier(self) -> Union[nn.Module, Tuple[nn.Module, ...]]:
        """The classifier's linear layer, both with ``distilled``."""
        head: Any = self.head
        heads: list[nn.Module] = [head.fc] if head.fc_dist is None else [head.fc, head.fc_dist]
        linears = tuple(cast(nn.Module, fc.l) if isinstance(fc, NormLinear) else fc for fc in heads)
        return linears if len(linears) > 1 else linears[0]

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Have the training forward return the logits of both classifiers, as timm's distillation task wants them."""
        cast(BatchNormClassifierHead, self.head).distilled_training = enable

    def fuse(self) -> "SHViT":
        """Fold every batch norm and every depthwise residual into a convolution, in place, for inference."""
        return cast(SHViT, reparameterize_model(self, inplace=True))


def _depthwise(dim: int, **dd) -> ConvNorm:
    return ConvNorm(dim, dim, 3, groups=dim, **dd)


def _stem(in_chans: int, embed_dim: int, **dd) -> nn.Sequential:
    """Four convolutions of stride 2 with ReLU between them."""
    widths = (in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [ConvNorm(before, after, 3, 2, **dd), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def _downsample(in_chans: int, out_chans: int, **dd) -> nn.Sequential:
    return nn.Sequential(
        Residual(_depthwise(in_chans, **dd)),
        Residual(FeedForward(in_chans, **dd)),
        InvertedMerging(in_chans, out_chans, **dd),
        Residual(_depthwise(out_chans, **dd)),
        Residual(FeedForward(out_chans, **dd)),
    )


def _variant(embed_dims: Sequence[int], depths: Sequence[int], partial_dims: Sequence[int], **cfg) -> Variant:
    return Variant({"embed_dims": embed_dims, "depths": depths, "partial_dims": partial_dims}, cfg)


VARIANTS = {
    "shvit_pico_vicinal": _variant(
        (64, 96, 128), (1, 2, 2), (0, 24, 32), input_size=(3, 64, 64), pool_size=(1, 1), crop_pct=1.0
    ),
    "shvit_s1_vicinal": _variant((128, 224, 320), (2, 4, 5), (0, 48, 68)),
    "shvit_s2_vicinal": _variant((128, 308, 448), (2, 4, 5), (0, 66, 96)),
    "shvit_s3_vicinal": _variant((192, 352, 448), (3, 5, 5), (0, 75, 96)),
    "shvit_s4_vicinal": _variant((224, 336, 448), (4, 7, 6), (0, 72, 96), input_size=(3, 256, 256)),
}

default_cfgs = default_cfgs_of(
    VARIANTS, RELEASED, first_conv="stem.0.c", classifier="head.fc.l", pool_size=(4, 4), license="mit"
)

register_variants(__name__, VARIANTS, partial(build_backbone, SHViT, feature_levels=3))
