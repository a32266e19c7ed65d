"""What the attention layers share: the protocol of attention maps, which form runs, attention of all to all."""

from typing import Final, List, Optional, Protocol, Sequence, Union, runtime_checkable

import torch
from timm.layers import register_notrace_function, to_2tuple, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from .tracing import always, becomes_program, is_eager, is_onnx_export, takes_formula

FEW_SCORES = 1 << 16
"""Of a head, that are stored on a CPU: a map of 16 x 16 tokens."""


@runtime_checkable
class AttentionModule(Protocol):
    """What an attention layer offers for its maps to be drawn; :mod:`vicinal.eval.attend` finds layers by it.

    The three methods are those of layers on channels-last maps (B, H, W, channels). A layer whose ``forward`` takes
    (B, channels, H, W) says so by the attribute ``input_fmt = "NCHW"``; weights and values are channels-last there too.
    Every family has layers with these methods.
    """

    def pad(self, x: Tensor) -> Tensor:
        """The input of ``forward`` at the size at which ``attention_weights`` and ``aggregate`` take it, a map too."""
        ...

    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, keys) of the queries of an input of ``forward``, of any size.

        Where the attention downsamples, H and W are those of its queries.
        """
        ...

    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of the values (B, H, W, heads, channels) of each query's keys, by its weights.

        Of keys that are averages of the map, the values are averages too: a cell's weight is spread over its tokens.
        """
        ...


class AttentionBase(nn.Module):
    """Heads, dropout on the weights, and which of two forms runs: fused, or with the weights formed for all to read.

    Args:
        num_heads: number of heads.
        attn_drop: dropout on the attention weights, which takes the form with weights while training.
        **dims: widths that the heads must divide, by the name of the argument.

    Raises:
        ValueError: a width is not a multiple of ``num_heads``.
    """

    fused_attn: Final[bool]

    def __init__(self, num_heads: int, attn_drop: float = 0.0, **dims: int) -> None:
        super().__init__()
        check_heads(num_heads, **dims)
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.attn_drop = nn.Dropout(attn_drop)

    def drops_weights(self) -> bool:
        """Whether dropout needs the attention weights."""
        return self.training and self.attn_drop.p > 0.0

    def is_fused(self) -> bool:
        """Whether the weights are never formed: by timm's switch and in programs, unless there is dropout on them."""
        return (self.fused_attn or becomes_program()) and not self.drops_weights()

    def pad(self, x: Tensor) -> Tensor:
        """See :class:`AttentionModule`: the map as it is."""
        return x


def check_heads(num_heads: int, **dims: int) -> None:
    """Refuse widths that heads do not divide, each by the name of its argument.

    Raises:
        ValueError: with the width and the number of heads.
    """
    for name, dim in dims.items():
        if dim % num_heads:
            raise ValueError(f"{name}={dim} is not a multiple of num_heads={num_heads}")


def positive_pair(name: str, value: Union[int, Sequence[int]]) -> List[int]:
    """One number for each of two axes, at least 1.

    Raises:
        ValueError: it is neither one number nor two, or too small.
    """
    values = list(to_2tuple(value))
    if len(values) != 2 or min(values) < 1:
        raise ValueError(f"{name}={value} must be one positive number, or one for height and one for width")
    return values


def aggregate_all(weights: Tensor, value: Tensor) -> Tensor:
    """Sum of values (B, H, W, heads, channels) of a whole map by weights (B, H', W', heads, H * W)."""
    values = value.flatten(1, 2).to(weights.dtype)
    return torch.einsum("byxhn,bnhd->byxhd", weights, values).to(value.dtype)


@register_notrace_function
def expand_table(table: Tensor, size: List[int]) -> Tensor:
    """Bias (heads, H * W, H * W) of every pair of a map, from a relative table (heads, 2h - 1, 2w - 1).

    Entry (query, key) is the table at key - query; a table for maps of another size is resized bicubically.
    """
    height, width = size[0], size[1]
    # interpolation to the same size is the identity
    if not (always(table.shape[1] == 2 * height - 1) and always(table.shape[2] == 2 * width - 1)):
        table = F.interpolate(table[None], size=[2 * height - 1, 2 * width - 1], mode="bicubic", align_corners=False)[0]
    rows = torch.arange(height, device=table.device)
    columns = torch.arange(width, device=table.device)
    row_offsets = rows[None, :] - rows[:, None] + height - 1
    column_offsets = columns[None, :] - columns[:, None] + width - 1
    bias = table[:, row_offsets[:, None, :, None], column_offsets[None, :, None, :]]
    return bias.flatten(3, 4).flatten(1, 2)


@register_notrace_function
def attend_with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Optional[Tensor], scale: float) -> Tensor:
    """Attention of (B, heads, tokens, head_dim) to (B, heads, keys, head_dim); bias: (1 or B, heads, tokens, keys).

    A CPU computes few scores faster by two products than by torch's kernel.
    """
    # the decomposition of scaled_dot_product_attention for ONNX has other strides than the operator
    explicit = is_onnx_export() or takes_formula(query, key, value, bias)
    if is_eager():
        # for an empty batch it leaves the bias without a gradient
        explicit = explicit or query.shape[0] == 0 or _has_few_scores(query, key)
    if explicit:
        scores = query * scale @ key.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        return scores.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


@torch.jit.unused
def _has_few_scores(query: Tensor, key: Tensor) -> bool:
    # rounded weights would be less accurate than the kernel's: float32 only
    is_few = query.shape[2] * key.shape[2] <= FEW_SCORES
    return is_few and query.device.type == "cpu" and query.dtype == torch.float32
