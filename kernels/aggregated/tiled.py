"""Aggregated attention on small tiles of queries, so that all sums are matrix products.

A tile of queries is multiplied with the box of keys around it; the neighbours of its queries are a diagonal band of
that product, which a strided view reads and writes in place. Pooled tokens take one product for the whole strip of
tiles. Work goes in strips whose scores stay in the cache. Scores, softmax and sums are float32 (float64 for float64
inputs); the weights are rounded to the dtype of the inputs before they are multiplied with it.

Beside the band the products of weights are 0 times what the box holds: strips with NaN or infinities are done again
neighbour by neighbour (``apart``), and without the queries that fill up the last tiles.
"""

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from itertools import product
from math import prod
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ...torch_internals import softmax_backward
from ..dispatch import accumulation_dtype
from ..nonfinite import is_tainted
from ..tiling import Budget, Chunk, chunk_ranges, exponentials, scale_of
from .reference import inside_map

TILE = 4
"""A tile has so many queries along each axis: it meets 36 keys for the 9 of a 3x3 window; larger ones waste more."""
BUDGET = Budget(in_cache=1 << 18)
"""A strip has half as many scores as other operators take, since it holds the band of their weights besides."""


class Tiling:
    """The tiles of one call: how tensors over the map are read, written and multiplied.

    Inside, tokens are ordered (image, head, row of tiles, column of tiles, token of the tile).
    """

    def __init__(
        self,
        query: Tensor,
        pooled_key: Tensor,
        window_size: int,
        local_bias: Optional[Tensor],
        pooled_bias: Optional[Tensor],
        scale: Optional[float],
    ) -> None:
        self.batch, *self.map, self.heads, head_dim = query.shape
        self.window, self.neighbours, self.pooled = window_size, window_size**2, prod(pooled_key.shape[1:-2])
        self.tile = [min(TILE, size) for size in self.map]
        self.grid = [-(-size // tile) for size, tile in zip(self.map, self.tile, strict=True)]
        self.box = [tile + window_size - 1 for tile in self.tile]
        self.padded = [count * tile + window_size - 1 for count, tile in zip(self.grid, self.tile, strict=True)]
        self.queries = self.tile[0] * self.tile[1]
        self.dtype, self.device = accumulation_dtype(query.dtype), query.device
        self.scale = scale_of(scale, head_dim)
        self.local_bias = self.tiles(self._local_bias(local_bias))
        self.pooled_bias = None if pooled_bias is None else self.tiles(self._pooled_bias(pooled_bias))
        self.band = query.new_empty(0)
        self.apart = False  # whether neighbours are multiplied one by one, for strips that are not finite

    def _local_bias(self, bias: Optional[Tensor]) -> Tensor:
        """(heads or 1, height, width, 1, window_size**2) with -inf outside the map."""
        outside = ~inside_map(self.map[0], self.map[1], self.window, self.device)
        shape = (1 if bias is None else self.heads, *self.map, self.neighbours)
        result = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if bias is not None:
            result += bias.to(self.dtype)[:, None, None]
        return result.masked_fill_(outside, float("-inf")).unsqueeze(3)

    def _pooled_bias(self, bias: Tensor) -> Tensor:
        """(heads, height, width, 1, pooled)."""
        full = bias.to(self.dtype).expand(self.heads, self.map[0] * self.map[1], self.pooled)
        return full.unflatten(1, self.map).unsqueeze(3)

    def strips(self) -> Iterator[Chunk]:
        """Some rows of tiles of some images, those of one row after the other: they have their bias in common."""
        keys = self.box[0] * self.box[1] + self.neighbours + self.pooled
        row_scores = self.heads * self.grid[1] * self.queries * keys
        of_images, of_rows = chunk_ranges(self.batch, self.grid[0], row_scores, BUDGET.of(self.device))
        return (Chunk(images, rows) for rows in of_rows for images in of_images)

    def tiles(self, tokens: Tensor) -> Tensor:
        """(batch, rows, columns, heads, channels, *tile): a view where the map divides into tiles, else padded."""
        margins = [count * tile - size for count, tile, size in zip(self.grid, self.tile, self.map, strict=True)]
        if any(margins):
            tokens = F.pad(tokens, (0, 0, 0, 0, 0, margins[1], 0, margins[0]))
        return self._unfold(tokens, self.tile)

    def boxes(self, tokens: Tensor) -> Tensor:
        """(batch, rows, columns, heads, channels, *box): overlapping views of the zero-padded map."""
        before = self.window // 2
        behind = [whole - before - size for whole, size in zip(self.padded, self.map, strict=True)]
        return self.boxes_of_padded(F.pad(tokens, (0, 0, 0, 0, before, behind[1], before, behind[0])))

    def boxes_of_padded(self, tokens: Tensor) -> Tensor:
        return self._unfold(tokens, self.box)

    def _unfold(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        return tokens.unfold(1, size[0], self.tile[0]).unfold(2, size[1], self.tile[1])

    def empty(self, like: Tensor, dtype: Optional[torch.dtype] = None) -> tuple[Tensor, Tensor]:
        """A tensor to fill tile by tile: its view by :meth:`tiles`, and the part of it that is the map."""
        padded = [count * tile for count, tile in zip(self.grid, self.tile, strict=True)]
        whole = like.new_empty((like.shape[0], *padded, *like.shape[3:]), dtype=dtype)
        return self._unfold(whole, self.tile), whole[:, : self.map[0], : self.map[1]]

    def load(self, view: Tensor, strip: Chunk) -> Tensor:
        """(tiles, tokens of a tile or box, channels) of a strip, contiguous."""
        tokens = view[strip.images, strip.rows].permute(0, 3, 1, 2, 5, 6, 4)
        return tokens.reshape(-1, tokens.shape[4] * tokens.shape[5], tokens.shape[6])

    def store(self, tokens: Tensor, view: Tensor, strip: Chunk) -> None:
        """The inverse of :meth:`load`."""
        into = view[strip.images, strip.rows].permute(0, 3, 1, 2, 5, 6, 4)
        into.copy_(tokens.view(into.shape))

    def take(self, products: Tensor) -> Tensor:
        """The neighbours of each query, (tiles, queries, window_size**2), from (tiles, queries, box)."""
        return self._band(products).flatten(3).flatten(1, 2)

    def put(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`take`, zero beside the band; valid until the next call."""
        tiles, keys = weights.shape[0], self.box[0] * self.box[1]
        if self.band.shape[0] < tiles or self.band.dtype != dtype:
            self.band = torch.zeros(tiles, self.queries, keys, dtype=dtype, device=self.device)
        products = self.band[:tiles]
        self._band(products).copy_(weights.view(tiles, *self.tile, self.window, self.window))
        return products

    def _band(self, products: Tensor) -> Tensor:
        """A view: query (y, x) of a tile has its neighbour (i, j) at (y + i, x + j) of the box."""
        width, keys = self.box[1], self.box[0] * self.box[1]
        strides = (self.queries * keys, self.tile[1] * keys + width, keys + 1, width, 1)
        return products.as_strided((products.shape[0], *self.tile, self.window, self.window), strides)

    def strip_by_head(self, tokens: Tensor, strip: Chunk) -> Tensor:
        """(images * heads, tokens of the strip, channels) from (tiles, tokens of a tile, channels)."""
        return tokens.reshape((strip.images.stop - strip.images.start) * self.heads, -1, tokens.shape[-1])

    def multiply(self, left: Tensor, box: Tensor, pooled: Tensor, strip: Chunk) -> Tensor:
        """Products of each query with its neighbours and the pooled tokens, in float32 (float64 for float64 inputs)."""
        local = self.take(torch.bmm(left, box.transpose(1, 2)))
        rest = torch.bmm(self.strip_by_head(left, strip), pooled[strip.images].flatten(0, 1).transpose(1, 2))
        return torch.cat([local, rest.view(*local.shape[:2], self.pooled)], -1).to(self.dtype)

    def combine(self, weights: Tensor, box: Tensor, pooled: Tensor, strip: Chunk) -> Tensor:
        """Sums of neighbours and pooled tokens by weights, (tiles, queries, channels)."""
        near = weights[..., : self.neighbours]
        local = self._sum_apart(near, box) if self.apart else torch.bmm(self.put(near, box.dtype), box)
        rest = self.strip_by_head(weights[..., self.neighbours :], strip).to(box.dtype)
        return torch.baddbmm(self.strip_by_head(local, strip), rest, pooled[strip.images].flatten(0, 1)).view_as(local)

    def spread(self, weights: Tensor, rows: Tensor) -> Tensor:
        """What the neighbours of each query get of its row by the weights, (tiles, box, channels)."""
        if not self.apart:
            return torch.bmm(self.put(weights, rows.dtype).transpose(1, 2), rows)
        result = rows.new_zeros(len(rows), *self.box, rows.shape[-1])
        for near, part in zip(weights.to(rows.dtype).unbind(-1), self._neighbours(result), strict=True):
            part.add_((near.unsqueeze(-1) * rows).view(part.shape))
        return result.flatten(1, 2)

    def _sum_apart(self, weights: Tensor, box: Tensor) -> Tensor:
        """Sums of the neighbours of each query by weights, (tiles, queries, channels)."""
        pairs = zip(weights.to(box.dtype).unbind(-1), self._neighbours(box.unflatten(1, self.box)), strict=True)
        return reduce(torch.add, (near.unsqueeze(-1) * part.flatten(1, 2) for near, part in pairs))

    def _neighbours(self, box: Tensor) -> Iterator[Tensor]:
        """For each neighbour those of a tile's queries: views (tiles, *tile, channels) of (tiles, *box, channels)."""
        for row, column in product(range(self.window), repeat=2):
            yield box[:, row : row + self.tile[0], column : column + self.tile[1]]

    def leave_out(self, pairs: Tensor, strip: Chunk) -> Tensor:
        """Set what is no pair of tokens to 0, in place: neighbours outside the map, queries that fill up tiles."""
        inside = inside_map(self.map[0], self.map[1], self.window, self.device).to(self.dtype)[None, :, :, None]
        outside = self._bias(self.tiles(inside), strip) == 0
        by_tile = self.by_tile(pairs, strip)
        by_tile[..., : self.neighbours].masked_fill_(outside, 0.0)
        by_tile[..., self.neighbours :].masked_fill_(outside[..., self.neighbours // 2, None], 0.0)
        return pairs

    def weights(self, query: Tensor, key_box: Tensor, pooled_key: Tensor, strip: Chunk) -> tuple[Tensor, Tensor]:
        """Softmax weights (tiles, queries, window_size**2 + pooled) and logsumexp (tiles, queries, 1)."""
        scores = self.multiply(query, key_box, pooled_key, strip).mul_(self.scale)
        by_tile = self.by_tile(scores, strip)
        by_tile[..., : self.neighbours].add_(self._bias(self.local_bias, strip))
        if self.pooled_bias is not None:
            by_tile[..., self.neighbours :].add_(self._bias(self.pooled_bias, strip))
        weights, total, lse = exponentials(scores)
        return weights.div_(total), lse

    def by_tile(self, tokens: Tensor, strip: Chunk) -> Tensor:
        """(images, heads, rows, columns, *tile, channels) from (tiles, tokens of a tile, channels)."""
        shape = (-1, self.heads, strip.rows.stop - strip.rows.start, self.grid[1], *self.tile, tokens.shape[-1])
        return tokens.view(shape)

    def _bias(self, bias: Tensor, strip: Chunk) -> Tensor:
        """The strip of a bias whose heads stand in the place of the batch, (heads or 1, rows, columns, *tile, keys)."""
        return bias[:, strip.rows].squeeze(3).permute(0, 1, 2, 4, 5, 3)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: int,
    local_bias: Optional[Tensor],
    pooled_bias: Optional[Tensor],
    value_weights: Optional[Tensor],
    scale: Optional[float],
) -> tuple[Tensor, Tensor]:
    """Output, and logsumexp of the scores."""
    tiling = Tiling(query, pooled_key, window_size, local_bias, pooled_bias, scale)
    queries, keys, values = tiling.tiles(query), tiling.boxes(key), tiling.boxes(value)
    pooled_keys, pooled_values = (tokens.flatten(1, -3).transpose(1, 2) for tokens in (pooled_key, pooled_value))
    extra = None if value_weights is None else tiling.tiles(value_weights)
    outputs, output = tiling.empty(query)
    lses, logsumexp = tiling.empty(query[..., :1], tiling.dtype)
    for strip in tiling.strips():
        weights, lse = tiling.weights(tiling.load(queries, strip), tiling.load(keys, strip), pooled_keys, strip)
        if extra is not None:
            weights[..., : tiling.neighbours].add_(tiling.load(extra, strip))
        box = tiling.load(values, strip)
        combined = tiling.combine(weights, box, pooled_values, strip)
        if is_tainted(combined):
            tiling.apart = True
            combined = tiling.combine(weights, box, pooled_values, strip)
            tiling.apart = False
        tiling.store(combined, outputs, strip)
        tiling.store(lse, lses, strip)
    return output, logsumexp.squeeze(-1)


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: int,
    local_bias: Optional[Tensor],
    pooled_bias: Optional[Tensor],
    value_weights: Optional[Tensor],
    scale: Optional[float],
) -> list[Tensor]:
    """Recomputes the weights P. With E the value weights: dV = (P + E)^T dO, dE = dO V^T on the neighbours,
    dP = dO V^T, dS = P dP - P sum(P dP), and dS gives the gradients of query, keys and biases.
    """
    tiling = Tiling(query, pooled_key, window_size, local_bias, pooled_bias, scale)
    tensors = (query, key, value, pooled_key, pooled_value, local_bias, pooled_bias, value_weights)
    gradients = _Gradients(tiling, needs_gradient, tensors, pooled_key.shape)
    queries, keys, values, grads = (
        tiling.tiles(query),
        tiling.boxes(key),
        tiling.boxes(value),
        tiling.tiles(grad_output),
    )
    pooled_keys, pooled_values = (tokens.flatten(1, -3).transpose(1, 2) for tokens in (pooled_key, pooled_value))
    extra = None if value_weights is None else tiling.tiles(value_weights)
    for strip in tiling.strips():
        tile, box, grad = (tiling.load(view, strip) for view in (queries, keys, grads))
        extra_weights = None if extra is None else tiling.load(extra, strip)
        add = partial(gradients.add, tile, box, grad, values, pooled_keys, pooled_values, extra_weights, strip)
        if not add():
            tiling.apart = True
            add()
            tiling.apart = False
    return gradients.result()


class _Gradients:
    """The gradients that are needed, filled strip by strip."""

    def __init__(
        self,
        tiling: Tiling,
        needs_gradient: Sequence[bool],
        tensors: Sequence[Optional[Tensor]],
        pooled_shape: torch.Size,
    ) -> None:
        """Args: pooled_shape: of the pooled keys and values."""
        self.tiling, self.pooled_shape = tiling, pooled_shape
        query, key, value, pooled_key, pooled_value, local_bias, pooled_bias, value_weights = (
            tensor if needed else None for tensor, needed in zip(tensors, needs_gradient, strict=True)
        )
        self.query, self.value_weights = (
            None if tensor is None else tiling.empty(tensor) for tensor in (query, value_weights)
        )
        self.key, self.value = (None if tensor is None else _BoxSum(tiling, tensor) for tensor in (key, value))
        self.pooled_key, self.pooled_value = (
            None if tensor is None else self._empty_pooled(tensor) for tensor in (pooled_key, pooled_value)
        )
        self.local_bias = None if local_bias is None else local_bias.new_zeros(local_bias.shape, dtype=tiling.dtype)
        self.pooled_bias = None if pooled_bias is None else self._empty_pooled_bias()
        self.pooled_bias_shape = torch.Size() if pooled_bias is None else pooled_bias.shape
        self.need_scores = any(needs_gradient[index] for index in (0, 1, 3, 5, 6))
        self.need_products = self.need_scores or needs_gradient[7]

    def _empty_pooled(self, like: Tensor) -> Tensor:
        """(batch, heads, pooled, channels)."""
        tiling = self.tiling
        return like.new_zeros((tiling.batch, tiling.heads, tiling.pooled, like.shape[-1]), dtype=tiling.dtype)

    def _empty_pooled_bias(self) -> tuple[Tensor, Tensor]:
        tiling = self.tiling
        view, inner = tiling.empty(
            torch.empty(tiling.heads, 1, 1, 1, tiling.pooled, dtype=tiling.dtype, device=tiling.device)
        )
        view.zero_()
        return view, inner

    def add(
        self,
        query: Tensor,
        key: Tensor,
        grad: Tensor,
        values: Tensor,
        pooled_key: Tensor,
        pooled_value: Tensor,
        extra: Optional[Tensor],
        strip: Chunk,
    ) -> bool:
        """Add what a strip gives; False, with nothing added, if that is not finite and neighbours are not apart.

        Args:
            values: all boxes, of which those of the strip are read when they are needed.
            extra: the value weights of the strip.
        """
        tiling = self.tiling
        weights, _ = tiling.weights(query, key, pooled_key, strip)
        if tiling.apart:
            tiling.leave_out(weights, strip)
        if self.need_products:
            products = tiling.multiply(grad, tiling.load(values, strip), pooled_value, strip)
            self._store_products(products, strip)
            grad_scores = softmax_backward(products, weights)
            if self.need_scores and not self._add_scores(grad_scores, query, key, pooled_key, strip):
                return False
        if not (self.need_scores or tiling.apart) and is_tainted(weights, grad):
            return False
        if extra is not None:
            weights[..., : tiling.neighbours].add_(extra)
        self._add_keys(self.value, self.pooled_value, weights, grad, strip)
        return True

    def _store_products(self, products: Tensor, strip: Chunk) -> None:
        if self.value_weights is not None:
            self.tiling.store(products[..., : self.tiling.neighbours].contiguous(), self.value_weights[0], strip)

    def _add_scores(self, grad_scores: Tensor, query: Tensor, key: Tensor, pooled_key: Tensor, strip: Chunk) -> bool:
        """As :meth:`add`, for what comes of the gradient of the scores."""
        tiling = self.tiling
        if tiling.apart:
            tiling.leave_out(grad_scores, strip)
        scaled = grad_scores if tiling.scale == 1.0 else grad_scores * tiling.scale
        grad_query = None if self.query is None else tiling.combine(scaled, key, pooled_key, strip)
        # A NaN of any of the inputs is in the gradient of the queries, as it is in that of the scores.
        if not tiling.apart and is_tainted(scaled if grad_query is None else grad_query):
            return False
        by_tile = tiling.by_tile(grad_scores, strip)
        if self.local_bias is not None:
            self.local_bias += by_tile[..., : tiling.neighbours].sum((0, 2, 3, 4, 5))
        if self.pooled_bias is not None:
            tiling._bias(self.pooled_bias[0], strip).add_(by_tile[..., tiling.neighbours :].sum(0))
        if self.query is not None and grad_query is not None:
            tiling.store(grad_query, self.query[0], strip)
        self._add_keys(self.key, self.pooled_key, scaled, query, strip)
        return True

    def _add_keys(
        self, boxes: Optional["_BoxSum"], pooled: Optional[Tensor], weights: Tensor, rows: Tensor, strip: Chunk
    ) -> None:
        """Add weights^T rows to the boxes and to the pooled tokens."""
        tiling = self.tiling
        if boxes is not None:
            boxes.add(tiling.spread(weights[..., : tiling.neighbours], rows), strip)
        if pooled is not None:
            rest = tiling.strip_by_head(weights[..., tiling.neighbours :], strip).to(rows.dtype)
            total = torch.bmm(rest.transpose(1, 2), tiling.strip_by_head(rows, strip))
            pooled[strip.images].flatten(0, 1).add_(total)

    def result(self) -> list[Tensor]:
        pooled_bias = None
        if self.pooled_bias is not None:
            pooled_bias = self.pooled_bias[1].flatten(1, 3).sum_to_size(self.pooled_bias_shape)
        found = (
            None if self.query is None else self.query[1],
            *(None if boxes is None else boxes.to_map() for boxes in (self.key, self.value)),
            *(
                None if pooled is None else pooled.transpose(1, 2).reshape(self.pooled_shape)
                for pooled in (self.pooled_key, self.pooled_value)
            ),
            self.local_bias,
            pooled_bias,
            None if self.value_weights is None else self.value_weights[1],
        )
        return [gradient for gradient in found if gradient is not None]


class _BoxSum:
    """Sum over the tiles of the gradients of their boxes, which overlap."""

    def __init__(self, tiling: Tiling, like: Tensor) -> None:
        self.tiling = tiling
        self.sum = like.new_zeros((like.shape[0], *tiling.padded, *like.shape[3:]), dtype=tiling.dtype)
        self.view = tiling.boxes_of_padded(self.sum)
        self.reach = [-(-box // tile) for box, tile in zip(tiling.box, tiling.tile, strict=True)]

    def add(self, tokens: Tensor, strip: Chunk) -> None:
        """Tiles that share tokens are added one after the other, so the order of the sum is always the same."""
        view = self.view[strip.images, strip.rows].permute(0, 3, 1, 2, 5, 6, 4)
        tokens = tokens.view(view.shape)
        for row, column in product(*(range(reach) for reach in self.reach)):
            apart = (slice(None), slice(None), slice(row, None, self.reach[0]), slice(column, None, self.reach[1]))
            view[apart].add_(tokens[apart])

    def to_map(self) -> Tensor:
        """(batch, height, width, heads, channels)."""
        before, (height, width) = self.tiling.window // 2, self.tiling.map
        return self.sum[:, before : before + height, before : before + width]
