"""Which implementation runs: the backends, how one is forced, and the one way operators are registered with torch.

An operator is declared once, by an :class:`Operator` with its schema, its argument check and its backends. From that
the class registers ``torch.ops.vicinal.<name>`` and ``torch.ops.vicinal.<name>_backward`` with fake implementations,
autograd, vmap, autocast and flop counts, so that eager mode, TorchScript, FX, ``torch.compile``, ``torch.export`` and
``torch.func`` all meet the same operator. Three backends can stand behind it:

``reference``
    Plain differentiable PyTorch in float32. It bypasses the operator, and is what ONNX export sees.
``tiled``
    PyTorch arranged for speed, with a closed-form backward. Runs on every device.
``fused``
    Triton kernels.
"""

import importlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils.flop_counter import register_flop_formula

from ..torch_internals import FakeTensor, arguments_of_schema, excluding
from .checks import canonicalize
from .examples import Examples
from .transforms import is_transformed, register_autograd, register_vmap

BACKENDS = ("auto", "reference", "tiled", "fused")
ENVIRONMENT_VARIABLE = "VICINAL_KERNELS"

_LIBRARY = torch.library.Library("vicinal", "FRAGMENT")
OPERATORS: dict[str, "Operator"] = {}
"""All operators by name, those on a packed projection among them."""
_forced: str | None = None


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend; use one of {', '.join(BACKENDS)}")
    return name


@dataclass(frozen=True, eq=False)
class _Block:
    """An open block of :func:`backend`; two of one thread and name are different blocks."""

    thread: int
    name: str


_blocks: list[_Block] = []
_blocks_lock = threading.Lock()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every operator of this package, in the whole process, until the block ends.

    Blocks nest. The environment variable ``VICINAL_KERNELS`` does the same for a process; a block wins over it. A
    backward pass uses the backend that is selected while it runs, except that ``reference`` is decided by the forward.
    The choice holds for all threads, those of autograd among them, so blocks of several threads may overlap only where
    they force the same backend.

    Args:
        name: "reference", "tiled", "fused", or "auto" (the fastest that can run, the default).

    Raises:
        ValueError: the name is none of these. Forcing "fused" for a call that it cannot run raises at that call.
        RuntimeError: another thread is in a block that forces another backend.
    """
    global _forced  # noqa: PLW0603 (torch.compile guards on a module global, not on a context variable)
    _check_backend(name, "backend")
    if torch.compiler.is_compiling():  # a graph knows no threads; what is set here is put back while it is traced
        outer, _forced = _forced, name
        try:
            yield
        finally:
            _forced = outer
        return
    block = _open_block(name)
    try:
        yield
    finally:
        _close_block(block)


def _open_block(name: str) -> _Block:
    global _forced  # noqa: PLW0603 (as above)
    block = _Block(threading.get_ident(), name)
    with _blocks_lock:
        for other in _blocks:
            if other.thread != block.thread and other.name != name:
                raise RuntimeError(
                    f"backend={name!r} while another thread is in a block with backend={other.name!r}: the choice "
                    "holds for all threads; put one block around both, or let one end before the other begins"
                )
        _blocks.append(block)
        _forced = name
    return block


def _close_block(block: _Block) -> None:
    """The innermost of the blocks that are still open decides, whichever ends first."""
    global _forced  # noqa: PLW0603 (as above)
    with _blocks_lock:
        _blocks.remove(block)
        _forced = _blocks[-1].name if _blocks else None


def selected_backend() -> str:
    """The backend asked for by :func:`backend`, else by ``VICINAL_KERNELS``, else "auto"."""
    if _forced is not None:
        return _forced
    return _check_backend(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def needs_formula(*tensors: Tensor | None) -> bool:
    """Whether a function in C++ with a first derivative alone must give way to plain differentiable PyTorch.

    It must under "reference", inside a transform of ``torch.func`` and where forward-mode AD follows a tensor.
    """
    return selected_backend() == "reference" or is_transformed(*tensors)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, lse and sums: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> str:
    """Say which backend would run a call, and why each faster one would not.

    Args:
        op: a public function of this package, or its name.
        args, kwargs: the arguments of the call. Nothing is computed.

    Returns:
        One line naming the backend, then one line for each faster backend.

    Raises:
        ValueError: the operator is unknown, or the arguments are refused by the operator itself.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATORS:
        raise ValueError(f"op={name!r} is not an operator of this package; use one of {', '.join(sorted(OPERATORS))}")
    return OPERATORS[name].explain(*args, **kwargs)


