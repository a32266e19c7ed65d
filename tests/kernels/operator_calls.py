"""How `test_contract.py` calls each operator: a new operator joins by an entry in CALLS."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from operator_testing import random_inputs
from torch import Tensor

from vicinal.kernels import (
    aggregated_attention,
    gated_positional_attention,
    halo_attention,
    neighborhood_attention,
    neighborhood_attention_packed,
    routed_attention,
    routed_attention_packed,
    window_attention,
    window_attention_packed,
)


@dataclass(frozen=True)
class Call:
    """An operator with options, and a map that its sizes may grow from in steps of `step`."""

    function: Callable[..., Tensor]
    options: dict[str, Any]
    operands: tuple[Any, ...]
    bias: tuple[int, ...]
    keys: int
    map: tuple[int, int] = (8, 8)
    step: int = 4
    heads: int = 2
    head_dim: int = field(default=8)

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.vicinal, self.function.__name__)

    @property
    def backward_operator(self) -> Any:
        return getattr(torch.ops.vicinal, f"{self.function.__name__}_backward")

    def inputs(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", batch: int = 2) -> list[Tensor]:
        """Query, key, value and a bias."""
        shape = (batch, *self.map, self.heads, self.head_dim)
        return [*random_inputs(shape, dtype, layout), torch.randn(self.heads, *self.bias, dtype=dtype)]

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(query, key, value, relative_position_bias=bias, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        """Arguments of the registered operator."""
        return (query, key, value, *self.operands, bias, None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        """needs_gradient of the backward operator."""
        return [query, key, value, bias]


@dataclass(frozen=True)
class PackedCall(Call):
    """Query, key and value in one tensor."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        packed = torch.stack([query, key, value], -3)
        return self.function(packed, relative_position_bias=bias, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        return (torch.stack([query, key, value], -3), *self.operands, bias, None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query or key or value, bias]


@dataclass(frozen=True)
class AggregatedCall(Call):
    """Pooled tokens without gradient; the bias is that of the neighbours."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        pooled = key.detach()[:, :2, :2].flatten(1, 2)
        return self.function(query, key, value, pooled, pooled, local_bias=bias, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        pooled = key.detach()[:, :2, :2].flatten(1, 2)
        return (query, key, value, pooled, pooled, *self.operands, bias, None, None, 1.0)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value, False, False, bias, False, False]


@dataclass(frozen=True)
class GatedCall(Call):
    """The scores of position and the gate come from the bias, so that they follow the size of the map."""

    def positional(self, query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        # positions from a running sum: sizes of a torch.fx proxy are no numbers
        position = query.new_ones(query.shape[1:3], dtype=torch.float32).flatten().cumsum(0) / 16
        offset = position[None, :] - position[:, None]
        return bias[:, 0, None, None] * offset + bias[:, 1, None, None] * offset.square(), bias[:, 2]

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        bias = query.new_zeros(query.shape[3], 3) if bias is None else bias
        return self.function(query, key, value, *self.positional(query, bias))

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        tokens = query.shape[1] * query.shape[2]
        scores, gate = torch.randn(self.heads, tokens, tokens), torch.randn(self.heads)
        needed = bias is not None and bias.requires_grad
        return (query, key, value, scores.requires_grad_(needed), gate.requires_grad_(needed), None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value, bias, bias]


@dataclass(frozen=True)
class HaloCall(Call):
    """The bias is one of the relative logits, the same for every query."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        logits = expand_over_queries(bias, query)
        return self.function(query, key, value, relative_height_logits=logits, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        return (query, key, value, *self.operands, expand_over_queries(bias, query), None, False, None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value, bias, False]


def expand_over_queries(bias: Tensor | None, query: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(query.shape[0], query.shape[1], query.shape[2], -1, -1)


@dataclass(frozen=True)
class RoutedCall(Call):
    """A map is its regions and their tokens; each sees itself and its mirror image. The bias is added to the output."""

    def routes(self, query: Tensor) -> Tensor:
        # numbers of the regions from a running sum: sizes of a torch.fx proxy are no numbers
        number = query.new_ones(query.shape[:2], dtype=torch.int64).cumsum(1) - 1
        return torch.stack((number, number.flip([1])), -1)

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        output = self.function(query, key, value, self.routes(query))
        return output if bias is None else output + bias.to(output.dtype)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        return (query, key, value, self.routes(query), None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value]


@dataclass(frozen=True)
class RoutedMapCall(RoutedCall):
    """The map divided into 2 x 2 regions in place, and packed."""

    def divide(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (2, -1)).unflatten(1, (2, -1))

    def routes(self, query: Tensor) -> Tensor:
        number = query.new_ones((query.shape[0], 4), dtype=torch.int64).cumsum(1) - 1
        return torch.stack((number, number.flip([1])), -1)

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        packed = self.divide(torch.stack([query, key, value], -3))
        output = self.function(packed, self.routes(query)).flatten(3, 4).flatten(1, 2)
        return output if bias is None else output + bias.to(output.dtype)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        return (self.divide(torch.stack([query, key, value], -3)), self.routes(query), None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query or key or value]


CALLS = {
    "window": Call(
        window_attention,
        {"window_size": 4, "shift": (1, 2)},
        ([4, 4], "block", [1, 2]),
        (7, 7),
        keys=16,
    ),
    "grid": Call(
        window_attention,
        {"window_size": (4, 2), "partition": "grid"},
        ([4, 2], "grid", [0]),
        (7, 3),
        keys=8,
    ),
    "neighborhood": Call(
        neighborhood_attention,
        {"kernel_size": 3, "dilation": (2, 1)},
        ([3], [1], [2, 1], [False]),
        (5, 5),
        keys=9,
    ),
    "packed window": PackedCall(
        window_attention_packed,
        {"window_size": 4, "shift": (1, 2)},
        ([4, 4], "block", [1, 2]),
        (7, 7),
        keys=16,
    ),
    "packed neighborhood": PackedCall(
        neighborhood_attention_packed,
        {"kernel_size": 3, "dilation": (2, 1)},
        ([3], [1], [2, 1], [False]),
        (5, 5),
        keys=9,
    ),
    "aggregated": AggregatedCall(aggregated_attention, {"window_size": 3}, (3,), (9,), keys=9 + 4),
    "gated": GatedCall(gated_positional_attention, {}, (), (3,), keys=64),
    "routed": RoutedCall(routed_attention, {}, (), (8,), keys=16),
    "packed routed map": RoutedMapCall(routed_attention_packed, {}, (), (8,), keys=32),
    "halo": HaloCall(halo_attention, {"block_size": 4, "halo_size": 1}, (4, 1), (6,), keys=36),
}
