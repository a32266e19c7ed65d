"""The cases of ``vicinal bench ops``: shapes, inputs, what one would write without our operators, and cost floors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ...kernels import (
    aggregated_attention,
    backend,
    halo_attention,
    neighborhood_attention_packed,
    routed_attention_packed,
    window_attention_packed,
)

KERNEL_SIZE = 7
BLOCK_SIZE, HALO_SIZE = 8, 3
POOLED = 49

# (batch, height, width, heads, head_dim); routed attention: (batch, regions, tokens, heads, head_dim, routes).
SHAPES = {
    "neighborhood_attention": {
        "gpu": [
            (128, 56, 56, 2, 32),
            (128, 28, 28, 4, 32),
            (128, 14, 14, 8, 32),
            (128, 7, 7, 16, 32),
            (2, 200, 304, 2, 32),
        ],
        "full": [(8, 56, 56, 2, 32), (8, 28, 28, 4, 32), (8, 14, 14, 8, 32), (8, 7, 7, 16, 32), (1, 112, 112, 2, 32)],
        "small": [(2, 14, 14, 2, 16), (1, 28, 28, 2, 16)],
    },
    "window_attention": {
        "gpu": [(128, 56, 56, 3, 32), (128, 28, 28, 6, 32), (128, 14, 14, 12, 32), (128, 7, 7, 24, 32)],
        "full": [(8, 56, 56, 3, 32), (8, 28, 28, 6, 32), (8, 14, 14, 12, 32), (1, 112, 112, 3, 32)],
        "small": [(2, 14, 14, 2, 16), (1, 28, 28, 2, 16)],
    },
    "halo_attention": {
        "gpu": [(128, 64, 64, 8, 16), (128, 32, 32, 8, 16), (128, 16, 16, 8, 16)],
        "full": [(8, 64, 64, 4, 16), (8, 32, 32, 8, 16), (8, 16, 16, 8, 16)],
        "small": [(1, 16, 16, 2, 16)],
    },
    "aggregated_attention": {
        "gpu": [(128, 56, 56, 3, 24), (128, 28, 28, 6, 24), (128, 14, 14, 12, 24)],
        "full": [(8, 56, 56, 3, 24), (8, 28, 28, 6, 24), (8, 14, 14, 12, 24)],
        "small": [(1, 14, 14, 2, 24)],
    },
    "routed_attention": {
        "gpu": [(128, 49, 64, 2, 32, 1), (128, 49, 16, 4, 32, 4), (128, 49, 4, 8, 32, 16)],
        "full": [(8, 49, 64, 2, 32, 1), (8, 49, 16, 4, 32, 4), (8, 49, 4, 8, 32, 16)],
        "small": [(1, 9, 4, 2, 16, 4)],
    },
}
"""Stages of NAT-Mini, Swin-T, HaloNet, TransNeXt-Tiny and BiFormer: gpu with a batch of 128 at 224 pixels."""


@dataclass(frozen=True)
class Problem:
    """One call, ready to run.

    Attributes:
        leaves: tensors that are differentiated, first a packed projection (batch, *map, 3, heads, head_dim).
        grad_output: gradient of the output.
        implementations: functions of the leaves by name; all compute the same.
        keys: of each query.
    """

    leaves: Sequence[Tensor]
    grad_output: Tensor
    implementations: dict[str, Callable[..., Tensor]]
    keys: int

    def floor(self, step: str) -> tuple[int, int]:
        """Bytes and flops that no implementation avoids: each tensor read or written once, and the matrix products.

        Forward: query, key, value and the other leaves, and the output; two products. Backward: these again with the
        output gradient, and the gradients written; five products.
        """
        packed = self.leaves[0]
        inputs = sum(leaf.nbytes for leaf in self.leaves)
        per_product = 2 * self.grad_output.numel() * self.keys
        forward = inputs + packed.nbytes // 3, 2 * per_product
        backward = 2 * inputs + packed.nbytes // 3, 5 * per_product
        parts = {"forward": [forward], "backward": [backward], "forward+backward": [forward, backward]}[step]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)


def make_problem(
    op: str, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu", flex: bool = False, bias: bool = True
) -> Problem:
    """One call of an operator.

    Args:
        flex: also torch's flex_attention, compiled, where it can express the operator.
        bias: whether windows and neighborhoods have a bias table.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    batch, height, width, heads, head_dim = shape[:5]
    packed = randn(batch, height, width, 3, heads, head_dim)
    grad_output = randn(*shape[:5]).detach()
    table = torch.zeros(heads, *[2 * KERNEL_SIZE - 1] * 2, device=device).normal_(generator=generator).requires_grad_()
    if op in ("window_attention", "neighborhood_attention"):
        ours, eager, mask = (
            (_window, partition_windows, _window_mask)
            if op == "window_attention"
            else (_neighborhood, gather_neighborhoods, _neighborhood_mask)
        )
        implementations = {**_ours(ours), "eager": eager}
        if flex:
            implementations["flex"] = partial(flex_over_map, mask, torch.compile(flex_attention, dynamic=False))
        return Problem((packed, table) if bias else (packed,), grad_output, implementations, KERNEL_SIZE**2)
    if op == "halo_attention":
        side = BLOCK_SIZE + 2 * HALO_SIZE
        logits = [randn(batch, height, width, heads, side) for _ in range(2)]
        return Problem((packed, *logits), grad_output, {**_ours(_halo), "eager": gather_halos}, side**2)
    if op == "aggregated_attention":
        pooled = randn(batch, POOLED, 2, heads, head_dim)
        biases = [randn(heads, 9), randn(heads, height * width, POOLED)]
        return Problem(
            (packed, pooled, *biases), grad_output, {**_ours(_aggregated), "eager": unfold_pooled}, 9 + POOLED
        )
    noise = torch.rand(batch, height, height, generator=generator, device=device)
    routes = noise.argsort(-1)[..., : shape[5]]
    ours = _ours(partial(_routed, routes))
    return Problem((packed,), grad_output, {**ours, "eager": partial(gather_regions, routes)}, shape[5] * width)


