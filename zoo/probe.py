"""Attentive probing: a head that attends to the tokens of a frozen network, as a timm model ``attentive_probe``.

Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
arXiv:2506.10178: efficient probing, multi-query cross-attention without projections of queries, keys and outputs.
"""

from typing import Any, Optional, cast

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["AttentiveProbe", "MultiQueryPool"]


class MultiQueryPool(nn.Module):
    """Pool tokens by learned queries, each of which collects its own share of the channels.

    The tokens are the keys, as they are; only the values are projected, and what the queries collect is concatenated.

    Args:
        dim: channels of the tokens and of the result.
        num_queries: must divide ``dim``.
    """

    def __init__(self, dim: int, num_queries: int = 32):
        super().__init__()
        if num_queries < 1 or dim % num_queries:
            fits = max(count for count in range(1, max(num_queries, 1) + 1) if dim % count == 0)
            raise ValueError(f"num_queries {num_queries} must divide the {dim} features of the network, as {fits} does")
        self.scale = dim**-0.5
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.value = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) -> (B, dim)."""
        weights = (x @ (self.queries * self.scale).t()).softmax(dim=1)
        values = self.value(x).unflatten(-1, (len(self.queries), -1))
        return torch.einsum("bnq,bnqd->bqd", weights, values).flatten(1)


class ProbeHead(nn.Module):
    """Pooling by queries, batch norm without learned scale, and the classifier."""

    def __init__(self, dim: int, num_classes: int, num_queries: int):
        super().__init__()
        self.pool = MultiQueryPool(dim, num_queries)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = linear = nn.Linear(dim, num_classes)
            nn.init.trunc_normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, dim) -> (B, num_classes), or (B, dim)."""
        x = self.norm(self.pool(x))
        return x if pre_logits else self.fc(x)


class AttentiveProbe(nn.Module):
    """A network without its classifier, and a head that attends to its last features.

    Args:
        backbone: timm name of the network.
        num_classes: classes; 0 for features.
        num_queries: queries of the head; must divide the network's features.
        backbone_args: further options of the network.
    """

    def __init__(
        self,
        backbone: str = "nat_mini",
        num_classes: int = 1000,
        num_queries: int = 32,
        backbone_args: Optional[dict[str, Any]] = None,
        **kwargs: Any,
    ):
        super().__init__()
        self.backbone = cast(Any, timm.create_model(backbone, num_classes=0, **{**(backbone_args or {}), **kwargs}))
        self.num_features = self.head_hidden_size = self.backbone.num_features
        self.num_classes = num_classes
        self.head = ProbeHead(self.num_features, num_classes, num_queries)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> tokens (B, N, num_features), in row-major order, without class token."""
        x = self.backbone.forward_features(x)
        if x.ndim == 3:
            return x[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        is_last = x.shape[-1] == self.num_features
        if is_last and x.shape[1] == self.num_features:
            is_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return x.flatten(1, 2) if is_last else x.flatten(2).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, num_features) -> (B, num_classes)."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """All that is trained: the pooling and the linear layer."""
        return self.head

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The queries."""
        return {"head.pool.queries"}


default_cfgs = generate_default_cfgs(
    {"attentive_probe.untrained": {"classifier": "head.fc", "input_size": (3, 224, 224), "num_classes": 1000}}
)


@register_model
def attentive_probe(pretrained: bool = False, **kwargs: Any) -> AttentiveProbe:
    """A frozen network with an attentive head; see :class:`AttentiveProbe`."""
    if kwargs.get("features_only"):
        raise ValueError("attentive_probe has no maps of its own: ask its backbone for features_only")
    return build_model_with_cfg(AttentiveProbe, "attentive_probe", pretrained, **kwargs)
