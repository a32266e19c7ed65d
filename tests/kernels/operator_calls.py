"""How `test_contract.py` calls each operator, with its examples: a new operator joins by an entry in CALLS."""

from collections.abc import Callable
from dataclasses import dataclass
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
from vicinal.kernels.dispatch import OPERATORS


@dataclass
class Call:
    """An operator with the options of an example, whose map may grow in steps of `step`.

    Attributes:
        example: name of a small example of the operator.
        keys: of each query.
        bias: shape, for one head, of the tensor that is given beside query, key and value.
        bias_argument: name of that tensor.
    """

    function: Callable[..., Tensor]
    example: str
    keys: int
    bias: tuple[int, ...]
    bias_argument: str = "relative_position_bias"
    step: int = 4

    def __post_init__(self) -> None:
        name = self.function.__name__
        example = OPERATORS[name.removesuffix("_packed")].examples.small[self.example]
        _, *self.map, self.heads, self.head_dim = example.shapes[0]
        self.options = example.options
        self.names = OPERATORS[name].names
        self.differentiable = [self.names[index] for index in OPERATORS[name].differentiable]

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

    def named(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """The tensors of a call by name; those of the example that are not here are left out."""
        return {"query": query, "key": key, "value": value, self.bias_argument: bias}

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(**self.named(query, key, value, bias), **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        """Arguments of the registered operator."""
        filled = {**self.options, **self.named(query, key, value, bias)}
        return tuple(filled.get(name) for name in self.names)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        """needs_gradient of the backward operator."""
        needed = {"query": query, "key": key, "value": value, self.bias_argument: bias}
        return [needed.get(name, False) for name in self.differentiable]


@dataclass
class PackedCall(Call):
    """Query, key and value in one tensor."""

    def named(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        return {"packed": torch.stack([query, key, value], -3), self.bias_argument: bias}

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query or key or value, bias]


@dataclass
class AggregatedCall(Call):
    """Pooled tokens without gradient; the bias is that of the neighbours."""

    bias_argument: str = "local_bias"

    def named(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        pooled = key.detach()[:, :2, :2].flatten(1, 2)
        return {**super().named(query, key, value, bias), "pooled_key": pooled, "pooled_value": pooled}


@dataclass
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


@dataclass
class HaloCall(Call):
    """The bias is one of the relative logits, the same for every query."""

    bias_argument: str = "relative_height_logits"

    def named(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        return super().named(query, key, value, expand_over_queries(bias, query))


def expand_over_queries(bias: Tensor | None, query: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(query.shape[0], query.shape[1], query.shape[2], -1, -1)


@dataclass
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


@dataclass
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
    "window": Call(window_attention, "shifted", keys=16, bias=(7, 7)),
    "grid": Call(window_attention, "grid", keys=8, bias=(7, 3)),
    "neighborhood": Call(neighborhood_attention, "dilated", keys=9, bias=(5, 5)),
    "packed window": PackedCall(window_attention_packed, "shifted", keys=16, bias=(7, 7)),
    "packed neighborhood": PackedCall(neighborhood_attention_packed, "dilated", keys=9, bias=(5, 5)),
    "aggregated": AggregatedCall(aggregated_attention, "neighbours", keys=9 + 4, bias=(9,)),
    "gated": GatedCall(gated_positional_attention, "map", keys=64, bias=(3,)),
    "routed": RoutedCall(routed_attention, "regions", keys=16, bias=(8,)),
    "packed routed map": RoutedMapCall(routed_attention_packed, "regions", keys=32, bias=(8,)),
    "halo": HaloCall(halo_attention, "blocks", keys=36, bias=(6,)),
}
