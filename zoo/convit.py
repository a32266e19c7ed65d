"""ConViT: a vision transformer whose first blocks begin as convolutions and learn how far to leave them.

Paper: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (arXiv:2103.10697). The parameters
of the blocks are named as in the official code, facebookresearch/convit, and in timm's ``convit``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, List, Optional, Union, cast

import torch
from timm.layers import (
    ClassifierHead,
    LayerNorm,
    calculate_drop_path_rates,
    global_pool_nlc,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.convert import unflatten_tokens
from ..checkpoints.keys.convit import LAYOUTS
from ..checkpoints.released.convit import RELEASED
from .backbone import Backbone, Stage, build_backbone, checkpoint_filter_fn
from .blocks.attention import PlainAttention
from .blocks.gated import GatedPositionalAttention
from .blocks.padding import pad_to_multiple
from .blocks.tracing import always
from .blocks.transformer import TransformerBlock
from .names import Variant, default_cfgs_of, register_variants

__all__ = ["ConViT", "checkpoint_filter_fn"]

PATCH = 16


class PatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) to a map of patches (B, H / 16, W / 16, dim) with their position embeddings.

    Args:
        img_size: image size that the embeddings (1, height, width, dim) are for; they are resized to maps of another
            size.
    """

    def __init__(self, in_chans: int, dim: int, img_size: Union[int, Sequence[int]], device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size: List[int] = [PATCH, PATCH]
        self.conv = nn.Conv2d(in_chans, dim, PATCH, PATCH, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, *grid_of(img_size), dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), self.patch_size)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + resize_embedding(self.pos_embed, [x.shape[1], x.shape[2]])


