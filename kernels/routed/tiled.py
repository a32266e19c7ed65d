"""Routed attention arranged for caches, in one of two plans.

The keys and values of the routed regions are gathered, some regions at a time. On small maps whose regions see most of
the others, or have so few tokens that the copies cost more than the products, all pairs of tokens are scored instead,
with the logarithm of how often a region is routed to added to its scores. What a region does not see would reach it so
as 0 * NaN: where the result is not finite the keys are gathered after all.

Scores, softmax and sums are float32 (float64 for float64 inputs); the weights are rounded to the dtype of the inputs
before they are multiplied with it. Regions share keys and values, so their gradients are added up in float32.
"""

from collections.abc import Iterator, Sequence
from typing import Optional

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from ..nonfinite import is_tainted
from ..tiling import Budget, Chunk, chunks, exponentials, grad_scores_of, ranges, scale_of
from .geometry import as_list, in_form_of

BUDGET = Budget()
"""It counts the scores of a chunk, or its gathered keys where they are more."""
DENSE_TOKENS = 256
"""Tokens of the largest map on which all pairs of tokens are scored."""


class GatherPlan:
    """Keys and values are gathered: one product is the queries of a region and a head, and all their keys."""

    def __init__(self, query: Tensor, routes: Tensor) -> None:
        self.batch, self.regions, self.tokens, self.heads, self.channels = query.shape
        self.routes = routes
        self.budget = BUDGET.of(query.device)

    @property
    def keys(self) -> int:
        """Keys of one query."""
        return self.routes.shape[2] * self.tokens

    def chunks(self) -> Iterator[Chunk]:
        """Some regions of some images."""
        numbers = self.heads * self.keys * max(self.tokens, self.channels)
        return chunks(self.batch, self.regions, numbers, self.budget)

    def load(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        """Queries of a chunk as (images * heads * regions, tokens, channels)."""
        part = tokens[chunk.images, chunk.rows].permute(0, 3, 1, 2, 4)  # (images, heads, regions, tokens, channels)
        return part.reshape(-1, self.tokens, tokens.shape[-1])

    def store(self, result: Tensor, output: Tensor, chunk: Chunk) -> None:
        """Write (images * heads * regions, tokens, channels) back."""
        view = output[chunk.images, chunk.rows].permute(0, 3, 1, 2, 4)
        view.copy_(result.view(view.shape))

    def load_keys(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        """Gather the keys or values of a chunk as (images * heads * regions, keys, channels)."""
        regions = self._by_head(tokens[chunk.images])
        gathered = regions.flatten(0, 2).flatten(1).index_select(0, self._rows(chunk))
        return gathered.view(-1, self.keys, tokens.shape[-1])

    def add_keys(self, result: Tensor, gradient: Tensor, chunk: Chunk) -> None:
        """Add (images * heads * regions, keys, channels) to the tokens that they were gathered from."""
        rows = gradient[chunk.images].flatten(0, 2).flatten(1)
        rows.index_add_(0, self._rows(chunk), result.reshape(-1, rows.shape[1]).to(rows.dtype))

    def new_gradient(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros (batch, heads, regions, tokens, channels) that gradients of keys are added to."""
        shape = (self.batch, self.heads, self.regions, self.tokens, tokens.shape[-1])
        return tokens.new_zeros(shape, dtype=dtype)

    def mask(self, scores: Tensor, chunk: Chunk) -> None:
        """Every key of a product is one that its queries see."""

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.permute(0, 3, 1, 2, 4).contiguous()

    def _rows(self, chunk: Chunk) -> Tensor:
        """Of the routed regions, in (images, heads, regions) of the images of a chunk: one for each product and key."""
        routes = self.routes[chunk.images, None, chunk.rows].long()
        first = torch.arange(len(routes) * self.heads, device=routes.device) * self.regions
        return (routes + first.view(-1, self.heads, 1, 1)).flatten()


class DensePlan(GatherPlan):
    """All pairs of tokens of an image are scored: one product is a head of an image."""

    @property
    def keys(self) -> int:
        return self.regions * self.tokens

    def chunks(self) -> Iterator[Chunk]:
        images = max(1, self.budget // (self.heads * self.keys**2))
        return (Chunk(part, slice(0, self.regions)) for part in ranges(self.batch, images))

    def load(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        return super().load(tokens, chunk).view(-1, self.keys, tokens.shape[-1])

    def load_keys(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        return self.load(tokens, chunk)

    def add_keys(self, result: Tensor, gradient: Tensor, chunk: Chunk) -> None:
        rows = gradient[chunk.images]
        rows.copy_(result.view(rows.shape))

    def mask(self, scores: Tensor, chunk: Chunk) -> None:
        """Add the logarithm of how often each region is routed to, -inf where it is not."""
        routes = self.routes[chunk.images].long()
        counts = scores.new_zeros(*routes.shape[:2], self.regions)
        counts.scatter_add_(2, routes, counts.new_ones(1).expand(routes.shape))
        by_region = scores.view(len(routes), self.heads, self.regions, self.tokens, self.regions, self.tokens)
        by_region.add_(counts.log_()[:, None, :, None, :, None])


def plan(query: Tensor, routes: Tensor) -> GatherPlan:
    """The faster plan of a call, as measured on a CPU: a gathered key costs as much as four products with it."""
    regions, tokens = query.shape[1:3]
    gathered_and_multiplied = routes.shape[2] * (tokens + 4)
    dense = regions * tokens <= min(DENSE_TOKENS, gathered_and_multiplied)
    return (DensePlan if dense else GatherPlan)(query, routes)


def forward(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: Optional[float]) -> tuple[Tensor, Tensor]:
    """Output, and logsumexp of the scores."""
    form = query
    query, key, value = map(as_list, (query, key, value))
    regions = plan(query, routes)
    output, logsumexp = _attend(regions, query, key, value, scale)
    if isinstance(regions, DensePlan) and is_tainted(output):
        output, logsumexp = _attend(GatherPlan(query, routes), query, key, value, scale)
    return in_form_of(form, output), in_form_of(form, logsumexp)


def _attend(
    regions: GatherPlan, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float]
) -> tuple[Tensor, Tensor]:
    """:func:`forward` of lists of regions, by a plan."""
    dtype = accumulation_dtype(query.dtype)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty((*query.shape[:-1], 1), dtype=dtype)
    for chunk in regions.chunks():
        queries, keys = regions.load(query, chunk), regions.load_keys(key, chunk)
        scores = torch.bmm(queries, keys.transpose(1, 2)).to(dtype).mul_(scale_of(scale, query.shape[-1]))
        regions.mask(scores, chunk)
        weights, total, lse = exponentials(scores)
        result = torch.bmm(weights.to(value.dtype), regions.load_keys(value, chunk))
        regions.store(result.to(dtype).div_(total), output, chunk)
        regions.store(lse, logsumexp, chunk)
    return output, logsumexp.squeeze(-1)


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    scale: Optional[float],
) -> list[Tensor]:
    """Gradients of query, key and value, those that are needed.

    With weights P and scores S: dV = P^T dO, dP = dO V^T, dS = P dP - P sum(P dP), dQ = scale dS K and
    dK = scale dS^T Q; a token collects dK and dV of every region that is routed to its own.
    """
    form = query
    query, key, value, grad_output = map(as_list, (query, key, value, grad_output))
    regions = plan(query, routes)
    tokens = (query, key, value, grad_output)
    gradients = _differentiate(regions, *tokens, scale_of(scale, query.shape[-1]), needs_gradient)
    if isinstance(regions, DensePlan) and is_tainted(*gradients):
        gradients = _differentiate(GatherPlan(query, routes), *tokens, scale_of(scale, query.shape[-1]), needs_gradient)
    return [in_form_of(form, gradient) for gradient in gradients]


def _differentiate(
    regions: GatherPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    scale: float,
    needs_gradient: Sequence[bool],
) -> list[Tensor]:
    """:func:`backward` of lists of regions, by a plan."""
    dtype = accumulation_dtype(query.dtype)
    grad_query = query.new_empty(query.shape) if needs_gradient[0] else None
    grad_key, grad_value = (
        regions.new_gradient(tensor, dtype) if needed else None
        for tensor, needed in zip((key, value), needs_gradient[1:], strict=True)
    )
    for chunk in regions.chunks():
        queries, grads = regions.load(query, chunk), regions.load(grad_output, chunk)
        keys, values = regions.load_keys(key, chunk), regions.load_keys(value, chunk)
        scores = torch.bmm(queries, keys.transpose(1, 2)).to(dtype).mul_(scale)
        regions.mask(scores, chunk)
        weights = scores.softmax(-1)
        if grad_value is not None:
            regions.add_keys(torch.bmm(weights.to(value.dtype).transpose(1, 2), grads), grad_value, chunk)
        if grad_query is None and grad_key is None:
            continue
        grad_scores = grad_scores_of(torch.bmm(grads, values.transpose(1, 2)).to(dtype), weights)
        rounded = grad_scores.mul_(scale).to(query.dtype)
        if grad_query is not None:
            regions.store(torch.bmm(rounded, keys), grad_query, chunk)
        if grad_key is not None:
            regions.add_keys(torch.bmm(rounded.transpose(1, 2), queries), grad_key, chunk)
    summed = [x.permute(0, 2, 3, 1, 4) for x in (grad_key, grad_value) if x is not None]
    return ([] if grad_query is None else [grad_query]) + summed