def _ours(call: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    def run(name: str, *leaves: Tensor) -> Tensor:
        with backend(name):
            return call(*leaves)

    return {name: partial(run, name) for name in ("tiled", "fused", "reference")}


def _neighborhood(packed: Tensor, table: Tensor | None = None) -> Tensor:
    return neighborhood_attention_packed(packed, KERNEL_SIZE, relative_position_bias=table)


def _window(packed: Tensor, table: Tensor | None = None) -> Tensor:
    return window_attention_packed(packed, KERNEL_SIZE, shift=KERNEL_SIZE // 2, relative_position_bias=table)


def _halo(packed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    logits = {"relative_height_logits": rows, "relative_width_logits": columns}
    return halo_attention(*packed.unbind(3), BLOCK_SIZE, HALO_SIZE, **logits)


def _aggregated(packed: Tensor, pooled: Tensor, local_bias: Tensor, pooled_bias: Tensor) -> Tensor:
    return aggregated_attention(*packed.unbind(3), *pooled.unbind(2), local_bias=local_bias, pooled_bias=pooled_bias)


def _routed(routes: Tensor, packed: Tensor) -> Tensor:
    return routed_attention_packed(packed, routes)


def flex_over_map(mask: Callable, attend: Callable, packed: Tensor, table: Tensor | None = None) -> Tensor:
    """Attention of all tokens of the map under a mask and a score function that reads the bias table.

    Args:
        mask: `mask(height, width)` returns the mask function of flex_attention.
        attend: flex_attention, compiled or not.
    """
    batch, height, width, _, heads, head_dim = packed.shape
    block_mask = _block_mask(mask, height, width, packed.device)

    def score(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = key // width - query // width + KERNEL_SIZE - 1
        across = key % width - query % width + KERNEL_SIZE - 1
        last = 2 * KERNEL_SIZE - 2
        return score + table[head, down.clamp(0, last), across.clamp(0, last)]

    query, key, value = packed.flatten(1, 2).permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, head_dim)
    output = attend(query, key, value, score_mod=None if table is None else score, block_mask=block_mask)
    return output.transpose(1, 2).reshape(batch, height, width, heads, head_dim)


@lru_cache(maxsize=16)
def _block_mask(mask: Callable, height: int, width: int, device: torch.device) -> BlockMask:
    return create_block_mask(mask(height, width), None, None, height * width, height * width, device)


def _neighborhood_mask(height: int, width: int) -> Callable:
    def axis(query: Tensor, key: Tensor, size: int) -> Tensor:
        start = (query - KERNEL_SIZE // 2).clamp(0, size - KERNEL_SIZE)
        return (key >= start) & (key < start + KERNEL_SIZE)

    def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return axis(query // width, key // width, height) & axis(query % width, key % width, width)

    return mask


def _window_mask(height: int, width: int) -> Callable:
    def axis(query: Tensor, key: Tensor, size: int, shift: int) -> Tensor:
        # tokens above the shift form the last window of the cyclic shift, torn from those at the other end
        return (query - shift + KERNEL_SIZE) // KERNEL_SIZE == (key - shift + KERNEL_SIZE) // KERNEL_SIZE

    down, right = _shifts(height, width)

    def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = axis(query // width, key // width, height, down)
        return rows & axis(query % width, key % width, width, right)

    return mask


def gather_halos(packed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Halo attention as HaloNet implementations write it: pad, unfold overlapping windows, and attend."""
    batch, height, width, _, heads, head_dim = packed.shape
    side = BLOCK_SIZE + 2 * HALO_SIZE

    def to_blocks(tokens: Tensor) -> Tensor:  # (batch, rows, columns, heads, queries, channels)
        blocks = tokens.unflatten(2, (-1, BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
        return blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    query, key, value = packed.unbind(3)
    padded = F.pad(torch.stack([key, value]), [0, 0, 0, 0, *[HALO_SIZE] * 4])
    windows = padded.unfold(2, side, BLOCK_SIZE).unfold(3, side, BLOCK_SIZE)
    keys, values = windows.permute(0, 1, 2, 3, 4, 6, 7, 5).flatten(5, 6)
    bias = to_blocks(rows).repeat_interleave(side, -1) + to_blocks(columns).repeat([1] * 5 + [side])
    output = F.scaled_dot_product_attention(to_blocks(query), keys, values, attn_mask=bias)
    output = output.unflatten(4, (BLOCK_SIZE, BLOCK_SIZE)).permute(0, 1, 4, 2, 5, 3, 6)
    return output.reshape(batch, height, width, heads, head_dim)


def unfold_pooled(packed: Tensor, pooled: Tensor, local_bias: Tensor, pooled_bias: Tensor) -> Tensor:
    """Aggregated attention as TransNeXt writes it without its extension: unfolded neighbours beside pooled tokens."""
    height, width = packed.shape[1:3]
    query, key, value = packed.unbind(3)
    windows = F.pad(torch.stack([key, value]), [0, 0, 0, 0, 1, 1, 1, 1]).unfold(2, 3, 1).unfold(3, 3, 1)
    keys, values = windows.flatten(6)  # (batch, height, width, heads, head_dim, 9)
    inside = F.pad(torch.ones(height, width, device=packed.device), [1] * 4).unfold(0, 3, 1).unfold(1, 3, 1).flatten(2)
    local = (query.unsqueeze(-2) @ keys).squeeze(-2) + local_bias
    local = local.masked_fill(inside[:, :, None] == 0, float("-inf"))
    distant = torch.einsum("byxhd,bphd->byxhp", query, pooled[:, :, 0])
    distant = distant + pooled_bias.transpose(0, 1).unflatten(0, (height, width))
    weights = torch.cat([local, distant], -1).softmax(-1)
    output = (values @ weights[..., :9].unsqueeze(-1)).squeeze(-1)
    return output + torch.einsum("byxhp,bphd->byxhd", weights[..., 9:], pooled[:, :, 1])


def gather_regions(routes: Tensor, packed: Tensor) -> Tensor:
    """Routed attention as BiFormer writes it: copy the keys and values of the routed regions, then attend."""
    query, key, value = packed.unbind(3)
    image = torch.arange(packed.shape[0], device=packed.device)[:, None, None]
    keys, values = (tokens[image, routes].flatten(2, 3).transpose(2, 3) for tokens in (key, value))
    return F.scaled_dot_product_attention(query.transpose(2, 3), keys, values).transpose(2, 3)


def gather_neighborhoods(packed: Tensor, table: Tensor | None = None) -> Tensor:
    """Neighborhood attention as a few lines of PyTorch: copy the 49 keys and values of every query, then attend."""
    batch, height, width, _, heads, head_dim = packed.shape
    index, offset = _neighborhood_index(height, width, packed.device)
    query, key, value = packed.flatten(1, 2).unbind(2)  # (batch, tokens, heads, head_dim)
    keys, values = (tensor[:, index] for tensor in (key, value))  # (batch, tokens, 49, heads, head_dim)
    scores = torch.einsum("bnhd,bnkhd->bnhk", query * head_dim**-0.5, keys)
    if table is not None:
        scores = scores + table.flatten(1)[:, offset].transpose(0, 1)
    weights = scores.softmax(-1).to(value.dtype)
    return torch.einsum("bnhk,bnkhd->bnhd", weights, values).reshape(batch, height, width, heads, head_dim)


@lru_cache(maxsize=32)
def _neighborhood_index(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions of the keys of each query, and their entries of the flattened bias table, (tokens, 49)."""
    rows, columns = _axis_index(height), _axis_index(width)
    index = rows[:, None, :, None] * width + columns[None, :, None, :]
    down = rows - torch.arange(height)[:, None] + KERNEL_SIZE - 1
    across = columns - torch.arange(width)[:, None] + KERNEL_SIZE - 1
    offset = down[:, None, :, None] * (2 * KERNEL_SIZE - 1) + across[None, :, None, :]
    return tuple(part.reshape(height * width, KERNEL_SIZE**2).to(device) for part in (index, offset))


def _axis_index(size: int) -> Tensor:
    start = (torch.arange(size) - KERNEL_SIZE // 2).clamp(0, size - KERNEL_SIZE)
    return start[:, None] + torch.arange(KERNEL_SIZE)


def partition_windows(packed: Tensor, table: Tensor | None = None) -> Tensor:
    """Shifted window attention as Swin implementations write it: roll, partition, SDPA with a mask, and back."""
    batch, height, width, _, heads, head_dim = packed.shape
    size, shifts = KERNEL_SIZE, _shifts(height, width)
    offset, mask = _window_index(height, width, packed.device)
    rolled = packed.roll([-shift for shift in shifts], (1, 2)).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    windows = rolled.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, size * size, head_dim)
    bias = mask if table is None else table.flatten(1)[:, offset] + mask
    bias = bias.to(packed.dtype).repeat(batch, 1, 1, 1)
    output = F.scaled_dot_product_attention(*windows, attn_mask=bias)
    output = output.view(batch, height // size, width // size, heads, size, size, head_dim)
    output = output.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads, head_dim)
    return output.roll(shifts, (1, 2))


def _shifts(height: int, width: int) -> tuple[int, int]:
    return tuple(KERNEL_SIZE // 2 if size > KERNEL_SIZE else 0 for size in (height, width))


@lru_cache(maxsize=32)
def _window_index(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries of the flattened bias table, (49, 49), and the mask of the shifted map, (windows, 1, 49, 49)."""
    size, (down, right) = KERNEL_SIZE, _shifts(height, width)
    position = torch.arange(size)
    distance = position[None, :] - position[:, None] + size - 1
    offset = distance[:, None, :, None] * (2 * size - 1) + distance[None, :, None, :]
    labels = torch.zeros(height, width)
    labels[height - down :] += 2
    labels[:, width - right :] += 1
    windows = labels.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).reshape(-1, 1, size * size)
    torn = windows.transpose(1, 2) != windows
    mask = torch.zeros(torn.shape).masked_fill(torn, float("-inf"))
    return offset.reshape(size * size, size * size).to(device), mask[:, None].to(device)
