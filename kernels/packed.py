"""Operators on a packed projection: query, key and value as one tensor (batch, *spatial, 3, heads, head_dim).

Their forward is that of the operator on the three views. Their backward has one gradient to return, which the fused
kernels and some tiled forms write in place, where autograd would have to stack three gradients into a new tensor.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import Operator

AXIS = -3
SEPARATE = "Tensor query, Tensor key, Tensor value"


@cache
def _takes_space(implementation: ModuleType) -> bool:
    """Whether its backward has an argument `into`, the tensors to write the gradients of query, key and value to."""
    return "into" in inspect.signature(implementation.backward).parameters


class PackedOperator(Operator):
    """The packed form of an operator, registered as ``vicinal::<name>_packed``.

    Args:
        operator: the one on three tensors.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(
            f"{operator.name}_packed",
            operator.schema.replace(SEPARATE, "Tensor packed"),
            differentiable=("packed", *(operator.names[index] for index in operator.differentiable[3:])),
            check=operator.check,
            reference=operator.reference,
            tiled=operator.tiled,
            examples=operator.examples.packed(),
            keys_per_query=operator.keys_per_query,
            shared=[operator.names[index] for index in operator.shared],
            autocast=("packed",),
            fused=operator.fused,
        )

    def unpacked(self, arguments: Sequence[Any]) -> tuple:
        packed, *options = arguments
        shape = packed.shape if isinstance(packed, Tensor) else packed
        if len(shape) < 4 or shape[AXIS] != 3:
            raise ValueError(f"packed has shape {tuple(shape)}; it must be (batch, *spatial, 3, heads, head_dim)")
        if isinstance(packed, Tensor):
            return (*packed.unbind(AXIS), *options)
        return (torch.Size([*shape[:AXIS], *shape[AXIS + 1 :]]),) * 3 + tuple(options)

    def _run_backward(
        self, implementation: ModuleType, results: Sequence[Tensor], needs_gradient: Sequence[bool], unpacked: tuple
    ) -> list[Tensor]:
        needed = [*[needs_gradient[0]] * 3, *needs_gradient[1:]]
        inputs = (*results, needed, *unpacked)
        if not needs_gradient[0]:
            return implementation.backward(*inputs)
        if not _takes_space(implementation):
            query, key, value, *others = implementation.backward(*inputs)
            return [torch.stack([query, key, value], AXIS), *others]
        *spatial, heads, head_dim = unpacked[0].shape
        packed = unpacked[0].new_empty((*spatial, 3, heads, head_dim))
        _, _, _, *others = implementation.backward(*inputs, into=packed.unbind(AXIS))
        return [packed, *others]
