"""Window attention arranged for caches: a few windows at a time are gathered, multiplied and written back.

Windows of one chunk are copied out of the map once, straight from any strides and across the border of a shifted map.
Bias and shift masks are added to the scores in place: a mask touches the last row or column of windows only, and is
never repeated over the batch. On a CPU, windows without masks go through torch's own attention. Scores, softmax and
sums are float32 (float64 for float64 inputs); the weights are rounded to the dtype of the inputs before they are
multiplied with it. In a window that the border tears apart tokens do not see all keys: chunks with NaN or infinities
are done again with the hidden pairs left out (see :mod:`..nonfinite`).
"""

from dataclasses import dataclass
from itertools import product
from typing import Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ...torch_internals import attend_on_cpu
from ..checks import per_axis
from ..dispatch import accumulation_dtype
from ..nonfinite import hide, is_tainted, product_of_seen
from ..tiling import Budget, Buffer, chunk_ranges, exponentials, grad_scores_of, scale_of
from .geometry import bias_index

BUDGET = Budget()
FEW_KEYS = 16
"""With fewer keys than the widest vector register has numbers of float32, the lse does not tell of rows of NaN."""


class Piece(NamedTuple):
    """Part of the windows of one axis whose tokens lie evenly spaced in the map.

    It holds `windows` windows of the chunk from `window` on, of each `offsets` tokens from `offset` on; the first
    token lies at `start` in the map.
    """

    window: int
    windows: int
    offset: int
    offsets: int
    start: int


