"""Example arguments of an operator: what doctor, benchmarks, the table of kernels and the tests of all operators take.

Each operator has an `examples.py` beside it, which describes calls by their shapes; a tensor is made where it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import Tensor

Fill = Callable[..., Tensor]
"""``fill(shape, dtype=...)`` makes a tensor, as torch.zeros and torch.randn do."""


@dataclass(frozen=True)
class Operand:
    """A tensor argument.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor; None for that of the call.
        part_of: name of the packed tensor, (..., parts, heads, channels), that it is one part of: what one projection
            makes of the tokens. Parts have one shape.
    """

    shape: tuple[int, ...]
    dtype: Optional[torch.dtype] = None
    part_of: Optional[str] = None

    def make(self, dtype: torch.dtype, fill: Fill) -> Tensor:
        return fill(self.shape, dtype=self.dtype or dtype)


@dataclass(frozen=True)
class Routes(Operand):
    """Different regions for each region, (batch, regions, k)."""

    dtype: Optional[torch.dtype] = torch.int64

    def make(self, dtype: torch.dtype, fill: Fill) -> Tensor:
        batch, regions, k = self.shape
        return fill((batch, regions, regions), dtype=torch.float32).argsort(-1)[..., :k]


@dataclass(frozen=True)
class Example:
    """One call.

    Attributes:
        arguments: all of the operator's, by name in the order of its schema, operands in the place of tensors.
    """

    arguments: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that are no tensors."""
        return {name: value for name, value in self.arguments.items() if not isinstance(value, Operand)}

    @property
    def shapes(self) -> tuple:
        """The arguments with shapes in the place of tensors."""
        return tuple(value.shape if isinstance(value, Operand) else value for value in self.arguments.values())

    def leaves(self, dtype: torch.dtype, fill: Fill) -> dict[str, Tensor]:
        """The tensors by name, those that one projection makes packed."""
        parts: dict[str, list[Operand]] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Operand):
                parts.setdefault(value.part_of or name, []).append(value)
        leaves = {}
        for name, (operand, *others) in parts.items():
            if operand.part_of is None:
                leaves[name] = operand.make(dtype, fill)
            else:
                *tokens, heads, channels = operand.shape
                leaves[name] = fill((*tokens, 1 + len(others), heads, channels), dtype=operand.dtype or dtype)
        return leaves

    def bind(self, leaves: Mapping[str, Tensor]) -> tuple:
        """The arguments with these tensors: parts are views of what is packed."""
        parts = {name: iter(tensor.unbind(-3)) for name, tensor in leaves.items() if name not in self.arguments}
        return tuple(
            value if not isinstance(value, Operand) else next(parts[value.part_of]) if value.part_of else leaves[name]
            for name, value in self.arguments.items()
        )

    def make(self, dtype: torch.dtype, fill: Fill = torch.randn) -> tuple:
        """The arguments of a call."""
        return self.bind(self.leaves(dtype, fill))

    def packed(self) -> "Example":
        """The arguments of the operator on a packed projection."""
        query, _, _, *others = self.arguments.items()
        *tokens, heads, channels = query[1].shape
        return Example({"packed": Operand((*tokens, 3, heads, channels)), **dict(others)})


@dataclass(frozen=True)
class Examples:
    """The examples of one operator.

    Attributes:
        small: calls on maps of a few tokens by name; the first, "every argument", gives every tensor and sets every
            option to what is neither its default nor trivial.
        stage: ``stage(*shape, **options)``, a call with every bias and the options of the networks that use it.
        shapes: what `stage` takes, by the name of the set that benchmarks ask for: `full`, the stages at 224 pixels
            with a batch of 8; `gpu`, these with a batch of 128; `small`, a few seconds.
        compile: ``compile(window, rank, head_dim)``, a call whose kernels are compiled ahead of time, for a side of a
            window, a region or a block, or a size of a kernel, and a number of spatial axes.
        compiled: what `compile` is asked for: (window, rank).
    """

    small: Mapping[str, Example]
    stage: Callable[..., Example]
    shapes: Mapping[str, Sequence[tuple[int, ...]]]
    compile: Optional[Callable[[int, int, int], Example]] = None
    compiled: Sequence[tuple[int, int]] = field(default=())

    @property
    def typical(self) -> Example:
        """The first stage for one image."""
        return self.stage(1, *self.shapes["full"][0][1:])

    def packed(self) -> "Examples":
        """Those of the operator on a packed projection."""
        small = {name: example.packed() for name, example in self.small.items()}
        return replace(self, small=small, stage=lambda *shape, **options: self.stage(*shape, **options).packed())


def tokens_of_one_projection(shape: Sequence[int]) -> dict[str, Operand]:
    """Query, key and value of one shape, packed."""
    return {name: Operand(tuple(shape), part_of="packed") for name in ("query", "key", "value")}


def bias_table(heads: int, window: Sequence[int]) -> Operand:
    """A relative position bias in float32, as parameters are."""
    return Operand((heads, *(2 * size - 1 for size in window)), torch.float32)


def map_for_compilation(window: int, rank: int, head_dim: int) -> tuple[int, ...]:
    """(batch, *spatial, heads, head_dim) of a map of many windows."""
    return 8, *({1: 4096, 2: 8 * window, 3: 16}[rank],) * rank, 4, head_dim
