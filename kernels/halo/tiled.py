"""Halo attention arranged for caches: the windows of a few rows of blocks at a time are gathered and multiplied.

Scores, softmax and sums are float32 (float64 for float64 inputs); the weights are rounded to the dtype of the inputs
before they are multiplied with it. Windows overlap, so the gradients of keys and values are added up in float32, in
pieces of at most a block, which do not overlap.
"""

from typing import Iterator, Optional, Sequence

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from ..tiling import Budget, Chunk, chunks, exponentials, grad_scores_of, scale_of

BUDGET = Budget()


class Blocks:
    """The blocks of one call: how to read and write them, and what is added to their scores."""

    def __init__(self, query: Tensor, key: Tensor, block: int, halo: int) -> None:
        self.block, self.halo, self.window = block, halo, block + 2 * halo
        self.batch, self.height, self.width, self.heads = key.shape[:4]
        self.rows, self.columns = self.height // block, self.width // block
        self.queries = query.shape[1] // self.rows
        self.budget = BUDGET.of(query.device)

    def chunks(self) -> Iterator[Chunk]:
        """Some rows of blocks of some images."""
        row_scores = self.columns * self.heads * (self.queries * self.window) ** 2
        return chunks(self.batch, self.rows, row_scores, self.budget)

    def _of_blocks(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        """A view (images, rows, columns, heads, y, x, channels) of the queries of a chunk."""
        size = self.queries
        part = tokens[chunk.images, chunk.rows.start * size : chunk.rows.stop * size]
        return part.unflatten(1, (-1, size)).unflatten(3, (-1, size)).permute(0, 1, 3, 5, 2, 4, 6)

    def load(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        """Gather the queries of a chunk into (blocks * heads, queries, channels)."""
        return self._of_blocks(tokens, chunk).reshape(-1, self.queries**2, tokens.shape[-1])

    def store(self, blocks: Tensor, tokens: Tensor, chunk: Chunk) -> None:
        """Write (blocks * heads, queries, channels) back into the map."""
        view = self._of_blocks(tokens, chunk)
        view.copy_(blocks.view(view.shape))

    def load_windows(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        """Gather the windows of a chunk into (blocks * heads, keys, channels), zeros outside the map."""
        first, last = chunk.rows.start * self.block - self.halo, chunk.rows.stop * self.block + self.halo
        inside = slice(max(first, 0), min(last, self.height))
        part = tokens[chunk.images, inside]
        padded = part.new_zeros(part.shape[0], last - first, self.width + 2 * self.halo, *part.shape[3:])
        rows = slice(inside.start - first, inside.stop - first)
        padded[:, rows, self.halo : self.halo + self.width].copy_(part)
        windows = padded.unfold(1, self.window, self.block).unfold(2, self.window, self.block)
        return windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(-1, self.window**2, tokens.shape[-1])

    def new_padded(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the gradient of a map and its halo."""
        height, width = self.height + 2 * self.halo, self.width + 2 * self.halo
        return tokens.new_zeros((self.batch, height, width, *tokens.shape[3:]), dtype=dtype)

    def add_windows(self, windows: Tensor, padded: Tensor, chunk: Chunk) -> None:
        """Add (blocks * heads, keys, channels) to the padded map."""
        images, rows = chunk.images.stop - chunk.images.start, chunk.rows.stop - chunk.rows.start
        shape = (images, rows, self.columns, self.heads, self.window, self.window, padded.shape[-1])
        windows = windows.view(shape).permute(0, 1, 2, 3, 6, 4, 5)
        map_of_chunk = padded[chunk.images, chunk.rows.start * self.block :]
        starts = range(0, self.window, self.block)
        for y, x in ((y, x) for y in starts for x in starts):
            height, width = min(self.block, self.window - y), min(self.block, self.window - x)
            target = map_of_chunk[:, y:, x:].unfold(1, height, self.block).unfold(2, width, self.block)
            target[:, :rows, : self.columns].add_(windows[..., y : y + height, x : x + width])

    def crop(self, padded: Tensor) -> Tensor:
        return padded[:, self.halo : self.halo + self.height, self.halo : self.halo + self.width]

    def outside(self, chunk: Chunk, device: torch.device) -> Tensor:
        """Which keys of a chunk's windows lie outside the map, (rows, columns, window, window)."""
        offset = torch.arange(self.window, device=device) - self.halo
        row = torch.arange(chunk.rows.start, chunk.rows.stop, device=device)[:, None] * self.block + offset
        column = torch.arange(self.columns, device=device)[:, None] * self.block + offset
        above_or_below = (row < 0) | (row >= self.height)
        beside = (column < 0) | (column >= self.width)
        return above_or_below[:, None, :, None] | beside[None, :, None, :]


class Scores:
    """Scaled scores with relative logits and the mask, chunk by chunk."""

    def __init__(
        self,
        blocks: Blocks,
        query: Tensor,
        relative: Sequence[Optional[Tensor]],
        mask_padding: bool,
        scale: Optional[float],
    ) -> None:
        self.blocks, self.relative = blocks, relative
        self.dtype = accumulation_dtype(query.dtype)
        self.scale = scale_of(scale, query.shape[-1])
        self.mask_padding = mask_padding and blocks.halo > 0

    def __call__(self, query: Tensor, key: Tensor, chunk: Chunk) -> Tensor:
        """(blocks * heads, queries, keys) in float32 (float64 for float64 inputs)."""
        blocks = self.blocks
        scores = torch.bmm(query, key.transpose(1, 2)).to(self.dtype).mul_(self.scale)
        by_cell = scores.view(-1, blocks.queries**2, blocks.window, blocks.window)
        for logits, axis in zip(self.relative, (-1, -2), strict=True):
            if logits is not None:
                by_cell.add_(blocks.load(logits, chunk).unsqueeze(axis))
        if self.mask_padding:
            rows = chunk.rows.stop - chunk.rows.start
            outside = blocks.outside(chunk, scores.device)[:, :, None, None]
            by_block = by_cell.view(-1, rows, blocks.columns, blocks.heads, *by_cell.shape[1:])
            by_block.masked_fill_(outside, float("-inf"))
        return scores


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    halo_size: int,
    relative_height_logits: Optional[Tensor],
    relative_width_logits: Optional[Tensor],
    mask_padding: bool,
    scale: Optional[float],
) -> tuple[Tensor, Tensor]:
    """Output, and logsumexp of the scores."""
    blocks = Blocks(query, key, block_size, halo_size)
    score = Scores(blocks, query, (relative_height_logits, relative_width_logits), mask_padding, scale)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty((*query.shape[:-1], 1), dtype=score.dtype)
    for chunk in blocks.chunks():
        scores = score(blocks.load(query, chunk), blocks.load_windows(key, chunk), chunk)
        weights, total, lse = exponentials(scores)
        result = torch.bmm(weights.to(value.dtype), blocks.load_windows(value, chunk))
        blocks.store(result.to(score.dtype).div_(total), output, chunk)
        blocks.store(lse, logsumexp, chunk)
    return output, logsumexp.squeeze(-1)


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    halo_size: int,
    relative_height_logits: Optional[Tensor],
    relative_width_logits: Optional[Tensor],
    mask_padding: bool,
    scale: Optional[float],
) -> list[Tensor]:
    """Gradients of query, key, value and the relative logits, those that are needed.

    With weights P and scores S: dV = P^T dO, dP = dO V^T, dS = P dP - P sum(P dP), dQ = scale dS K, dK = scale dS^T Q,
    and the relative logits of a row or column collect dS along it.
    """
    blocks = Blocks(query, key, block_size, halo_size)
    relative = (relative_height_logits, relative_width_logits)
    score = Scores(blocks, query, relative, mask_padding, scale)
    gradients: list[Optional[Tensor]] = [None] * 5
    for index, tensor in enumerate((query, key, value, *relative)):
        if needs_gradient[index] and tensor is not None:
            overlaps = index in (1, 2)
            gradients[index] = blocks.new_padded(tensor, score.dtype) if overlaps else torch.empty_like(tensor)
    for chunk in blocks.chunks():
        inputs = [blocks.load(query, chunk), *(blocks.load_windows(tokens, chunk) for tokens in (key, value))]
        weights = score(inputs[0], inputs[1], chunk).softmax(-1)
        inputs.append(blocks.load(grad_output, chunk))
        results = _chunk_gradients(weights, inputs, blocks.window, score.scale, needs_gradient)
        for index, (result, gradient) in enumerate(zip(results, gradients, strict=True)):
            if result is not None and gradient is not None:
                (blocks.add_windows if index in (1, 2) else blocks.store)(result, gradient, chunk)
    cropped = (blocks.crop(x) if index in (1, 2) and x is not None else x for index, x in enumerate(gradients))
    return [gradient for gradient in cropped if gradient is not None]


def _chunk_gradients(
    weights: Tensor, inputs: Sequence[Tensor], window: int, scale: float, needs_gradient: Sequence[bool]
) -> list[Optional[Tensor]]:
    """Gradients of query, key, value, height and width logits of one chunk; None for what is not needed."""
    query, key, value, grad_output = inputs
    result: list[Optional[Tensor]] = [None] * 5
    if needs_gradient[2]:
        result[2] = torch.bmm(weights.to(value.dtype).transpose(1, 2), grad_output)
    if not any((*needs_gradient[:2], *needs_gradient[3:])):
        return result
    grad_scores = grad_scores_of(torch.bmm(grad_output, value.transpose(1, 2)).to(weights.dtype), weights)
    rounded = grad_scores.to(query.dtype)
    if needs_gradient[0]:
        result[0] = torch.bmm(rounded, key).mul_(scale)
    if needs_gradient[1]:
        result[1] = torch.bmm(rounded.transpose(1, 2), query).mul_(scale)
    for index, axis in ((3, -1), (4, -2)):
        if needs_gradient[index]:
            result[index] = grad_scores.unflatten(-1, (window, window)).sum(axis)
    return result