@dataclass(frozen=True)
class Axis:
    """The windows of one axis: `stride` tokens of the map lie between two windows, `spacing` between two tokens."""

    size: int
    window: int
    stride: int
    spacing: int
    shift: int

    @classmethod
    def of(cls, size: int, window: int, partition: str, shift: int) -> "Axis":
        if partition == "grid":
            return cls(size, window, stride=1, spacing=size // window, shift=0)
        return cls(size, window, stride=window, spacing=1, shift=shift if size > window else 0)

    @property
    def count(self) -> int:
        return self.size // self.window

    def pieces(self, first: int, last: int) -> list[Piece]:
        """The pieces of windows first to last - 1. Only the last window of a shifted axis is torn by the border."""
        torn = int(self.shift > 0 and last == self.count)
        whole, result = last - first - torn, []
        if whole:
            result.append(Piece(0, whole, 0, self.window, first * self.stride + self.shift))
        if torn:
            kept = self.window - self.shift
            result.append(Piece(whole, 1, 0, kept, self.size - kept))
            result.append(Piece(whole, 1, kept, self.shift, 0))
        return result

    def tears(self, device: torch.device) -> Tensor:
        """Pairs of offsets in the last window that the border separates, (window, window)."""
        wrapped = torch.arange(self.window, device=device) >= self.window - self.shift
        return wrapped[:, None] != wrapped[None, :]


class Chunk(NamedTuple):
    """Windows that are processed together: `images` from `image` on, and in each `rows` rows of windows."""

    image: int
    images: int
    rows: int
    is_last: bool
    pieces: list[tuple[Piece, Piece]]


class Windows:
    """The windows of one call: how to read and write them, and what is added to their scores."""

    def __init__(self, query: Tensor, window_size: Sequence[int], partition: str, shift: Sequence[int]) -> None:
        self.window = per_axis("window_size", window_size, 2)
        sizes = zip(query.shape[1:3], self.window, per_axis("shift", shift, 2), strict=True)
        self.axes = tuple(Axis.of(size, window, partition, offset) for size, window, offset in sizes)
        self.shifts = tuple(axis.shift for axis in self.axes)
        self.tokens = self.window[0] * self.window[1]
        self.batch, self.heads, self.head_dim = query.shape[0], query.shape[3], query.shape[4]
        self.budget = BUDGET.of(query.device)

    def chunks(self) -> Iterator[Chunk]:
        """Some rows of windows of some images."""
        rows, columns = (axis.count for axis in self.axes)
        of_images, of_rows = chunk_ranges(self.batch, rows, columns * self.heads * self.tokens**2, self.budget)
        across = self.axes[1].pieces(0, columns)
        pieces = [list(product(self.axes[0].pieces(part.start, part.stop), across)) for part in of_rows]
        for images in of_images:
            for part, found in zip(of_rows, pieces, strict=True):
                count = part.stop - part.start
                yield Chunk(images.start, images.stop - images.start, count, part.stop == rows, found)

    def load(self, tokens: Tensor, chunk: Chunk, buffer: Buffer) -> Tensor:
        """Gather the windows of a chunk into (windows * heads, tokens, channels), in the buffer."""
        windows = buffer.take(self._shape(chunk, tokens))
        self._gather(tokens, windows, chunk)
        return windows.view(-1, self.tokens, tokens.shape[-1])

    def load_whole_tokens(self, tokens: Tensor, chunk: Chunk, buffer: Buffer) -> Tensor:
        """The same as (windows, heads, tokens, channels) whose heads lie next to each other: longer runs to copy."""
        images, rows, columns, heads, *window, channels = self._shape(chunk, tokens)
        windows = buffer.take((images, rows, columns, *window, heads, channels)).permute(0, 1, 2, 5, 3, 4, 6)
        self._gather(tokens, windows, chunk)
        return windows.flatten(0, 2).flatten(2, 3)

    def _gather(self, tokens: Tensor, windows: Tensor, chunk: Chunk) -> None:
        for in_map, in_windows in self._pairs(tokens, windows, chunk):
            in_windows.copy_(in_map)

    def store(self, windows: Tensor, tokens: Tensor, chunk: Chunk) -> None:
        """Write (windows * heads, tokens, channels) or (windows, heads, tokens, channels) back into the map."""
        windows = windows.view(self._shape(chunk, tokens))
        for in_map, in_windows in self._pairs(tokens, windows, chunk):
            in_map.copy_(in_windows)

    def _shape(self, chunk: Chunk, tokens: Tensor) -> tuple[int, ...]:
        return (chunk.images, chunk.rows, self.axes[1].count, self.heads, *self.window, tokens.shape[-1])

    def _pairs(self, tokens: Tensor, windows: Tensor, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor]]:
        """For each piece its tokens in the map and in the buffer, both (image, row, column, head, y, x, channel)."""
        down, across = self.axes
        image, y, x, head, channel = tokens.stride()
        strides = (image, y * down.stride, x * across.stride, head, y * down.spacing, x * across.spacing, channel)
        origin = tokens.storage_offset() + chunk.image * image
        inner = windows.stride()
        for row, column in chunk.pieces:
            counts = (chunk.images, row.windows, column.windows, self.heads)
            shape = (*counts, row.offsets, column.offsets, windows.shape[-1])
            begin = row.window * inner[1] + column.window * inner[2] + row.offset * inner[4] + column.offset * inner[5]
            yield (
                tokens.as_strided(shape, strides, origin + row.start * y + column.start * x),
                windows.as_strided(shape, inner, windows.storage_offset() + begin),
            )

    def bias(self, table: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
        """(heads, tokens, tokens) from the table."""
        if table is None:
            return None
        return table.to(dtype).flatten(1)[:, bias_index(self.window, table.device)]

    def masks(self, like: Tensor, dtype: torch.dtype) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """What is added to the scores of the last row and of the last column of windows, (tokens, tokens) each."""
        vertical, horizontal = self.axes
        shape = (*self.window, *self.window)
        rows = vertical.tears(like.device)[:, None, :, None] if vertical.shift else None
        columns = horizontal.tears(like.device)[None, :, None, :] if horizontal.shift else None
        last_row, last_column = (
            None if torn is None else _minus_infinity(torn.expand(shape).reshape(self.tokens, self.tokens), dtype)
            for torn in (rows, columns)
        )
        return last_row, last_column


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, float("-inf"))