@register_notrace_function
def resize_embedding(embedding: Tensor, size: List[int]) -> Tensor:
    """Embeddings (1, height, width, dim) of a grid, interpolated to a map (1, H, W, dim)."""
    # interpolation to the same size is the identity
    if always(size[0] == embedding.shape[1]) and always(size[1] == embedding.shape[2]):
        return embedding
    resized = F.interpolate(embedding.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def grid_of(img_size: Union[int, Sequence[int]]) -> List[int]:
    """Patches down and across of an image."""
    return [-(-side // PATCH) for side in to_2tuple(img_size)]


class ClassToken(nn.Module):
    """Puts a learned token before those of a map: (B, H, W, dim) to (B, 1 + H * W, dim)."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)


class TokenClassifierHead(nn.Module):
    """Classifier on tokens (B, 1 + N, in_features), with the interface of timm's classifier heads.

    Args:
        pool_type: "token" for the class token; "avg", "max" or "avgmax" over the others; "" for all tokens.
    """

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str = "token", drop_rate: float = 0.0, **dd
    ) -> None:
        super().__init__()
        self.num_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self._build(num_classes, pool_type, **dd)

    def _build(self, num_classes: int, pool_type: str, **dd) -> None:
        assert pool_type in ("", "token", "avg", "max", "avgmax"), f"pool_type={pool_type!r} is not supported."
        self.pool_type = pool_type
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.fc.train(self.training)

    def reset(
        self,
        num_classes: int,
        pool_type: Optional[str] = None,
        reset_other: bool = False,
        in_features: Optional[int] = None,
        **dd,
    ) -> None:
        """Replace the classifier; None keeps the pooling and the width. There is nothing else to reset."""
        self.num_features = in_features or self.num_features
        self._build(num_classes, self.pool_type if pool_type is None else pool_type, **dd)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type:
            x = global_pool_nlc(x, self.pool_type)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class ConViT(Backbone):
    """ConViT.

    Every block is a stage of its own, so that features can be taken after any of them. The class token joins before the
    first block of plain attention; features leave it out.

    Args:
        img_size: image size that the position embeddings are for; other sizes, also rectangular ones, resize them.
        global_pool: "token" to classify the class token, else how to pool the others.
        embed_dim: channels.
        depth: number of blocks.
        local_depth: how many of them, the first ones, have gated positional attention.
        num_heads: heads of each block.
        locality_strength: how sharply a head attends to its own offset at first.
        mlp_ratio: hidden width of the MLP as a multiple of its input.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layouts = LAYOUTS

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: Union[int, Sequence[int]] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        local_depth: int = 10,
        num_heads: int = 4,
        locality_strength: float = 1.0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not 0 <= local_depth < depth:
            raise ValueError(f"local_depth={local_depth} must be at least 0 and less than depth={depth}")
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        self.local_depth = local_depth
        dropout: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        local = partial(GatedPositionalAttention, locality_strength=locality_strength)
        block: Callable[..., nn.Module] = partial(
            TransformerBlock, embed_dim, mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, norm_eps=1e-6, **dd
        )
        stages = [
            Stage(
                [
                    block(
                        (local if index < local_depth else PlainAttention)(embed_dim, num_heads, **dropout, **dd),
                        drop_path=rate,
                    )
                ],
                ClassToken(embed_dim, **dd) if index == local_depth else None,
            )
            for index, rate in enumerate(drop_paths)
        ]
        super().__init__(
            stem=PatchEmbed(in_chans, embed_dim, img_size, **dd),
            stages=stages,
            norm=LayerNorm(embed_dim, eps=1e-6, **dd),
            head=cast(ClassifierHead, TokenClassifierHead(embed_dim, num_classes, global_pool, drop_rate, **dd)),
            widths=[embed_dim] * depth,
            reductions=[PATCH] * depth,
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    def as_map(self, x: Tensor, first: Tensor) -> Tensor:
        """A stage's tokens without the class token, in the form of the first map."""
        if x.ndim == 4:
            return x
        return x[:, 1:].unflatten(1, [first.shape[1], first.shape[2]])

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the paper does; the first blocks begin as convolutions."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, GatedPositionalAttention):
                module.initialize_locality()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embeddings and the class token."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """As :meth:`Backbone.adapt_state_dict`; position embeddings of another grid are resized.

        Raises:
            ValueError: a file that does not say which grid its position embeddings are of.
        """
        state_dict = super().adapt_state_dict(state_dict)
        embedding = state_dict.get("stem.pos_embed")
        if embedding is not None:
            embedding = self._unflatten_embedding(embedding)
            resized = resize_embedding(embedding.float(), list(cast(PatchEmbed, self.stem).pos_embed.shape[1:3]))
            state_dict["stem.pos_embed"] = resized.to(embedding.dtype)
        return state_dict

    def _unflatten_embedding(self, embedding: Tensor) -> Tensor:
        """The embeddings (1, height, width, dim) of a file that lists them as tokens, as the official ones do."""
        img_size = getattr(self, "pretrained_model_args", {}).get("img_size")
        if embedding.ndim == 3 and img_size is not None and prod(grid_of(img_size)) == embedding.shape[1]:
            return embedding.unflatten(1, grid_of(img_size))
        height, width = cast(PatchEmbed, self.stem).pos_embed.shape[1:3]
        embedding = unflatten_tokens(embedding, (height, width))
        if embedding.ndim == 3:
            raise ValueError(
                f"stem.pos_embed has {embedding.shape[1]} tokens and does not say of which grid, and this network has "
                f"{height} x {width}: reshape it to (1, height, width, {embedding.shape[2]})"
            )
        return embedding


def _variant(num_heads: int, head_dim: int = 48, args: Optional[dict] = None, **cfg) -> Variant:
    return Variant({"embed_dim": head_dim * num_heads, "num_heads": num_heads, **(args or {})}, cfg)


VARIANTS = {
    "convit_pico_vicinal": _variant(
        4, 32, {"depth": 6, "local_depth": 4, "img_size": 64}, input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0
    ),
    "convit_tiny_vicinal": _variant(4),
    "convit_small_vicinal": _variant(9),
    "convit_base_vicinal": _variant(16),
}

default_cfgs = default_cfgs_of(VARIANTS, RELEASED, first_conv="stem.conv", pool_size=(14, 14))

register_variants(__name__, VARIANTS, partial(build_backbone, ConViT, feature_levels=3))