class Operator:
    """An attention operator with its backends, registered with torch as ``vicinal::<name>``.

    The forward operator returns ``(output, logsumexp)``: output has the shape of query, with the channels of value, and
    logsumexp, without gradient, is ``(batch, *spatial, heads)`` in float32 (float64 for float64 inputs).

    Args:
        name: of the operator and of the public function.
        schema: arguments of the forward operator in the order of the public function, in torch's schema language. The
            first three must be ``Tensor query, Tensor key, Tensor value``, or one packed tensor (:mod:`.packed`).
            Options are ``int[]``, ``bool[]``, ``str``, ``bool``, ``int`` or ``float?``; a list may hold one element for
            all axes.
        differentiable: names of the tensor arguments that have gradients.
        check: called as ``check(*arguments)`` before any work; raises ValueError.
        reference: called as ``reference(*arguments)``; returns the output, differentiable by autograd.
        tiled: module with ``forward(*arguments) -> (output, logsumexp)`` and ``backward(grad_output, output, logsumexp,
            needs_gradient, *arguments) -> list``: gradients of those differentiable arguments, in order, whose flag in
            needs_gradient is set. Dispatch brings each to the dtype of its argument. Both run below autograd and
            autocast, on non-empty tensors; on the CPU float16 arrives at tiled as float32.
        examples: calls of the operator, for doctor, benchmarks and tests.
        keys_per_query: ``keys_per_query(*arguments)`` for the flop counts, with shapes in the place of tensors.
        shared: names of the tensor arguments that have no batch axis.
        autocast: names of the tensor arguments that autocast converts.
        fused: name of the module with the Triton kernels, imported when first needed. It has the functions of tiled and
            ``refuse(*arguments) -> str | None``: why it cannot run this call.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        differentiable: Sequence[str],
        check: Callable[..., None],
        reference: Callable[..., Tensor],
        tiled: ModuleType,
        examples: Examples,
        keys_per_query: Callable[..., int],
        shared: Sequence[str] = (),
        autocast: Sequence[str] = ("query", "key", "value"),
        fused: str | None = None,
    ) -> None:
        self.name, self.schema = name, schema
        self.check = check
        self.reference = reference
        self.tiled = tiled
        self.fused = fused
        self.examples = examples
        self.keys_per_query = keys_per_query
        _LIBRARY.define(f"{name}({schema}) -> (Tensor, Tensor)")
        _LIBRARY.define(
            f"{name}_backward(Tensor grad_output, Tensor output, Tensor logsumexp, bool[] needs_gradient, {schema})"
            " -> Tensor[]"
        )
        self.forward_op = getattr(torch.ops.vicinal, name)
        self.backward_op = getattr(torch.ops.vicinal, f"{name}_backward")
        self._read_schema(differentiable, shared, autocast)
        self._register_implementations()
        register_autograd(self, _LIBRARY)
        register_vmap(self, _LIBRARY)
        self._register_autocast()
        self._register_flops()
        OPERATORS[name] = self

    def __call__(self, *arguments: Any) -> Tensor:
        """Run on the arguments of the public function, all of them, in the order of the schema."""
        arguments = self.canonicalize(arguments)
        unrecorded = torch.jit.is_tracing() and "List[bool]" in self.kinds  # torch.jit.trace knows no list of bools
        bypass = selected_backend() == "reference" or torch.onnx.is_in_onnx_export() or unrecorded
        # The reference reads sizes and devices, which a proxy of torch.fx has not.
        if bypass and not isinstance(arguments[0], Proxy):
            return self.run_reference(arguments)
        return self.forward_op(*arguments)[0]

    def canonicalize(self, arguments: Sequence[Any]) -> tuple:
        """Bring options to the types of the schema; looks at no tensor, so it is safe while tracing."""
        declared = zip(self.names, self.kinds, arguments, strict=True)
        return tuple(canonicalize(name, kind, value) for name, kind, value in declared)

    def unpacked(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The arguments as the check and the implementations take them; shapes may stand in the place of tensors."""
        return arguments

    def explain(self, *args: Any, **kwargs: Any) -> str:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = self.unpacked(self.canonicalize(tuple(bound.arguments.values())))
        self.check(*arguments)
        asked = selected_backend()
        refusal = self._refuse_fused(arguments)
        unused = f"fused: {refusal or 'another backend is forced'}"
        if asked == "fused" and refusal:
            return f"{self.name}: no backend, because fused is forced\n{unused}"
        if asked == "reference":
            return f"{self.name}: reference, because it is forced\ntiled: another backend is forced\n{unused}"
        if asked == "tiled":
            return f"{self.name}: tiled, because it is forced\n{unused}"
        return f"{self.name}: tiled\n{unused}" if refusal else f"{self.name}: fused"

    def _read_schema(self, differentiable: Sequence[str], shared: Sequence[str], autocast: Sequence[str]) -> None:
        declared = arguments_of_schema(self.forward_op.default)
        self.names = tuple(argument.name for argument in declared)
        self.kinds = tuple(str(argument.type) for argument in declared)
        self.defaults = tuple(argument.default_value for argument in declared)
        self.differentiable = tuple(self.names.index(name) for name in differentiable)
        self.shared = tuple(self.names.index(name) for name in shared)
        self.autocast = tuple(self.names.index(name) for name in autocast)
        self.signature = inspect.Signature(
            [
                inspect.Parameter(
                    argument.name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
                )
                for argument in declared
            ]
        )

    def complete(self, arguments: Sequence[Any]) -> tuple:
        """Put back the trailing defaults, which torch's dispatcher leaves out."""
        return (*arguments, *self.defaults[len(arguments) :])

    def run_reference(self, arguments: tuple) -> Tensor:
        """The output by the reference, of arguments as the operator takes them."""
        device_type = arguments[0].device.type
        if not torch.is_autocast_enabled(device_type):
            unpacked = self.unpacked(arguments)
            self.check(*unpacked)
            return self.reference(*unpacked)
        unpacked = self.unpacked(self._cast(arguments, device_type))
        self.check(*unpacked)
        with torch.autocast(device_type, enabled=False):
            return self.reference(*unpacked)

    @cached_property
    def _kernels(self) -> ModuleType | str:
        """The module of the Triton kernels, or why there is none: a failed import would be repeated at every call."""
        if self.fused is None:
            return "this operator has none"
        try:
            return importlib.import_module(self.fused)
        except ModuleNotFoundError as error:
            return f"the package {error.name} is not installed"

    def _refuse_fused(self, unpacked: Sequence[Any]) -> str | None:
        return self._kernels if isinstance(self._kernels, str) else self._kernels.refuse(*unpacked)

    def _implementation(self, unpacked: Sequence[Any]) -> ModuleType:
        asked = selected_backend()
        # A graph that holds the operator runs it even under "reference": tiled is the plain PyTorch of the operator.
        if asked in ("tiled", "reference"):
            return self.tiled
        kernels, refusal = self._kernels, self._refuse_fused(unpacked)
        if refusal is None and isinstance(kernels, ModuleType):
            return kernels
        if asked == "fused":
            raise ValueError(f"backend='fused' cannot run {self.name}: {refusal}; use backend='auto' or 'tiled'")
        return self.tiled

    def _widen(self, implementation: ModuleType, values: Sequence[Any]) -> tuple:
        """float16 to float32 for tiled on the CPU, whose float16 matrix products are two orders of magnitude slower."""

        def widen(value: Any) -> Any:
            slow = isinstance(value, Tensor) and value.dtype == torch.float16 and value.device.type == "cpu"
            return value.float() if slow else value

        return tuple(map(widen, values)) if implementation is self.tiled else tuple(values)

    def _register_implementations(self) -> None:
        # CompositeExplicitAutograd: one implementation, below autograd, for every device that has no other.
        _LIBRARY.impl(self.name, self._forward, "CompositeExplicitAutograd")
        _LIBRARY.impl(f"{self.name}_backward", self._backward, "CompositeExplicitAutograd")
        for name, fake in ((self.name, self._fake_forward), (f"{self.name}_backward", self._fake_backward)):
            torch.library.register_fake(f"vicinal::{name}", fake, lib=_LIBRARY)

    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        arguments = self.complete(arguments)
        unpacked = self.unpacked(arguments)
        self.check(*unpacked)
        if arguments[0].numel() == 0:
            return self._allocate(arguments)
        implementation = self._implementation(unpacked)
        output, logsumexp = implementation.forward(*self._widen(implementation, unpacked))
        return output.to(arguments[0].dtype).contiguous(), logsumexp.contiguous()

    def _backward(self, *arguments: Any) -> list[Tensor]:
        grad_output, output, logsumexp, needs_gradient, *given = arguments
        arguments = self.complete(given)
        wanted = self._wanted(needs_gradient, arguments)
        if grad_output.numel() == 0:
            return [tensor.new_zeros(tensor.shape) for tensor in wanted]
        unpacked = self.unpacked(arguments)
        implementation = self._implementation(unpacked)
        results = self._widen(implementation, (grad_output, output, logsumexp))
        widened = self._widen(implementation, unpacked)
        gradients = self._run_backward(implementation, results, needs_gradient, widened)
        return [gradient.to(tensor.dtype).contiguous() for gradient, tensor in zip(gradients, wanted, strict=True)]

    def _run_backward(
        self, implementation: ModuleType, results: Sequence[Tensor], needs_gradient: Sequence[bool], unpacked: tuple
    ) -> list[Tensor]:
        return implementation.backward(*results, needs_gradient, *unpacked)

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        # Tensors on the meta device come here too, eagerly; only traced ones have sizes that a check must not read.
        if not any(isinstance(value, FakeTensor) for value in arguments):
            self.check(*self.unpacked(self.complete(arguments)))
        return self._allocate(arguments)

    def _allocate(self, arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        query, _, value, *_ = self.unpacked(arguments)
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        return output, query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))

    def _fake_backward(self, *arguments: Any) -> list[Tensor]:
        _, _, _, needs_gradient, *given = arguments
        return [tensor.new_empty(tensor.shape) for tensor in self._wanted(needs_gradient, self.complete(given))]

    def _wanted(self, needs_gradient: Sequence[bool], arguments: tuple) -> list[Tensor]:
        return [arguments[index] for index, needed in zip(self.differentiable, needs_gradient, strict=True) if needed]

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """What :meth:`differentiate` needs of a call, for autograd to keep."""
        ctx.given = len(inputs)
        inputs = self.complete(inputs)
        ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.tensors = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*output, *(inputs[index] for index in ctx.tensors))
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, grad_output: Tensor | None, _: None) -> tuple:
        """Gradients of the arguments that were given, None where there is none."""
        if grad_output is None:
            return (None,) * ctx.given
        output, logsumexp, *tensors = ctx.saved_tensors
        arguments = list(ctx.options)
        for index, tensor in zip(ctx.tensors, tensors, strict=True):
            arguments[index] = tensor
        needed = ctx.needs_input_grad[1:]  # before the arguments stands the set of dispatch keys
        needs_gradient = [index in ctx.tensors and needed[index] for index in self.differentiable]
        gradients = iter(self.backward_op(grad_output, output, logsumexp, needs_gradient, *arguments))
        result = [None] * len(arguments)
        for index, needed in zip(self.differentiable, needs_gradient, strict=True):
            result[index] = next(gradients) if needed else None
        return tuple(result[: ctx.given])

    def refuse_double_backward(self, ctx: Any, *_: Any) -> None:
        """Say how to have a second derivative."""
        raise RuntimeError(
            f"{self.name} has no second derivative; for one, run the forward under vicinal.kernels.backend('reference')"
        )

    def _register_autocast(self) -> None:
        for device_type in ("cpu", "cuda"):
            key = f"Autocast{device_type.upper()}"

            def forward(*arguments: Any, device_type: str = device_type, key: str = key) -> tuple:
                with excluding(key):
                    return self.forward_op(*self._cast(arguments, device_type))

            # Without a rule of its own the backward would run its matrix products in the autocast dtype.
            def backward(*arguments: Any, key: str = key) -> list[Tensor]:
                with excluding(key):
                    return self.backward_op(*arguments)

            _LIBRARY.impl(self.name, forward, key)
            _LIBRARY.impl(f"{self.name}_backward", backward, key)

    def _cast(self, arguments: Sequence[Any], device_type: str) -> tuple:
        dtype = torch.get_autocast_dtype(device_type)
        result = list(arguments)
        for index in self.autocast:
            value = result[index] if index < len(result) else None
            if value is not None and value.is_floating_point() and value.dtype != torch.float64:
                result[index] = value.to(dtype)
        return tuple(result)

    def _register_flops(self) -> None:
        """Forward: scores and output. Backward: the scores again, and four products for the gradients."""

        def count(arguments: Sequence[Any], of_keys: int, of_values: int) -> int:
            """Flops of some products with the channels of the keys and some with those of the values."""
            arguments = self.unpacked(self.complete(arguments))
            *queries, head_dim = arguments[0]
            channels = of_keys * head_dim + of_values * arguments[2][-1]
            return 2 * torch.Size(queries).numel() * self.keys_per_query(*arguments) * channels

        def forward(*arguments: Any, out_val: Any = None, **_: Any) -> int:
            return count(arguments, 1, 1)

        def backward(*arguments: Any, **_: Any) -> int:
            _grad_output, _output, _logsumexp, _needs_gradient, *given = arguments
            return count(given, 3, 2)

        register_flop_formula(self.forward_op)(forward)
        register_flop_formula(self.backward_op)(backward)