class Scores:
    """Scaled scores with bias and masks, chunk by chunk."""

    def __init__(self, windows: Windows, query: Tensor, table: Optional[Tensor], scale: Optional[float]) -> None:
        self.windows = windows
        self.dtype = accumulation_dtype(query.dtype)
        self.products = Buffer(query.dtype, query.device)
        self.scale = scale_of(scale, windows.head_dim)
        self.bias = windows.bias(table, self.dtype)
        self.masks = windows.masks(query, self.dtype)

    def __call__(self, query: Tensor, key: Tensor, chunk: Chunk) -> Tensor:
        """(windows * heads, tokens, tokens) in float32 (float64 for float64 inputs)."""
        windows = self.windows
        scores = self.products.product(query, key.transpose(1, 2), self.scale).to(self.dtype)
        by_window = scores.view(-1, chunk.rows, windows.axes[1].count, windows.heads, windows.tokens, windows.tokens)
        if self.bias is not None:
            by_window.add_(self.bias)
        last_row, last_column = self.masks
        if last_row is not None and chunk.is_last:
            by_window[:, -1].add_(last_row)
        if last_column is not None:
            by_window[:, :, -1].add_(last_column)
        return scores

    def hidden(self, chunk: Chunk) -> Tensor:
        """Which pairs of a chunk the border separates, (windows * heads, tokens, tokens)."""
        windows = self.windows
        tokens, columns = windows.tokens, windows.axes[1].count
        shape = (chunk.images, chunk.rows, columns, windows.heads, tokens, tokens)
        last_row, last_column = self.masks
        result = torch.zeros(shape, dtype=torch.bool, device=self.products.memory.device)
        if last_row is not None and chunk.is_last:
            result[:, -1] |= last_row < 0
        if last_column is not None:
            result[:, :, -1] |= last_column < 0
        return result.flatten(0, 3)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Sequence[int],
    partition: str,
    shift: Sequence[int],
    relative_position_bias: Optional[Tensor],
    scale: Optional[float],
) -> tuple[Tensor, Tensor]:
    """Output, and logsumexp of the scores."""
    windows = Windows(query, window_size, partition, shift)
    score = Scores(windows, query, relative_position_bias, scale)
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty((*query.shape[:-1], 1), dtype=score.dtype)
    at_once = query.device.type == "cpu" and not any(windows.shifts)
    load, attend = (windows.load_whole_tokens, _attend_at_once) if at_once else (windows.load, _attend)
    inputs = [(tokens, Buffer(tokens.dtype, tokens.device)) for tokens in (query, key, value)]
    for chunk in windows.chunks():
        queries, keys, values = (load(tokens, chunk, buffer) for tokens, buffer in inputs)
        result, lse = attend(score, queries, keys, values, chunk)
        windows.store(result, output, chunk)
        windows.store(lse, logsumexp, chunk)
    return output, logsumexp.squeeze(-1)


def _attend(score: Scores, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of the windows of a chunk."""
    result = _attend_seen(score, query, key, value, chunk, None)
    if any(score.windows.shifts) and is_tainted(result[0]):
        return _attend_seen(score, query, key, value, chunk, score.hidden(chunk))
    return result


def _attend_seen(
    score: Scores, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, hidden: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """The same, with hidden pairs left out where they are given."""
    scores = hide(score(query, key, chunk), hidden, float("-inf"))
    weights, total, lse = exponentials(scores)
    rounded = weights.to(value.dtype)
    result = torch.bmm(rounded, value) if hidden is None else product_of_seen(rounded, hidden, value)
    return result.to(score.dtype).div_(total), lse


def _attend_at_once(score: Scores, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The same without masks, by the kernel of scaled_dot_product_attention, which never stores the scores.

    It takes some NaN for masked keys, and infinities in bfloat16 for numbers: then the scores are stored after all.
    """
    bias = None if score.bias is None else score.bias[None]
    output, logsumexp = attend_on_cpu(query, key, value, bias, score.scale)
    if is_tainted(logsumexp) or (score.windows.tokens < FEW_KEYS and is_tainted(query, key)):
        query, key, value = (tokens.flatten(0, 1) for tokens in (query, key, value))
        return _attend(score, query, key, value, chunk)
    return output, logsumexp.contiguous()


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Sequence[int],
    partition: str,
    shift: Sequence[int],
    relative_position_bias: Optional[Tensor],
    scale: Optional[float],
    into: Optional[Sequence[Tensor]] = None,
) -> list[Tensor]:
    """Gradients of query, key, value and the bias table, those that are needed; the first three `into` tensors.

    With weights P and scores S: dV = P^T dO, dP = dO V^T, dS = P dP - P sum(P dP), dQ = scale dS K, dK = scale dS^T Q,
    and the bias table collects dS.
    """
    windows = Windows(query, window_size, partition, shift)
    score = Scores(windows, query, relative_position_bias, scale)
    wanted = zip((query, key, value), needs_gradient[:3], strict=True)
    gradients: Sequence[Optional[Tensor]] = into or [
        tensor.new_empty(tensor.shape) if needed else None for tensor, needed in wanted
    ]
    grad_bias = query.new_zeros((windows.heads, windows.tokens, windows.tokens), dtype=score.dtype)
    buffers = [Buffer(query.dtype, query.device) for _ in range(8)]
    for chunk in windows.chunks():
        loaded = zip((query, key, value, grad_output), buffers[:4], strict=True)
        inputs = [windows.load(tokens, chunk, buffer) for tokens, buffer in loaded]
        # Not exp(scores - logsumexp): that would carry over the rounding of a large logsumexp, for the same time.
        weights = score(inputs[0], inputs[1], chunk).softmax(-1)
        grad_scores, *results = _chunk_gradients(weights, inputs, score.scale, needs_gradient, buffers[4:])
        if any(windows.shifts) and _are_tainted(grad_scores, *results):
            hidden = score.hidden(chunk)
            weights = hide(hide(score(inputs[0], inputs[1], chunk), hidden, float("-inf")).softmax(-1), hidden, 0.0)
            grad_scores, *results = _chunk_gradients(weights, inputs, score.scale, needs_gradient, buffers[4:], hidden)
        if needs_gradient[3] and grad_scores is not None:
            grad_bias.add_(grad_scores.view(-1, *grad_bias.shape).sum(0))
        for result, gradient in zip(results, gradients, strict=True):
            if result is not None and gradient is not None:
                windows.store(result, gradient, chunk)
    needed = [gradient for gradient in gradients if gradient is not None]
    if relative_position_bias is not None and needs_gradient[3]:
        needed.append(_to_table(grad_bias, relative_position_bias, windows.window))
    return needed


