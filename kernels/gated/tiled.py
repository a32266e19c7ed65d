"""Gated positional attention, some images at a time.

The weights by position are the same for every image and are made once. The two kinds of weights are mixed before they
meet the values, so that there is one product with the values, as in plain attention.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from ..tiling import Budget, exponentials, ranges, scale_of

BUDGET = Budget(on_device=1 << 27)
"""On a device the scores of a chunk are twice as many as those of other operators, so that several images fill it."""


class Mixture:
    """The two kinds of weights, and how much of the second a head takes."""

    def __init__(self, query: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float]) -> None:
        self.dtype = accumulation_dtype(query.dtype)
        self.heads, self.tokens = position_scores.shape[:2]
        self.scale = scale_of(scale, query.shape[-1])
        self.gate = gate.to(self.dtype).sigmoid()[:, None, None]
        self.position = position_scores.to(self.dtype).softmax(-1)  # (heads, tokens, tokens)
        self.weighted_position = self.position * self.gate

    def chunks(self, query: Tensor) -> list[slice]:
        """Ranges of images whose scores are held together."""
        return ranges(len(query), max(1, BUDGET.of(query.device) // self.position.numel()))

    def load(self, tokens: Tensor, chunk: slice) -> Tensor:
        """Images of a chunk as (images * heads, tokens, head_dim)."""
        return tokens[chunk].flatten(1, -3).transpose(1, 2).reshape(-1, self.tokens, tokens.shape[-1])

    def store(self, result: Tensor, output: Tensor, chunk: slice) -> None:
        """Write (images * heads, tokens, channels) into the images of a contiguous output."""
        by_head = result.view(-1, self.heads, self.tokens, result.shape[-1])
        output[chunk].view(len(by_head), self.tokens, self.heads, -1).copy_(by_head.transpose(1, 2))

    def by_head(self, weights: Tensor) -> Tensor:
        """(images * heads, tokens, tokens) as (images, heads, tokens, tokens)."""
        return weights.view(-1, self.heads, self.tokens, self.tokens)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores of content, (images * heads, tokens, tokens)."""
        return torch.bmm(query, key.transpose(1, 2)).to(self.dtype).mul_(self.scale)


def forward(
    query: Tensor, key: Tensor, value: Tensor, position_scores: Tensor, gate: Tensor, scale: Optional[float]
) -> tuple[Tensor, Tensor]:
    """Output, and logsumexp of the scores of content."""
    mixture = Mixture(query, position_scores, gate, scale)
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty((*query.shape[:-1], 1), dtype=mixture.dtype)
    for chunk in mixture.chunks(query):
        queries, keys, values = (mixture.load(tokens, chunk) for tokens in (query, key, value))
        scores = mixture.scores(queries, keys)
        weights, total, lse = exponentials(scores)
        by_head = mixture.by_head(weights)
        content_factor = (1 - mixture.gate) / total.view(-1, mixture.heads, mixture.tokens, 1)
        torch.addcmul(mixture.weighted_position, by_head, content_factor, out=by_head)
        mixture.store(torch.bmm(weights.to(values.dtype), values), output, chunk)
        mixture.store(lse, logsumexp, chunk)
    return output, logsumexp.squeeze(-1)


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_scores: Tensor,
    gate: Tensor,
    scale: Optional[float],
) -> list[Tensor]:
    """Gradients of query, key, value, position_scores and gate, those that are needed.

    With weights A by content and P by position, gate g and W = (1 - g) A + g P: dV = W^T dO and dW = dO V^T; then
    dS = (1 - g) (A dW - A sum(A dW)) gives dQ = scale dS K and dK = scale dS^T Q. Summed over the images, dW gives
    the gradient of position_scores, g (P dW - P sum(P dW)), and (P - A) dW gives that of the gate, times g (1 - g).
    """
    mixture = Mixture(query, position_scores, gate, scale)
    wanted = zip((query, key, value), needs_gradient[:3], strict=True)
    gradients = [tensor.new_empty(tensor.shape) if needed else None for tensor, needed in wanted]
    grad_mixed = torch.zeros_like(mixture.position)
    content_sum = torch.zeros_like(mixture.gate)  # sum of A dW by head
    for chunk in mixture.chunks(query):
        inputs = [mixture.load(tokens, chunk) for tokens in (query, key, value, grad_output)]
        content = mixture.scores(*inputs[:2]).softmax(-1)
        grad_value = _value_gradient(mixture, content, inputs[3]) if needs_gradient[2] else None
        grad_weights = torch.bmm(inputs[3], inputs[2].transpose(1, 2)).to(mixture.dtype)
        if needs_gradient[3] or needs_gradient[4]:
            grad_mixed.add_(mixture.by_head(grad_weights).sum(0))
        grad_weights.mul_(content)
        rows = grad_weights.sum(-1, keepdim=True)
        content_sum.add_(rows.view(-1, mixture.heads, mixture.tokens, 1).sum((0, 2), keepdim=True)[0])
        results = (*_score_gradients(mixture, content, grad_weights, rows, inputs, needs_gradient), grad_value)
        for result, gradient in zip(results, gradients, strict=True):
            if result is not None and gradient is not None:
                mixture.store(result, gradient, chunk)
    needed = [gradient for gradient in gradients if gradient is not None]
    by_position = (grad_mixed * mixture.position).sum(-1, keepdim=True)
    if needs_gradient[3]:
        needed.append(grad_mixed.sub_(by_position).mul_(mixture.weighted_position))
    if needs_gradient[4]:
        grad_gate = by_position.sum(1, keepdim=True) - content_sum
        needed.append((grad_gate * mixture.gate * (1 - mixture.gate)).flatten())
    return needed


def _value_gradient(mixture: Mixture, content: Tensor, grad_output: Tensor) -> Tensor:
    """W^T dO of one chunk."""
    mixed = torch.addcmul(mixture.weighted_position, mixture.by_head(content), 1 - mixture.gate)
    return torch.bmm(mixed.view_as(content).to(grad_output.dtype).transpose(1, 2), grad_output)


def _score_gradients(
    mixture: Mixture,
    content: Tensor,
    weighted: Tensor,
    rows: Tensor,
    inputs: Sequence[Tensor],
    needs_gradient: Sequence[bool],
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of query and key of one chunk, those that are needed, from A dW, which is overwritten, and its sums."""
    if not (needs_gradient[0] or needs_gradient[1]):
        return None, None
    query, key = inputs[:2]
    grad_scores = weighted.addcmul_(content, rows, value=-1)
    factor = (1 - mixture.gate) * mixture.scale
    rounds = query.dtype != mixture.dtype
    if rounds:
        mixture.by_head(grad_scores).mul_(factor)
    grad_scores = grad_scores.to(query.dtype)
    grad_query = torch.bmm(grad_scores, key) if needs_gradient[0] else None
    grad_key = torch.bmm(grad_scores.transpose(1, 2), query) if needs_gradient[1] else None
    for gradient in (grad_query, grad_key):
        # narrower than the scores, so less work; but not where it would be rounded twice
        if gradient is not None and not rounds:
            gradient.view(-1, mixture.heads, *gradient.shape[1:]).mul_(factor)
    return grad_query, grad_key
