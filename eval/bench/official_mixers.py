"""The token mixers of TransNeXt, BiFormer and LITv2 in the order of operations of their authors' plain PyTorch code.

``vicinal bench models --part attention`` measures ours against them: TransNeXt's ``attention_native.py`` (neighbours
by unfold), BiFormer's ``bra_legacy.py`` (keys and values gathered from a repeated view) and LITv2's ``attentions.py``.
They compute with the parameters of our modules, on maps (B, H, W, dim) of one size; what the authors prepare once for a
size is prepared once here too.
"""

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...zoo.blocks.aggregated import AggregatedAttention, CosineAttention, LengthScaledAttention, log_keys
from ...zoo.blocks.attention import GlobalAttention
from ...zoo.blocks.hilo import HighFrequencyAttention, LowFrequencyAttention
from ...zoo.blocks.pooling import cell_bounds
from ...zoo.blocks.routed import ProjectedRoutedAttention, RoutedAttention


class OfficialMixers(nn.Module):
    """Mixers in their official form, each on its map; stands in for :class:`AttentionModules`.

    Args:
        parts: our modules.
        inputs: the map of each.
    """

    def __init__(self, parts: nn.ModuleList, inputs: nn.ParameterList) -> None:
        super().__init__()
        self.parts = nn.ModuleList(official_form(part, image) for part, image in zip(parts, inputs, strict=True))
        self.inputs = inputs

    def forward(self, _: Tensor) -> Tensor:
        return torch.stack([part(image).square().mean() for part, image in zip(self.parts, self.inputs, strict=True)])


def official_mixers(parts: nn.ModuleList, inputs: nn.ParameterList) -> Optional[OfficialMixers]:
    """The official form of all mixers of a network, None if that is not known for one of them."""
    known = all(_form_of(part) is not None for part in parts)
    return OfficialMixers(parts, inputs) if known else None


def official_form(module: nn.Module, image: Tensor) -> nn.Module:
    """A mixer in its official form, with the parameters of ours, for maps of the size of ``image``."""
    return _form_of(module)(module, image.shape[1], image.shape[2])


def _form_of(module: nn.Module) -> Optional[type[nn.Module]]:
    if isinstance(module, ProjectedRoutedAttention):
        return None  # the refactored code of BiFormer has another form
    if isinstance(module, GlobalAttention) and (module.lepe is None or module.encode_values):
        return None  # only BiFormer's last stage has the form below
    return next((form for kind, form in FORMS.items() if isinstance(module, kind)), None)


