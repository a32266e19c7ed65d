"""Derivatives and batching of the registered operators: what autograd and ``torch.func`` make of them.

Reverse mode calls the backward operator. Forward mode runs the reference, whose parts torch knows how to differentiate,
and so does forward over reverse. ``vmap`` folds the mapped axis into the batch. ``torch.library.register_autograd``,
which has reverse mode alone, drops tangents and refuses every transform of ``torch.func``.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.autograd.function import Function
from torch.nn import Parameter

from ..torch_internals import (
    DispatchKeySet,
    OpOverload,
    SingleLevelFunction,
    any_requires_grad,
    are_transforms_active,
    below_autograd,
    enable_inplace_requires_grad,
    enable_single_level_autograd_function,
    is_forward_mode_open,
    is_inside_transform,
    keep_forward_gradients,
)

if TYPE_CHECKING:
    from .dispatch import Operator

LEADING = 4
"""A backward operator has grad_output, output, logsumexp and needs_gradient before the arguments of its forward."""
DUAL_LEVEL = 0
"""torch has this one level of forward-mode AD; the nested ones of torch.func lie in its wrappers."""


def has_tangents(values: Sequence[Any]) -> bool:
    """Whether forward-mode AD follows one of the tensors, at the innermost level of ``torch.func``."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    # Code that is compiled enters forward mode without the count that torch keeps in Python.
    traced = any(type(tensor) not in (Tensor, Parameter) for tensor in tensors)
    possible = traced or is_inside_transform() or is_forward_mode_open(DUAL_LEVEL)
    return possible and any(unpack_dual(tensor, level=DUAL_LEVEL).tangent is not None for tensor in tensors)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` is at work, or forward-mode AD follows one of the tensors.

    A function in C++ that has a first derivative alone gives way to its formula then.
    """
    if are_transforms_active():
        return True
    return not torch.compiler.is_compiling() and has_tangents(tensors)


def register_autograd(operator: "Operator", library: torch.library.Library) -> None:
    """Register the derivatives of an operator and of its backward operator."""
    for op, setup_context, differentiate, by_reference in (
        (operator.forward_op, operator.setup_context, operator.differentiate, _forward_by_reference),
        (operator.backward_op, _save_nothing, operator.refuse_double_backward, _backward_by_reference),
    ):
        kernel = _autograd_kernel(op.default, setup_context, differentiate, _bound(by_reference, operator))
        library.impl(op.default.name().partition("::")[2], kernel, "Autograd", with_keyset=True)


def _bound(function: Callable, operator: "Operator") -> Callable:
    return lambda *arguments: function(operator, *arguments)


def _save_nothing(*_: Any) -> None:
    """A backward operator has no second derivative to save for."""


def _autograd_kernel(
    op: OpOverload, setup_context: Callable, differentiate: Callable, by_reference: Callable
) -> Callable:
    """What runs at the autograd key, on each level of ``torch.func`` for itself."""

    def forward(ctx: Any, keyset: DispatchKeySet, *arguments: Any) -> tuple[Tensor, ...]:
        # The levels of torch.func below this one differentiate too, which a Function turns off while it runs.
        with torch.enable_grad(), keep_forward_gradients():
            outputs = tuple(below_autograd(op, keyset, arguments))
        setup_context(ctx, arguments, outputs)
        return outputs

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *differentiate(ctx, *gradients))

    name = f"{op.name().partition('::')[2]}_autograd"
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager: Any = type(name, (Function,), methods)  # Any: what type() makes has no methods to a checker
    # A Function refuses to run inside torch.func; this base takes the level that it finds itself in.
    one_level: Any = type(name, (SingleLevelFunction,), methods)

    def kernel(keyset: DispatchKeySet, *arguments: Any) -> Any:
        if has_tangents(arguments):
            return by_reference(*arguments)
        if not (torch.is_grad_enabled() and any_requires_grad(*arguments)):
            return below_autograd(op, keyset, arguments)
        if not are_transforms_active():
            return eager.apply(keyset, *arguments)
        with enable_single_level_autograd_function():
            return one_level.apply(keyset, *arguments)

    return kernel


def _forward_by_reference(operator: "Operator", *arguments: Any) -> tuple[Tensor, Tensor]:
    arguments = operator.complete(arguments)
    primals = [
        unpack_dual(value, level=DUAL_LEVEL).primal if isinstance(value, Tensor) else value for value in arguments
    ]
    with torch.no_grad():
        _, logsumexp = operator.forward_op(*primals)
    return operator.run_reference(arguments).contiguous(), logsumexp


def _backward_by_reference(operator: "Operator", *arguments: Any) -> list[Tensor]:
    """The gradients as autograd has them of the reference, so that tangents pass through."""
    grad_output, _, _, needs_gradient, *given = arguments
    filled = list(operator.complete(given))
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = []
        for index, needed in zip(operator.differentiable, needs_gradient, strict=True):
            if needed:
                filled[index] = _variable(filled[index])
                wanted.append(filled[index])
        output = operator.run_reference(tuple(filled))
        gradients = torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph)
    return [gradient.contiguous() for gradient in gradients]


def _variable(tensor: Tensor) -> Tensor:
    """The tensor as a variable of its own, whatever other argument it is too, with its tangent."""
    if tensor.requires_grad:
        return tensor.view_as(tensor)
    primal, tangent = unpack_dual(tensor, level=DUAL_LEVEL)
    with enable_inplace_requires_grad(True):  # torch.func forbids it to those who differentiate, not to an operator
        variable = primal.detach().requires_grad_()
    return variable if tangent is None else make_dual(variable, tangent, level=DUAL_LEVEL)


def register_vmap(operator: "Operator", library: torch.library.Library) -> None:
    """Register what ``torch.func.vmap`` does with an operator and its backward operator."""

    def forward(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        mapped = any(in_dims[index] is not None for index in operator.shared if index < len(arguments))
        run = _one_by_one if mapped else _folded
        return run(operator.forward_op, operator.shared, info.batch_size, in_dims, arguments)

    def backward(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        shared = [LEADING + index for index in operator.shared]
        wanted = zip(operator.differentiable, arguments[LEADING - 1], strict=True)
        # The gradient of what all images share is a sum over the batch, of which each mapped call has its own.
        alone = any(needed and index in operator.shared for index, needed in wanted)
        alone = alone or any(in_dims[index] is not None for index in shared if index < len(arguments))
        run = _one_by_one if alone else _folded
        return run(operator.backward_op, shared, info.batch_size, in_dims, arguments)

    torch.library.register_vmap(operator.forward_op.default.name(), forward, lib=library)
    torch.library.register_vmap(operator.backward_op.default.name(), backward, lib=library)


def _folded(
    op: Callable, shared: Sequence[int], size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """One call with the mapped axis in the batch."""
    folded = list(arguments)
    for index, (value, axis) in enumerate(zip(arguments, in_dims, strict=True)):
        if isinstance(value, Tensor) and index not in shared:
            mapped = value.expand(size, *value.shape) if axis is None else value.movedim(axis, 0)
            folded[index], batch = mapped.flatten(0, 1), mapped.shape[1]
    outputs = op(*folded)
    unfolded = type(outputs)(output.unflatten(0, (size, batch)) for output in outputs)
    return unfolded, type(outputs)(0 for _ in outputs)


def _one_by_one(
    op: Callable, shared: Sequence[int], size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """A call for each place of the mapped axis."""
    calls = [
        op(
            *(
                value.select(axis, place) if isinstance(value, Tensor) and axis is not None else value
                for value, axis in zip(arguments, in_dims, strict=True)
            )
        )
        for place in range(size)
    ]
    outputs = [torch.stack(column) for column in zip(*calls, strict=True)]
    return type(calls[0])(outputs), type(calls[0])(0 for _ in outputs)