def _are_tainted(
    grad_scores: Optional[Tensor],
    grad_query: Optional[Tensor],
    grad_key: Optional[Tensor],
    grad_value: Optional[Tensor],
) -> bool:
    """Whether gradients of a chunk may not be finite: a NaN of any input is in those of queries and of keys."""
    narrow = grad_key if grad_query is None else grad_query
    return is_tainted(narrow) if narrow is not None else is_tainted(grad_scores, grad_value)


def _chunk_gradients(
    weights: Tensor,
    inputs: Sequence[Tensor],
    scale: float,
    needs_gradient: Sequence[bool],
    buffers: Sequence[Buffer],
    hidden: Optional[Tensor] = None,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of scores, query, key and value of one chunk, in the buffers; None for what is not needed.

    Args:
        hidden: pairs to leave out whatever they hold.
    """
    query, key, value, grad_output = inputs
    for_scores, for_query, for_key, for_value = buffers
    grad_scores = grad_query = grad_key = grad_value = None

    def product(buffer: Buffer, pairs: Tensor, tokens: Tensor, factor: float = 1.0) -> Tensor:
        if hidden is None:
            return buffer.product(pairs, tokens, factor)
        return product_of_seen(pairs, hidden, tokens).mul_(factor)  # the border separates both ways

    if needs_gradient[2]:
        grad_value = product(for_value, weights.to(value.dtype).transpose(1, 2), grad_output)
    if any((needs_gradient[0], needs_gradient[1], needs_gradient[3])):
        grad_weights = hide(for_scores.product(grad_output, value.transpose(1, 2)).to(weights.dtype), hidden, 0.0)
        grad_scores = grad_scores_of(grad_weights, weights)
        rounded = hide(grad_scores, hidden, 0.0).to(query.dtype)
    if needs_gradient[0]:
        grad_query = product(for_query, rounded, key, scale)
    if needs_gradient[1]:
        grad_key = product(for_key, rounded.transpose(1, 2), query, scale)
    return grad_scores, grad_query, grad_key, grad_value


def _to_table(grad_bias: Tensor, table: Tensor, window: Sequence[int]) -> Tensor:
    """Sum (heads, tokens, tokens) over the pairs that read the same entry of the table."""
    result = grad_bias.new_zeros(table.shape)
    result.flatten(1).index_add_(1, bias_index(window, table.device).flatten(), grad_bias.flatten(1))
    return result
