"""Neighborhood attention on tiles of queries and the box of keys that they see, with matrix products.

Tiles of one relative geometry (inside the map, at its upper border, ...) are computed together and share one mask or
bias. Work goes in pieces whose scores stay in the cache. Scores are taken in base 2: exp2 is several times faster than
exp on the CPU, and on masked scores far more. A tile's box holds keys that some of its queries do not see: pieces with
NaN or infinities are done again with those pairs left out (see :mod:`..nonfinite`).
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ...torch_internals import softmax_backward
from ..dispatch import accumulation_dtype
from ..nonfinite import hide, is_tainted, product_of_seen
from ..tiling import LOG2_E, Budget, Buffer, exponentials, ranges, scale_of
from .check import neighborhood_options
from .geometry import Run, axis_runs, split

TILE = {1: 32, 2: 7, 3: 4}
"""A tile has so many queries along each axis, by the rank of the map."""
COVERED_TILE = 16
"""A tile has so many along an axis that every query sees whole: no score is masked, so larger ones waste nothing."""
BUDGET = Budget(in_cache=1 << 18, on_device=1 << 25)
"""A piece has half as many scores as other operators take, since the backward holds three tensors of their size."""


class Piece(NamedTuple):
    """The tiles of `runs` (one for each axis) of some images: what is computed at once."""

    batch: slice
    runs: tuple[Run, ...]


class _Map:
    """A tensor over the map, whose tiles are viewed, read and written."""

    def __init__(self, tensor: Tensor, dilation: Sequence[int], dtype: torch.dtype) -> None:
        """Args: tensor: (batch, *spatial, heads, channels) of any strides; dtype: of the tiles that are loaded."""
        batch, *spatial, heads, channel = tensor.stride()
        self.tensor = tensor
        self.buffer = Buffer(dtype, tensor.device)
        self.strides = (batch, heads, channel)
        # Strides to the next residue and to the next place of the same group.
        self.axes = [(stride, stride * step) for stride, step in zip(spatial, dilation, strict=True)]

    def view(self, piece: Piece, side: str) -> Tensor:
        """(batch, residues and tiles of each axis, heads, tokens of a tile on each axis, channels)."""
        batch, heads, channel = self.strides
        offset = self.tensor.storage_offset() + piece.batch.start * batch
        grid, grid_strides, tile, tile_strides = [], [], [], []
        for run, (to_residue, to_place) in zip(piece.runs, self.axes, strict=True):
            start, tokens = (run.query, run.queries) if side == "query" else (run.key, run.keys)
            offset += run.residue * to_residue + start * to_place
            grid += [run.residues, run.tiles]
            grid_strides += [to_residue, run.queries * to_place]
            tile.append(tokens)
            tile_strides.append(to_place)
        count, channels = piece.batch.stop - piece.batch.start, self.tensor.shape[-1]
        size = (count, *grid, self.tensor.shape[-2], *tile, channels)
        return self.tensor.as_strided(size, (batch, *grid_strides, heads, *tile_strides, channel), offset)

    def load(self, piece: Piece, side: str) -> Tensor:
        """(tiles * heads, tokens of a tile, channels), contiguous; valid until the next call."""
        view = self.view(piece, side)
        rank = len(piece.runs)
        return self.buffer.take(view.shape).copy_(view).flatten(2 + 2 * rank, -2).flatten(0, 1 + 2 * rank)

    def store(self, piece: Piece, tokens: Tensor) -> None:
        view = self.view(piece, "query")
        view.copy_(tokens.view(view.shape))


class _KeyGradient(_Map):
    """Sum over the tiles of the gradients of their keys, which neighbouring tiles share.

    The layout has the places of a group next to each other, so that rows of a box are added in one stretch.
    """

    def __init__(self, like: Tensor, dilation: Sequence[int], dtype: torch.dtype) -> None:
        batch, *spatial, heads, channels = like.shape
        groups = [size for extent, step in zip(spatial, dilation, strict=True) for size in (step, -(-extent // step))]
        self.sum = torch.zeros(batch, heads, *groups, channels, dtype=dtype, device=like.device)
        self.spatial = spatial
        self.tensor = self.sum.flatten(2, -2).transpose(1, 2)
        strides = self.sum.stride()
        self.strides = (strides[0], strides[1], strides[-1])
        self.axes = list(zip(strides[2:-1:2], strides[3:-1:2], strict=True))

    def add(self, piece: Piece, tokens: Tensor) -> None:
        """Tiles that share keys are added one after the other, so the order of the sum is always the same."""
        view = self.view(piece, "key")
        tokens = tokens.view(view.shape)
        for firsts in product(*(range(run.reach) for run in piece.runs)):
            apart: tuple[slice, ...] = (slice(None),)
            for first, run in zip(firsts, piece.runs, strict=True):
                apart += (slice(None), slice(first, None, run.reach))
            view[apart].add_(tokens[apart])

    def to_map(self) -> Tensor:
        """(batch, *spatial, heads, channels)."""
        rank = len(self.spatial)
        order = [2 + 2 * axis + part for axis in range(rank) for part in (1, 0)]
        tokens = self.sum.permute(0, *order, 1, -1)  # (batch, places and residues of each axis, heads, channels)
        for axis, extent in enumerate(self.spatial):
            tokens = tokens.flatten(1 + axis, 2 + axis).narrow(1 + axis, 0, extent)
        return tokens


class _Tiling:
    """What both passes share: the tiles of a call, their bias, and their scores."""

    def __init__(
        self,
        query: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        is_causal: Sequence[bool],
        relative_position_bias: Optional[Tensor],
        scale: Optional[float],
    ) -> None:
        self.batch, *self.spatial, self.heads, head_dim = query.shape
        rank = len(self.spatial)
        options = neighborhood_options(rank, kernel_size, stride, dilation, is_causal)
        self.kernel_size, _, self.dilation, _ = options
        self.axes = [axis_runs(*axis, _tile(rank, *axis)) for axis in zip(self.spatial, *options, strict=True)]
        self.device = query.device
        self.dtype = accumulation_dtype(query.dtype)
        self.scale = scale_of(scale, head_dim)
        self.budget = BUDGET.of(query.device)
        self.has_bias = relative_position_bias is not None
        self.table = self._table(relative_position_bias)

    def _table(self, bias: Optional[Tensor]) -> Tensor:
        """(heads or 1, entries + 1): the bias in base 2, and -inf for masked pairs as the last entry."""
        entries = math.prod(2 * size - 1 for size in self.kernel_size)
        table = torch.zeros(self.heads if self.has_bias else 1, entries + 1, dtype=self.dtype, device=self.device)
        if bias is not None:
            table[:, :-1] = bias.to(self.dtype).flatten(1) * LOG2_E
        table[:, -1] = -math.inf
        return table

    def geometries(self) -> Iterator[tuple[tuple[Run, ...], Optional[Tensor]]]:
        """Products of runs with their bias and mask, (heads or 1, queries, keys), None where there is neither."""
        for runs in product(*self.axes):
            index, masked = self.entries(runs)
            if self.has_bias or masked:
                yield runs, self.table.index_select(1, index.flatten()).unflatten(1, index.shape)
            else:
                yield runs, None

    def hidden(self, runs: tuple[Run, ...]) -> Optional[Tensor]:
        """Which pairs of a tile do not see each other, (queries, keys), None where all do."""
        index, masked = self.entries(runs)
        return index == self.table.shape[1] - 1 if masked else None

    def entries(self, runs: tuple[Run, ...]) -> tuple[Tensor, bool]:
        return _table_index(tuple(_shape_only(run) for run in runs), self.kernel_size, self.device)

    def pieces(self, runs: tuple[Run, ...]) -> Iterator[Piece]:
        scores = self.heads * math.prod(run.queries * run.keys for run in runs)
        limit = max(1, self.budget // scores)
        images = max(1, limit // math.prod(run.all_tiles for run in runs))
        for part in split(runs, limit):
            for some in ranges(self.batch, images):
                yield Piece(some, part)

    def buffer(self, dtype: Optional[torch.dtype] = None) -> Buffer:
        return Buffer(dtype or self.dtype, self.device)

    def scores(self, query: Tensor, key: Tensor, bias: Optional[Tensor], buffer: Buffer) -> Tensor:
        """Scores in base 2, (tiles * heads, queries, keys)."""
        scale = self.scale * LOG2_E
        if bias is None:
            return buffer.product(query, key.transpose(1, 2), scale)
        scores = buffer.take((query.shape[0] // bias.shape[0], *bias.shape)).copy_(bias).flatten(0, 1)
        return scores.baddbmm_(query, key.transpose(1, 2), alpha=scale)

    def weights(
        self, query: Tensor, key: Tensor, bias: Optional[Tensor], buffer: Buffer, hidden: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor]:
        """Softmax weights, and the lse in base 2.

        Args:
            hidden: leaves these pairs out whatever they hold.
        """
        scores = hide(self.scores(query, key, bias, buffer), hidden, -math.inf)
        weights, total, lse = exponentials(scores, base_2=True)
        weights.mul_(total.reciprocal())
        return hide(weights, hidden, 0.0), lse  # a row of NaN has them where it sees nothing, too

    def map(self, tensor: Tensor, dtype: Optional[torch.dtype] = None) -> _Map:
        return _Map(tensor, self.dilation, dtype or self.dtype)


def forward(query: Tensor, key: Tensor, value: Tensor, *options) -> tuple[Tensor, Tensor]:
    tiling = _Tiling(query, *options)
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty(*query.shape[:-1], 1, dtype=tiling.dtype)
    queries, keys, outputs, logsumexps = map(tiling.map, (query, key, output, logsumexp))
    values = tiling.map(value, value.dtype)
    for_scores, for_weights, for_output = tiling.buffer(), tiling.buffer(value.dtype), tiling.buffer(value.dtype)
    for runs, bias in tiling.geometries():
        for piece in tiling.pieces(runs):
            tokens = queries.load(piece, "query"), keys.load(piece, "key")
            weights, lse = tiling.weights(*tokens, bias, for_scores)
            box = values.load(piece, "key")
            attended = for_output.product(for_weights.cast(weights), box)
            if is_tainted(attended):
                hidden = tiling.hidden(runs)
                weights, lse = tiling.weights(*tokens, bias, for_scores, hidden)
                attended = product_of_seen(for_weights.cast(weights), hidden, box)
            outputs.store(piece, attended)
            logsumexps.store(piece, lse.div_(LOG2_E))
    return output, logsumexp.squeeze(-1)


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *options,
) -> list[Tensor]:
    """Recomputes the weights. Output and logsumexp would spare two cheap passes, at the cost of their rounding."""
    tiling = _Tiling(query, *options)
    gradients = _Gradients(tiling, needs_gradient, query)
    queries, keys, values, grads = map(tiling.map, (query, key, value, grad_output))
    for runs, bias in tiling.geometries():
        for piece in tiling.pieces(runs):
            tokens = queries.load(piece, "query"), keys.load(piece, "key"), grads.load(piece, "query")
            if not gradients.add(piece, *tokens, values, bias):
                gradients.add(piece, *tokens, values, bias, tiling.hidden(runs), again=True)
        gradients.finish_geometry(runs)
    return gradients.result()


class _Gradients:
    """The gradients that are needed, filled piece by piece."""

    def __init__(self, tiling: _Tiling, needs_gradient: Sequence[bool], query: Tensor) -> None:
        self.tiling = tiling
        self.for_pairs = tuple(tiling.buffer() for _ in range(3))
        self.buffers = (*(tiling.buffer(query.dtype) for _ in range(3)), tiling.buffer())
        needs_query, needs_key, needs_value, needs_bias = needs_gradient
        self.query = tiling.map(query.new_empty(query.shape)) if needs_query else None
        self.key, self.value = (
            _KeyGradient(query, tiling.dilation, tiling.dtype) if needed else None
            for needed in (needs_key, needs_value)
        )
        shape = (tiling.heads, *(2 * kernel - 1 for kernel in tiling.kernel_size))
        self.table = query.new_zeros(shape, dtype=torch.float64) if needs_bias else None
        self.need_scores = needs_query or needs_key or needs_bias
        self.pairs: Optional[Tensor] = None

    def add(
        self,
        piece: Piece,
        query: Tensor,
        key: Tensor,
        grad: Tensor,
        values: _Map,
        bias: Optional[Tensor],
        hidden: Optional[Tensor] = None,
        again: bool = False,
    ) -> bool:
        """Add what a piece gives; False, with nothing added, if that is not finite and not done again."""
        for_scores, for_weights, for_grads = self.for_pairs
        weights, _ = self.tiling.weights(query, key, bias, for_scores, hidden)
        if self.need_scores:
            box = values.load(piece, "key")
            grad_weights = hide(for_weights.product(grad, box.transpose(1, 2)), hidden, 0.0)
            grad_scores = hide(softmax_backward(grad_weights, weights, for_grads.take(weights.shape)), hidden, 0.0)
            if not self._add_scores(piece, grad_scores, query, key, hidden, again):
                return False
        if self.value is not None:
            grad_value = self._product(self.buffers[0].cast(weights), grad, 1.0, hidden, by_key=True)
            # Where there is a gradient of the scores, it has told already.
            if not (self.need_scores or again) and is_tainted(grad_value):
                return False
            self.value.add(piece, self.buffers[3].cast(grad_value))
        return True

    def _add_scores(
        self, piece: Piece, grad_scores: Tensor, query: Tensor, key: Tensor, hidden: Optional[Tensor], again: bool
    ) -> bool:
        """As :meth:`add`, for what comes of the gradient of the scores."""
        scale, pairs = self.tiling.scale, self.buffers[0].cast(grad_scores)
        grad_query = None if self.query is None else self._product(pairs, key, scale, hidden)
        # A NaN of any of the inputs is in the gradient of the queries, the smallest, as it is in that of the scores.
        if not again and is_tainted(grad_scores if grad_query is None else grad_query):
            return False
        if self.query is not None and grad_query is not None:
            self.query.store(piece, grad_query)
        if self.table is not None:
            pairs_of_piece = grad_scores.unflatten(0, (-1, self.tiling.heads)).sum(0)
            self.pairs = pairs_of_piece if self.pairs is None else self.pairs + pairs_of_piece
        if self.key is not None:
            grad_key = self._product(pairs, query, scale, hidden, by_key=True)
            self.key.add(piece, self.buffers[3].cast(grad_key))
        return True

    def _product(
        self, pairs: Tensor, tokens: Tensor, scale: float, hidden: Optional[Tensor], by_key: bool = False
    ) -> Tensor:
        """scale * pairs @ tokens, or of the pairs transposed if by_key; valid until the next call."""
        _, right, result, _ = self.buffers
        tokens = right.cast(tokens)
        if by_key:
            pairs, hidden = pairs.mT, None if hidden is None else hidden.mT
        if hidden is None:
            return result.product(pairs, tokens, scale)
        return product_of_seen(pairs, hidden, tokens).mul_(scale)

    def finish_geometry(self, runs: tuple[Run, ...]) -> None:
        """Adds up the (heads, queries, keys) gradient of a geometry's pairs by their offsets, and starts afresh."""
        if self.table is None or self.pairs is None:
            return
        pairs, self.pairs = self.pairs, None
        if is_tainted(pairs):
            self._scatter(self.table, pairs, runs)
            return
        rank = len(runs)
        pairs = pairs.view(-1, *(run.queries for run in runs), *(run.keys for run in runs))
        pairs = pairs.permute(0, *(axis + side for axis in range(1, rank + 1) for side in (0, rank)))
        pairs = pairs.reshape(-1, *(run.queries * run.keys for run in runs)).double()
        for run, kernel in zip(runs, self.tiling.kernel_size, strict=True):
            # A product with zeros and ones, unlike scattered adds, has a fixed order of summation on every device.
            offsets = _axis_offsets(_shape_only(run), kernel, pairs.device).flatten()
            entries = torch.arange(2 * kernel - 1, device=pairs.device)
            pairs = torch.tensordot(pairs, (offsets[:, None] == entries).to(pairs.dtype), dims=([1], [0]))
        self.table += pairs

    def _scatter(self, table: Tensor, pairs: Tensor, runs: tuple[Run, ...]) -> None:
        """The same for pairs that are not all finite: a product would bring them to entries that are not theirs."""
        index, _ = self.tiling.entries(runs)
        seen = index.flatten() < self.tiling.table.shape[1] - 1
        table.flatten(1).index_add_(1, index.flatten()[seen], pairs.flatten(1).double()[:, seen])

    def result(self) -> list[Tensor]:
        query = None if self.query is None else self.query.tensor
        key, value = (None if x is None else x.to_map() for x in (self.key, self.value))
        return [gradient for gradient in (query, key, value, self.table) if gradient is not None]


