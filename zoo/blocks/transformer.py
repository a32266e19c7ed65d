"""The pre-norm residual block of channels-last maps that the families share."""

from functools import partial
from typing import Callable, Optional

from timm.layers import DropPath, LayerNorm, LayerScale, Mlp
from torch import Tensor, nn

from .activation import GELU
from .position import ConvPositionEncoding


class TransformerBlock(nn.Module):
    """``x + attn(norm(x))``, then ``x + mlp(norm(x))``, each with optional position encoding and layer scale.

    Args:
        dim: channels of the map (B, H, W, dim).
        attn: token mixer on such maps.
        mlp_ratio: hidden width of the MLP as a multiple of ``dim``.
        position_encodings: depthwise convolutions added before the attention (1) and before the MLP (2); 0 for none.
        init_values: initial layer scale, None for none.
        proj_drop: dropout inside the MLP.
        drop_path: rate of stochastic depth.
        norm_eps: of both norms.
        act_layer: class of the MLP's activation.
        mlp: feed-forward network on such maps, in place of the linear one that the other options describe.

    Shape:
        (B, H, W, dim) to the same, or what ``attn`` takes besides, such as tokens (B, N, dim) without encodings.

    Source:
        Vaswani et al., arXiv:1706.03762, section 3.1, with norms first; layer scale: Touvron et al., arXiv:2103.17239,
        section 2.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        position_encodings: int = 0,
        init_values: Optional[float] = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        act_layer: type[nn.Module] = GELU,
        mlp: Optional[nn.Module] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm = partial(LayerNorm, dim, eps=norm_eps, **dd)
        scale: Callable[[], nn.Module] = nn.Identity
        if init_values is not None:
            scale = partial(LayerScale, dim, init_values=init_values, **dd)
        encodings: list[nn.Module] = [ConvPositionEncoding(dim, **dd) for _ in range(position_encodings)]
        encodings += [nn.Identity() for _ in range(2 - position_encodings)]
        self.cpe1, self.cpe2 = encodings
        self.norm1 = norm()
        self.attn = attn
        self.ls1 = scale()
        self.norm2 = norm()
        self.mlp = mlp or Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = self.cpe2(x)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
