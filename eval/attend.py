"""Attention maps of a trained network, read from its attention modules while it runs.

Works on every module with the three methods of :class:`AttentionModule`, whatever its neighbourhoods look like: how
much a position is attended to is the transpose of ``aggregate``, which autograd applies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class AttentionModule(Protocol):
    """What an attention module over channels-last maps (B, H, W, channels) offers to be looked into."""

    def pad(self, x: Tensor) -> Tensor:
        """The map at the size on which attention runs."""
        ...

    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, keys)."""
        ...

    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sum of the values (B, H, W, heads, head_dim) of each query's keys, by weight."""
        ...


class AttentionRecord(NamedTuple):
    """One pass through one attention module."""

    name: str
    """Name of the module in the model."""
    weights: Tensor
    """Softmax weights (B, H, W, heads, keys), padding cropped."""
    received: Tensor
    """For each position (B, H, W) the attention that all queries and heads pay to it, as a multiple of what uniform
    weights would pay; its neighbourhoods alone would favour some positions, such as those near a border."""


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionRecord]]:
    """Record every attention module of the model while it runs.

    Yields:
        A list that each forward pass extends, one record per attention module, in the order in which they run.
    """
    records: list[AttentionRecord] = []
    handles = [
        module.register_forward_pre_hook(_Recorder(name, records))
        for name, module in model.named_modules()
        if isinstance(module, AttentionModule)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    def __init__(self, name: str, records: list[AttentionRecord]):
        self.name, self.records = name, records

    def __call__(self, module: AttentionModule, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        height, width = x.shape[1:3]
        with torch.no_grad():
            weights = module.attention_weights(module.pad(x)).float()
        uniform = torch.full_like(weights, 1 / weights.shape[-1])
        received = _received(module, weights, height, width) / _received(module, uniform, height, width)
        self.records.append(AttentionRecord(self.name, weights[:, :height, :width], received))


def _received(module: AttentionModule, weights: Tensor, height: int, width: int) -> Tensor:
    """Sum over the unpadded queries and all heads of the weights on each key: (B, H, W)."""
    with torch.enable_grad():
        value = weights.new_ones(*weights.shape[:4], 1, requires_grad=True)
        output = module.aggregate(weights, value)
        (received,) = torch.autograd.grad(output[:, :height, :width].sum(), value)
    return received.flatten(3).sum(3)[:, :height, :width]