def _tile(rank: int, size: int, kernel: int, stride: int, dilation: int, causal: bool) -> int:
    covered = not causal and kernel >= -(-size // dilation)
    return max(COVERED_TILE, TILE[rank]) if covered else TILE[rank]


def _shape_only(run: Run) -> Run:
    """The run without what its mask and bias do not depend on, so that a cache finds it again."""
    return run._replace(residue=0, residues=1, query=0, key=run.key - run.query, tiles=1)


@lru_cache(maxsize=256)
def _table_index(runs: tuple[Run, ...], kernel_size: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    """Entry of the flattened bias table for each pair of a tile, (queries, keys), and whether any pair is masked.

    Masked pairs have the entry behind the last one.
    """
    index = torch.zeros(1, 1, dtype=torch.int32, device=device)
    visible = torch.ones(1, 1, dtype=torch.bool, device=device)
    for run, kernel in zip(runs, kernel_size, strict=True):
        offsets = _axis_offsets(run, kernel, device)[:, None, :]
        windows = torch.tensor(run.windows, device=device)
        places = torch.arange(run.keys, device=device)
        inside = (places >= windows[:, :1]) & (places < windows[:, 1:])
        index = (index[:, None, :, None] * (2 * kernel - 1) + offsets).flatten(2, 3).flatten(0, 1)
        visible = (visible[:, None, :, None] & inside[:, None, :]).flatten(2, 3).flatten(0, 1)
    entries = math.prod(2 * kernel - 1 for kernel in kernel_size)
    return index.masked_fill(~visible, entries).int(), not bool(visible.all())


def _axis_offsets(run: Run, kernel: int, device: torch.device) -> Tensor:
    """Key minus query plus kernel - 1, (queries, keys), clamped to the table for pairs that are masked anyway."""
    keys = torch.arange(run.key - run.query, run.key - run.query + run.keys, device=device)
    offsets = keys - torch.arange(run.queries, device=device)[:, None] + kernel - 1
    return offsets.clamp(0, 2 * kernel - 2)
