"""The cases of ``vicinal bench ops``: shapes, inputs, what one would write without our operators, and cost floors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ...kernels import backend
from ...kernels.dispatch import OPERATORS
from ...kernels.halo.examples import BLOCK_SIZE, HALO_SIZE
from ...kernels.neighborhood.examples import KERNEL_SIZE
from ...kernels.window.examples import WINDOW_SIZE


@dataclass(frozen=True)
class Problem:
    """One call, ready to run.

    Attributes:
        leaves: tensors that are differentiated, those of one projection packed; first (batch, *map, 3, heads,
            head_dim).
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

    def randn(size: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    operator = OPERATORS.get(f"{op}_packed", OPERATORS[op])
    example = operator.examples.stage(*shape, **({} if bias or op not in FLEX_MASKS else {"bias": False}))
    made = example.leaves(dtype, randn)
    leaves = {name: tensor.requires_grad_() for name, tensor in made.items() if tensor.is_floating_point()}
    fixed = {name: tensor for name, tensor in made.items() if name not in leaves}

    def run(chosen: str, *tensors: Tensor) -> Tensor:
        with backend(chosen):
            return operator(*example.bind({**fixed, **dict(zip(leaves, tensors, strict=True))}))

    implementations = {name: partial(run, name) for name in ("tiled", "fused", "reference")}
    implementations["eager"] = partial(EAGER[op], *fixed.values())
    if flex and op in FLEX_MASKS:
        implementations["flex"] = partial(flex_over_map, FLEX_MASKS[op], torch.compile(flex_attention, dynamic=False))
    keys = operator.keys_per_query(*operator.unpacked(example.shapes))
    return Problem(list(leaves.values()), randn(shape[:5], dtype), implementations, keys)


def flex_over_map(mask: Callable, attend: Callable, packed: Tensor, table: Tensor | None = None) -> Tensor:
    """Attention of all tokens of the map under a mask and a score function that reads the bias table.

    Args:
        mask: `mask(height, width)` returns the mask function of flex_attention.
        attend: flex_attention, compiled or not.
    """
    batch, height, width, _, heads, head_dim = packed.shape
    block_mask = _block_mask(mask, height, width, packed.device)

    def score(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        last = table.shape[-1] - 1
        down = key // width - query // width + last // 2
        across = key % width - query % width + last // 2
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
        return (query - shift + WINDOW_SIZE) // WINDOW_SIZE == (key - shift + WINDOW_SIZE) // WINDOW_SIZE

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
    size, shifts = WINDOW_SIZE, _shifts(height, width)
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
    return tuple(WINDOW_SIZE // 2 if size > WINDOW_SIZE else 0 for size in (height, width))


@lru_cache(maxsize=32)
def _window_index(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries of the flattened bias table, (49, 49), and the mask of the shifted map, (windows, 1, 49, 49)."""
    size, (down, right) = WINDOW_SIZE, _shifts(height, width)
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


EAGER: dict[str, Callable[..., Tensor]] = {
    "neighborhood_attention": gather_neighborhoods,
    "window_attention": partition_windows,
    "halo_attention": gather_halos,
    "aggregated_attention": unfold_pooled,
    "routed_attention": gather_regions,
}
"""What one would write in the place of each operator; only these are measured."""
FLEX_MASKS = {"window_attention": _window_mask, "neighborhood_attention": _neighborhood_mask}
"""What torch's flex_attention can express."""
