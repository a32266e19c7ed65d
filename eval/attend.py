"""Attention maps of a trained network, read from its attention modules while it runs.

Works on every module with the methods of :class:`~vicinal.zoo.blocks.AttentionModule`, whatever its neighbourhoods look
like: how much a position is attended to is the transpose of ``aggregate``, which autograd applies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..zoo.blocks import AttentionModule


class AttentionRecord(NamedTuple):
    """One pass through one attention module."""

    name: str
    """Name of the module in the model."""
    weights: Tensor
    """Softmax weights (B, H', W', heads, keys) of each query, padding cropped; H' is H, or less behind a stride."""
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
        rows = 2 if getattr(module, "input_fmt", "NHWC") == "NCHW" else 1  # the axis that counts them
        height, width = x.shape[rows : rows + 2]
        with torch.no_grad():
            padded = module.pad(x)
            weights = module.attention_weights(padded).float()
        size = padded.shape[rows : rows + 2]
        uniform = torch.full_like(weights, 1 / weights.shape[-1])
        received, expected = (_received(module, each, size, (height, width)) for each in (weights, uniform))
        self.records.append(AttentionRecord(self.name, weights[:, :height, :width], received / expected))


def _received(module: AttentionModule, weights: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Sum over the unpadded queries and all heads of the weights on each key: (B, H, W)."""
    height, width = size
    with torch.enable_grad():
        value = weights.new_ones(weights.shape[0], *padded, weights.shape[3], 1, requires_grad=True)
        output = module.aggregate(weights, value)
        (received,) = torch.autograd.grad(output[:, :height, :width].sum(), value)
    return received.flatten(3).sum(3)[:, :height, :width]