class _Form(nn.Module):
    def __init__(self, ours: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.ours = ours
        self.size = (height, width)


class _LengthScaledForm(_Form):
    """TransNeXt: what depends on the size of the map is prepared once, the bias is computed for the distances that
    occur and gathered."""

    def __init__(self, ours: LengthScaledAttention, height: int, width: int) -> None:
        super().__init__(ours, height, width)
        reduction = getattr(ours, "reduction", 1)
        self.pooled_size = (max(1, height // reduction), max(1, width // reduction))
        like = ours.proj.weight.new_empty(1, height, width, 1)
        length = log_keys(like, getattr(ours, "window_size", 0), reduction)
        self.length = length.expand(height, width).reshape(-1, 1) if length.numel() > 1 else length
        table, self.index = torch.unique(self._coordinates(like.device), dim=0, return_inverse=True)
        self.table = ours.position_bias._log_spaced(table).to(like.dtype)

    def _coordinates(self, device: torch.device) -> Tensor:
        """Distance (down, across) of each token from the centre of each cell, (tokens * cells, 2)."""
        axes = []
        for size, cells in zip(self.size, self.pooled_size, strict=True):
            first, behind = cell_bounds(size, cells, device)
            axes.append(torch.arange(size, device=device)[:, None] - (first + behind - 1) / 2)
        down, across = axes[0][:, None, :, None], axes[1][None, :, None, :]
        return torch.stack(torch.broadcast_tensors(down, across), dim=-1).flatten(0, 3)

    def bias(self) -> Tensor:
        network, tokens = self.ours.position_bias, self.size[0] * self.size[1]
        values = network.fc2(F.relu(network.fc1(self.table), inplace=True)).transpose(0, 1)
        return values[:, self.index].view(self.ours.num_heads, tokens, -1)

    def scale_query(self, query: Tensor) -> Tensor:
        """Normalised query (B, heads, tokens, head_dim) with embedding and scale."""
        return (query + self.ours.query_embedding) * F.softplus(self.ours.temperature) * self.length

    def project(self, x: Tensor) -> Tensor:
        """Attended (B, heads, tokens, head_dim) to the map."""
        return self.ours.proj(x.transpose(1, 2).reshape(len(x), *self.size, -1))


class AggregatedForm(_LengthScaledForm):
    """Aggregated attention with neighbours by unfold."""

    def __init__(self, ours: AggregatedAttention, height: int, width: int) -> None:
        super().__init__(ours, height, width)
        self.unfold = nn.Unfold(ours.window_size, padding=ours.window_size // 2)
        self.outside = self.unfold(ours.proj.weight.new_ones(1, 1, height, width))[0].t() == 0
        self.pool = nn.AdaptiveAvgPool2d(self.pooled_size)

    def forward(self, x: Tensor) -> Tensor:
        ours, batch, heads = self.ours, len(x), self.ours.num_heads
        tokens = self.size[0] * self.size[1]
        x = x.flatten(1, 2)
        query = F.normalize(ours.q(x).reshape(batch, tokens, heads, -1).permute(0, 2, 1, 3), dim=-1)
        scaled = self.scale_query(query)
        local_key, local_value = self.unfold_neighbours(x)
        local = (scaled.unsqueeze(-2) @ local_key).squeeze(-2) + ours.relative_position_bias.unsqueeze(1)
        local = local.masked_fill(self.outside, float("-inf"))
        pooled_key, pooled_value = self.pool_tokens(x)
        pooled = scaled @ F.normalize(pooled_key, dim=-1).transpose(-2, -1) + self.bias()
        weights = ours.attn_drop(torch.cat([local, pooled], dim=-1).softmax(dim=-1))
        slots = local.shape[-1]
        local, pooled = weights.split([slots, weights.shape[-1] - slots], dim=-1)
        local = query @ ours.learnable_tokens + ours.learnable_bias + local
        attended = (local.unsqueeze(-2) @ local_value.transpose(-2, -1)).squeeze(-2)
        return self.project(attended + pooled @ pooled_value)

    def unfold_neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, tokens, head_dim, neighbours)."""
        batch, tokens, _ = x.shape
        heads = self.ours.num_heads
        key, value = self.ours.kv(x).chunk(2, dim=-1)
        key = F.normalize(key.reshape(batch, tokens, heads, -1), dim=-1).reshape(batch, tokens, -1)
        both = torch.cat([key, value], dim=-1).permute(0, 2, 1).reshape(batch, -1, *self.size)
        slots = self.ours.window_size**2
        unfolded = self.unfold(both).reshape(batch, 2 * heads, -1, slots, tokens)
        return unfolded.permute(0, 1, 4, 2, 3).chunk(2, dim=1)

    def pool_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, cells, head_dim)."""
        ours, batch = self.ours, len(x)
        x = x.permute(0, 2, 1).reshape(batch, -1, *self.size).contiguous()
        x = self.pool(F.gelu(ours.pool_proj(x))).flatten(2).permute(0, 2, 1)
        both = ours.kv(ours.pool_norm(x)).reshape(batch, x.shape[1], 2 * ours.num_heads, -1)
        return both.permute(0, 2, 1, 3).chunk(2, dim=1)


class CosineForm(_LengthScaledForm):
    """Cosine attention to all tokens, with its weights stored."""

    def forward(self, x: Tensor) -> Tensor:
        ours, batch = self.ours, len(x)
        packed = ours.qkv(x.flatten(1, 2)).reshape(batch, -1, 3 * ours.num_heads, ours.query_embedding.shape[-1])
        query, key, value = packed.permute(0, 2, 1, 3).chunk(3, dim=1)
        scaled = self.scale_query(F.normalize(query, dim=-1))
        weights = scaled @ F.normalize(key, dim=-1).transpose(-2, -1) + self.bias()
        return self.project(ours.attn_drop(weights.softmax(dim=-1)) @ value)


class RoutedForm(_Form):
    """BiFormer: regions first, keys and values of the routed ones gathered from a view repeated for each region."""

    def forward(self, x: Tensor) -> Tensor:
        ours, batch, dim = self.ours, len(x), x.shape[3]
        rows, columns = ours.grid
        x = F.pad(x, (0, 0, 0, -x.shape[2] % columns, 0, -x.shape[1] % rows))
        padded, region = x.shape[1:3], (x.shape[1] // rows, x.shape[2] // columns)
        x = x.reshape(batch, rows, region[0], columns, region[1], dim).transpose(2, 3).flatten(1, 2)
        query, both = ours.qkv(x).split([dim, 2 * dim], dim=-1)  # (B, regions, y, x, channels)
        averages = query.mean([2, 3]).detach(), both[..., :dim].mean([2, 3]).detach()
        routes = (averages[0] * ours.scale @ averages[1].transpose(-2, -1)).topk(ours.topk, dim=-1)[1]
        value = both[..., dim:].reshape(batch, rows, columns, *region, dim).permute(0, 5, 1, 3, 2, 4)
        enhanced = ours.lepe(value.reshape(batch, dim, *padded)).permute(0, 2, 3, 1)
        key, value = self.gather(both.flatten(2, 3), routes).split([dim, dim], dim=-1)
        key, value, query = (self.to_heads(tensor) for tensor in (key.flatten(2, 3), value.flatten(2, 3), query))
        weights = ((query * ours.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
        attended = (weights @ value).unflatten(0, (batch, rows, columns)).unflatten(4, region)
        attended = attended.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, *padded, dim)
        return ours.proj(attended + enhanced)[:, : self.size[0], : self.size[1]]

    def gather(self, both: Tensor, routes: Tensor) -> Tensor:
        """Keys and values (B, regions, topk, tokens, 2 * dim) of the routed regions."""
        regions, tokens, channels = both.shape[1:]
        repeated = both.unsqueeze(1).expand(-1, regions, -1, -1, -1)
        return repeated.gather(2, routes[..., None, None].expand(-1, -1, -1, tokens, channels))

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, regions, ..., dim) to (B * regions, heads, tokens, head_dim)."""
        heads = self.ours.num_heads
        return x.reshape(x.shape[0] * x.shape[1], -1, heads, x.shape[-1] // heads).transpose(1, 2)


class EnhancedForm(_Form):
    """BiFormer's last stage: plain attention with stored weights."""

    def forward(self, x: Tensor) -> Tensor:
        ours, batch = self.ours, len(x)
        packed = ours.qkv(x.flatten(1, 2)).reshape(batch, -1, 3, ours.num_heads, x.shape[3] // ours.num_heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        enhanced = ours.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        weights = ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1)
        attended = (ours.attn_drop(weights) @ value).transpose(1, 2).reshape(x.shape)
        return ours.proj(attended + enhanced)


class HighForm(_Form):
    """LITv2's attention inside windows: the windows by two permutations, the weights stored."""

    def forward(self, x: Tensor) -> Tensor:
        ours, window = self.ours, self.ours.window_size[0]
        batch, height, width, _ = x.shape
        rows, columns = height // window, width // window
        x = x.reshape(batch, rows, window, columns, window, -1).transpose(2, 3)
        packed = ours.qkv(x).reshape(batch, rows * columns, window**2, 3, ours.num_heads, -1)
        query, key, value = packed.permute(3, 0, 1, 4, 2, 5)
        weights = ((query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5).softmax(dim=-1)
        x = (weights @ value).transpose(2, 3).reshape(batch, rows, columns, window, window, -1)
        return ours.proj(x.transpose(2, 3).reshape(batch, height, width, -1))


class LowForm(_Form):
    """LITv2's attention to averages, with its weights stored."""

    def forward(self, x: Tensor) -> Tensor:
        ours = self.ours
        batch, height, width, dim = x.shape
        query = ours.q(x).reshape(batch, height * width, ours.num_heads, -1).permute(0, 2, 1, 3)
        pooled = x
        if not isinstance(ours.pool, nn.Identity):
            pooled = ours.pool(x.permute(0, 3, 1, 2)).reshape(batch, dim, -1).permute(0, 2, 1)
        key, value = ours.kv(pooled).reshape(batch, -1, 2, ours.num_heads, query.shape[-1]).permute(2, 0, 3, 1, 4)
        weights = ((query @ key.transpose(-2, -1)) * ours.scale).softmax(dim=-1)
        return ours.proj((weights @ value).transpose(1, 2).reshape(batch, height, width, -1))


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    AggregatedAttention: AggregatedForm,
    CosineAttention: CosineForm,
    RoutedAttention: RoutedForm,
    GlobalAttention: EnhancedForm,
    HighFrequencyAttention: HighForm,
    LowFrequencyAttention: LowForm,
}
