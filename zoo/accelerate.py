"""Faster attention for models that timm built: the same modules and weights, computed by :mod:`vicinal.kernels`.

Each class below is one of timm's with the one method overridden that computes the attention. :func:`accelerate` turns
modules into these classes in place, so that parameters, buffers, names, hooks and ``set_input_size`` are untouched.
"""

import inspect
import re
from dataclasses import dataclass
from math import isqrt
from typing import Any, Callable, Mapping, Optional, Sequence, Tuple, cast

import timm
import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp, register_notrace_function, register_notrace_module
from timm.layers.halo_attn import HaloAttn
from timm.models import convit, davit, maxxvit, swin_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import gated_positional_attention, halo_attention, window_attention
from .backbone import check_legacy_onnx
from .blocks.gated import position_offsets
from .blocks.halo import relative_logits
from .blocks.padding import crop, pad_to_multiple


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` did.

    Attributes:
        changed: operator of :mod:`vicinal.kernels` by the name of the module that calls it now.
        left: class by the name of each attention module that stays timm's.
    """

    changed: Mapping[str, str]
    left: Mapping[str, str]


def accelerate(model: nn.Module) -> Acceleration:
    """Let the operators of :mod:`vicinal.kernels` compute the attention of a timm model, in place.

    Weights, their names, the state dict and the numbers stay (within rounding, gradients included); saving, loading,
    ``features_only``, ``set_input_size``, ``torch.compile`` and FX go on working. While training with dropout on the
    attention weights a module computes as timm does. Call it before ``torch.compile``. TorchScript needs the original.

    Args:
        model: Swin (first version), MaxViT, MaxxViT, CoAtNet, DaViT, ConViT, HaloNet, or what is built of their blocks.

    Returns:
        The modules that changed, and the attention that is left as it is. Nothing changes the second time.

    Raises:
        ValueError: there is no attention that the operators compute; names what there is, and what is known.
        RuntimeError: this timm does not call the method that would be overridden. Nothing is changed then.
    """
    known: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    _survey(model, "", known, left)
    if not known:
        raise ValueError(_refusal(model, left))
    for kind in {type(module) for module in known.values()} & set(REPLACEMENTS):
        _check_override(kind, REPLACEMENTS[kind].overrides)
    changed: dict[str, str] = {}
    for name, module in known.items():
        if (kind := type(module)) in REPLACEMENTS:
            module.__class__ = cast(type[nn.Module], REPLACEMENTS[kind])
            changed[name] = REPLACEMENTS[kind].operator
    return Acceleration(changed, left)


def _survey(module: nn.Module, name: str, known: dict[str, nn.Module], left: dict[str, str]) -> None:
    """Sort the attention below a module into what the operators compute and what they do not."""
    replacement = REPLACEMENTS.get(type(module))
    if type(module) in REPLACEMENTS.values() or (replacement and replacement.accepts(module)):
        known[name] = module
        return
    before = len(known) + len(left)
    for child_name, child in module.named_children():
        _survey(child, f"{name}.{child_name}" if name else child_name, known, left)
    if len(known) + len(left) == before and _ATTENTION.search(type(module).__name__):
        left[name] = type(module).__name__


def _check_override(kind: type[nn.Module], method: str) -> None:
    """Refuse a class of timm's whose forward does not lead to the method: timm's computation would run on, unseen."""
    called, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        function = getattr(kind, name, None)
        if name not in called and inspect.isfunction(function):
            called.add(name)
            waiting += inspect.unwrap(function).__code__.co_names
    if method not in called:
        raise RuntimeError(
            f"{kind.__module__}.{kind.__name__} of timm {timm.__version__} does not compute its attention by "
            f"{method}(), which accelerate() replaces; install a version of timm that vicinal declares"
        )


_ATTENTION = re.compile("Attn|Attention|MHSA|GPSA|LambdaLayer")


def _refusal(model: nn.Module, left: Mapping[str, str]) -> str:
    found = [f"{kind} ({sum(1 for other in left.values() if other == kind)})" for kind in dict.fromkeys(left.values())]
    known = [f"{kind.__module__.removeprefix('timm.')}.{kind.__name__}" for kind in REPLACEMENTS]
    return (
        f"{type(model).__name__} has no attention that vicinal.kernels computes. "
        f"Found: {', '.join(found) or 'no attention'}. Known, of timm: {', '.join(known)}"
    )


class Accelerated:
    """What the classes below share.

    Attributes:
        operator: of :mod:`vicinal.kernels` that computes the attention.
        overrides: method of timm's class that computes it there.
        legacy_onnx: see :class:`vicinal.zoo.backbone.Backbone`.
    """

    operator: str
    overrides: str = "forward"
    legacy_onnx: str = "one size"

    @staticmethod
    def accepts(module: Any) -> bool:
        """Whether the class can take the place of this module's."""
        raise NotImplementedError

    def check_export(self) -> None:
        """Refuse what ONNX's TorchScript-based exporter would write wrongly of the operator."""
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            check_legacy_onnx(f"an accelerated {type(self).__name__}", self.legacy_onnx)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse torch.jit.script, which calls this and cannot compile methods that call those of timm's class."""
        raise RuntimeError(
            f"torch.jit.script takes no accelerated {type(self).__name__}: script the network that timm built, without "
            "accelerate(), or use torch.compile"
        )


class SwinTransformerBlock(Accelerated, swin_transformer.SwinTransformerBlock):
    """Windows, shifted ones too. timm adds -100 where tokens of a window must not see each other; here it is -inf."""

    operator = "window_attention"
    overrides = "_attn"

    @staticmethod
    def accepts(module: swin_transformer.SwinTransformerBlock) -> bool:
        return type(module.attn) is swin_transformer.WindowAttention

    def forward(self, x: Tensor) -> Tensor:
        # FX leaves untraced what the module of the forward method says, and the padding below must be
        return super().forward(x)

    def _attn(self, x: Tensor) -> Tensor:
        self.check_export()
        attn, window, shift = self.attn, self.window_size, self.shift_size
        if _drops_weights(attn):
            return super()._attn(x)
        height, width = x.shape[1], x.shape[2]
        query, key, value = attn.qkv(pad_shifted(x, window, shift)).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
        table = _reversed_table(attn.relative_position_bias_table.t().unflatten(1, _table_size(window)))
        x = window_attention(
            query, key, value, window, shift=shift, relative_position_bias=table, scale=attn.scale
        ).flatten(3)
        return crop_shifted(attn.proj_drop(attn.proj(x)), height, width, window, shift)


class PartitionAttentionCl(Accelerated, maxxvit.PartitionAttentionCl):
    """Windows or a grid of a map (B, H, W, C)."""

    operator = "window_attention"
    overrides = "_partition_attn"

    @staticmethod
    def accepts(module: maxxvit.PartitionAttentionCl) -> bool:
        return _has_known_bias(module.attn)

    def _partition_attn(self, x: Tensor) -> Tensor:
        self.check_export()
        if _drops_weights(self.attn):
            return super()._partition_attn(x)
        return _attend_partition(self.attn, x, self.partition_size, "block" if self.partition_block else "grid")


class PartitionAttention2d(Accelerated, maxxvit.PartitionAttention2d):
    """Windows or a grid of a map (B, C, H, W)."""

    operator = "window_attention"
    overrides = "_partition_attn"

    @staticmethod
    def accepts(module: maxxvit.PartitionAttention2d) -> bool:
        return _has_known_bias(module.attn)

    def _partition_attn(self, x: Tensor) -> Tensor:
        self.check_export()
        if _drops_weights(self.attn):
            return super()._partition_attn(x)
        return _attend_partition_2d(self.attn, x, self.partition_size, "block" if self.partition_block else "grid")


class ParallelPartitionAttention(Accelerated, maxxvit.ParallelPartitionAttention):
    """Windows and a grid of a map (B, H, W, C), side by side."""

    operator = "window_attention"
    overrides = "_partition_attn"

    @staticmethod
    def accepts(module: maxxvit.ParallelPartitionAttention) -> bool:
        return _has_known_bias(module.attn_block) and _has_known_bias(module.attn_grid)

    def _partition_attn(self, x: Tensor) -> Tensor:
        self.check_export()
        if _drops_weights(self.attn_block):
            return super()._partition_attn(x)
        block = _attend_partition(self.attn_block, x, self.partition_size, "block")
        return torch.cat([block, _attend_partition(self.attn_grid, x, self.partition_size, "grid")], dim=-1)


class Attention2d(Accelerated, maxxvit.Attention2d):
    """CoAtNet: one window, of the size of the map (B, C, H, W)."""

    operator = "window_attention"

    @staticmethod
    def accepts(module: maxxvit.Attention2d) -> bool:
        return module.rel_pos is not None and _has_known_bias(module)

    def forward(self, x: Tensor, shared_rel_pos: Optional[Tensor] = None) -> Tensor:
        self.check_export()
        if _drops_weights(self) or shared_rel_pos is not None:
            return super().forward(x, shared_rel_pos)
        window = tuple(cast(RelPosBias, self.rel_pos).window_size)
        torch._assert(x.shape[2] == window[0], "the height of the map must be that of the relative positions")
        torch._assert(x.shape[3] == window[1], "the width of the map must be that of the relative positions")
        return _attend_partition_2d(self, x, window, "block")


class SpatialBlock(Accelerated, davit.SpatialBlock):
    """DaViT's windows. Its attention between channels is no attention between tokens, and stays."""

    operator = "window_attention"

    @staticmethod
    def accepts(module: davit.SpatialBlock) -> bool:
        return type(module.attn) is davit.WindowAttention

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        x = self.cpe2(x.permute(0, 3, 1, 2))
        if self.mlp is None:
            return x
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)

    def _attend(self, x: Tensor) -> Tensor:
        self.check_export()
        attn, window = self.attn, list(self.window_size)
        qkv = attn.qkv(pad_to_multiple(x, window)).unflatten(-1, (3, attn.num_heads, -1))
        query, key, value = qkv.unbind(3)
        attended = window_attention(query, key, value, window, scale=attn.scale)
        return crop(attn.proj(attended.flatten(3)), x.shape[1], x.shape[2])


@register_notrace_module  # as timm's own: it keeps the coordinates of the last size
class GPSA(Accelerated, convit.GPSA):
    """ConViT's tokens (B, N, C), which attend by content and by position."""

    operator = "gated_positional_attention"

    @staticmethod
    def accepts(module: convit.GPSA) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        self.check_export()
        if self.rel_indices.shape[1] != x.shape[1]:
            # timm's own computation asks a linear layer for its weight, which quantized ones and adapters lack
            side, like = isqrt(x.shape[1]), self.rel_indices
            offsets = position_offsets([side, side], like.device, like.dtype)
            self.rel_indices = offsets.reshape(1, x.shape[1], x.shape[1], 3)
        if _drops_weights(self):
            return super().forward(x)
        scores = self.pos_proj(self.rel_indices)[0].permute(2, 0, 1)  # (heads, N, N)
        query, key = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        value = self.v(x).unflatten(-1, (self.num_heads, -1))
        x = gated_positional_attention(query, key, value, scores, self.gating_param, scale=self.scale)
        return self.proj_drop(self.proj(x.flatten(2)))


class HaloAttention(Accelerated, HaloAttn):
    """HaloNet's blocks of a map (B, C, H, W) that they divide."""

    operator = "halo_attention"
    legacy_onnx = "nothing"  # it gets the shapes of blocks wrong

    @staticmethod
    def accepts(module: HaloAttn) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        self.check_export()
        query = self.q(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.dim_head_qk))
        keys_and_values = self.kv(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))
        key, value = keys_and_values[..., : self.dim_head_qk], keys_and_values[..., self.dim_head_qk :]
        tables = self.pos_embed.height_rel, self.pos_embed.width_rel
        rows, columns = relative_logits(query, *tables, self.block_size_ds, self.win_size)
        if self.scale_pos_embed:
            rows, columns = rows * self.scale, columns * self.scale
        x = halo_attention(
            query,
            key,
            value,
            self.block_size,
            self.halo_size,
            relative_height_logits=rows,
            relative_width_logits=columns,
            scale=self.scale,
        )
        return self.pool(x.flatten(3).permute(0, 3, 1, 2))


REPLACEMENTS: dict[type[nn.Module], type[Accelerated]] = {
    swin_transformer.SwinTransformerBlock: SwinTransformerBlock,
    maxxvit.PartitionAttentionCl: PartitionAttentionCl,
    maxxvit.PartitionAttention2d: PartitionAttention2d,
    maxxvit.ParallelPartitionAttention: ParallelPartitionAttention,
    maxxvit.Attention2d: Attention2d,
    davit.SpatialBlock: SpatialBlock,
    convit.GPSA: GPSA,
    HaloAttn: HaloAttention,
}
"""Our class for each of timm's."""


def _drops_weights(attn: Any) -> bool:
    return attn.training and attn.attn_drop.p > 0.0


def _attend_partition(attn: maxxvit.AttentionCl, x: Tensor, window: Sequence[int], partition: str) -> Tensor:
    """The attention of MaxViT's kind on a map (B, H, W, C)."""
    query, key, value = _split_heads(attn, attn.qkv(x))
    x = window_attention(
        query,
        key,
        value,
        tuple(window),
        partition=partition,
        relative_position_bias=_bias_table(attn.rel_pos),
        scale=attn.scale,
    )
    return attn.proj_drop(attn.proj(x.flatten(3)))


def _attend_partition_2d(attn: maxxvit.Attention2d, x: Tensor, window: Sequence[int], partition: str) -> Tensor:
    """The same on a map (B, C, H, W), whose projections are convolutions."""
    query, key, value = _split_heads(attn, attn.qkv(x).permute(0, 2, 3, 1))
    x = window_attention(
        query,
        key,
        value,
        tuple(window),
        partition=partition,
        relative_position_bias=_bias_table(attn.rel_pos),
        scale=attn.scale,
    )
    return attn.proj_drop(attn.proj(x.flatten(3).permute(0, 3, 1, 2)))


def _split_heads(attn: nn.Module, qkv: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, W, heads, head_dim) of a packed projection (B, H, W, channels)."""
    if attn.head_first:
        query, key, value = qkv.unflatten(-1, (attn.num_heads, 3, attn.dim_head)).unbind(4)
    else:
        query, key, value = qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head)).unbind(3)
    return query, key, value


def _has_known_bias(attn: nn.Module) -> bool:
    return type(attn) in (maxxvit.AttentionCl, maxxvit.Attention2d) and (
        attn.rel_pos is None or (type(attn.rel_pos) in _TABLES and not getattr(attn.rel_pos, "prefix_tokens", 0))
    )


def _bias_table(rel_pos: Optional[nn.Module]) -> Optional[Tensor]:
    return None if rel_pos is None else _TABLES[type(rel_pos)](rel_pos)


def _table_size(window: Sequence[int]) -> Tuple[int, int]:
    return 2 * window[0] - 1, 2 * window[1] - 1


def _reversed_table(table: Tensor) -> Tensor:
    """A table (heads, rows, columns) that is read at query - key, as the operator reads it, at key - query."""
    return table.flip(1, 2)


def _mlp_table(rel_pos: RelPosMlp) -> Tensor:
    bias = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log))  # (rows, columns, heads)
    return _reversed_table((bias if rel_pos.bias_gain is None else rel_pos.bias_gain * bias).permute(2, 0, 1))


def _flat_table(rel_pos: RelPosBias) -> Tensor:
    table = rel_pos.relative_position_bias_table  # (rows * columns, heads)
    return _reversed_table(table.t().unflatten(1, _table_size(rel_pos.window_size)))


_TABLES: dict[type[nn.Module], Callable[[Any], Tensor]] = {
    RelPosBias: _flat_table,
    RelPosBiasTf: lambda rel_pos: rel_pos.relative_position_bias_table,
    RelPosMlp: _mlp_table,
}
"""How the bias table of the operator, (heads, 2 * window - 1 per axis), comes from each of timm's position modules."""


@register_notrace_function
def pad_shifted(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Pad a map (B, H, W, C) so that the shift of the operator makes timm's windows.

    timm shifts first and pads then. And where one window covers an axis, blocks that take maps of any size shift and
    divide it, which the operator does to the last of several windows: one of zeros comes before it.
    """
    rows, columns = _windows_before(x.shape[1], x.shape[2], window, shift)
    if x.shape[1] % window[0] == 0 and x.shape[2] % window[1] == 0 and rows == columns == 0:
        return x
    padded = pad_to_multiple(x.roll((-shift[0], -shift[1]), (1, 2)), list(window))
    return F.pad(padded, (0, 0, columns, 0, rows, 0)).roll(tuple(shift), (1, 2))


@register_notrace_function
def crop_shifted(x: Tensor, height: int, width: int, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Take off what :func:`pad_shifted` added."""
    if x.shape[1] == height and x.shape[2] == width:
        return x
    rows, columns = _windows_before(height, width, window, shift)
    x = x.roll((-shift[0], -shift[1]), (1, 2))[:, rows : rows + height, columns : columns + width]
    return x.roll(tuple(shift), (1, 2))


def _windows_before(height: int, width: int, window: Sequence[int], shift: Sequence[int]) -> Tuple[int, int]:
    """Rows and columns of the window of zeros that :func:`pad_shifted` puts before a single one that is shifted."""
    rows = window[0] if shift[0] > 0 and height <= window[0] else 0
    return rows, window[1] if shift[1] > 0 and width <= window[1] else 0
