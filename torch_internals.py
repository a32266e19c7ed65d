"""What we take from torch's private parts, in one place, so that an upgrade that moves it fails here by name.

torch has no public door to these: how its dispatcher is entered at a key, what ``torch.func`` and forward-mode AD have
in hand, the schema of an operator, and a few kernels. tests/test_internals.py holds each.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Optional

import torch
from torch import Tensor
from torch._C import DispatchKeySet
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

__all__ = [
    "BatchNorm",
    "DispatchKeySet",
    "FakeTensor",
    "OpOverload",
    "SingleLevelFunction",
    "any_requires_grad",
    "are_transforms_active",
    "arguments_of_schema",
    "attend_on_cpu",
    "below_autograd",
    "copy_all",
    "enable_inplace_requires_grad",
    "enable_single_level_autograd_function",
    "excluding",
    "is_forward_mode_open",
    "is_inside_transform",
    "keep_forward_gradients",
    "shared_storage",
    "softmax_backward",
    "unwrapped",
]

# Taken as they are: BatchNorm is the base of all batch norms. FakeTensor is the class of tensors while a graph is
# traced. SingleLevelFunction is an autograd Function that runs on the level of torch.func that it finds itself in,
# inside a block of enable_single_level_autograd_function. enable_inplace_requires_grad lets an operator make a
# variable inside a transform, which forbids it to users. torch.compile knows are_transforms_active, whether a level of
# torch.func is open, by its identity, so that no function of ours stands around it.


def arguments_of_schema(op: OpOverload) -> Sequence[torch.Argument]:
    """Name, type and default value of each argument of a registered operator."""
    return op._schema.arguments


def excluding(key: str) -> AbstractContextManager:
    """Calls inside the block pass a dispatch key by, such as "AutocastCPU"."""
    return torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(getattr(torch._C.DispatchKey, key)))


def below_autograd(op: OpOverload, keyset: DispatchKeySet, arguments: Sequence[Any]) -> Any:
    """Call an operator at the keys that come after autograd, of those that the caller was called with."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def any_requires_grad(*arguments: Any) -> bool:
    """Whether a tensor among the arguments, or in lists of them, requires a gradient."""
    return torch._C._any_requires_grad(*arguments)


def is_inside_transform() -> bool:
    """Whether a level of ``torch.func`` is open, even while code below it is traced."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_forward_mode_open(level: int) -> bool:
    """Whether forward-mode AD is at this level or a deeper one, as far as Python has counted."""
    return forward_ad._current_level >= level


def keep_forward_gradients() -> AbstractContextManager:
    """Forward-mode AD goes on inside the block, which an autograd Function turns off while it runs."""
    return forward_ad._set_fwd_grad_enabled(True)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor below all wrappers of ``torch.func``, whose values can be read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def softmax_backward(grad_weights: Tensor, weights: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """weights * (grad_weights - sum(weights * grad_weights)) over the last axis, in one pass."""
    if out is None:
        return torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    return torch.ops.aten._softmax_backward_data.out(grad_weights, weights, -1, weights.dtype, grad_input=out)


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, bias: Optional[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """scaled_dot_product_attention of (batch, heads, tokens, head_dim), and the lse, (batch, heads, tokens)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)


def shared_storage(size: int) -> torch.UntypedStorage:
    """Memory of `size` bytes that a worker process shares with its parent without a copy."""
    return torch.UntypedStorage._new_shared(size, device="cpu")


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in few kernels."""
    torch._foreach_copy_(targets, sources)
