"""What a network may ask while it is traced, compiled, exported or scripted, of its sizes and of its surroundings.

TorchScript compiles what stands in these functions, so that its exceptions stand here and not in the layers.
"""

from typing import Optional, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels.dispatch import needs_formula


def always(condition: bool) -> bool:
    """A comparison of sizes; of symbols, whether it holds for all of them. To evaluate it would leave a guard."""
    if torch.jit.is_scripting():
        return condition
    if torch.jit.is_tracing():
        return bool(condition)  # torch.jit.trace makes tensors of sizes
    return statically_known_true(condition)


def larger(size: int, other: int) -> int:
    """The larger of two sizes, which may be symbols."""
    if torch.jit.is_scripting():
        return max(size, other)
    if always(size >= other):  # torch.compile of torch 2.11 takes no sym_max of two numbers
        return size
    return other if always(size <= other) else cast(int, torch.sym_max(size, other))


def smaller(size: int, other: int) -> int:
    """The smaller of two sizes, which may be symbols."""
    if torch.jit.is_scripting():
        return min(size, other)
    if always(size <= other):
        return size
    return other if always(size >= other) else cast(int, torch.sym_min(size, other))


def is_eager() -> bool:
    """Whether Python runs, or torch.jit.trace and torch.fx through it: neither TorchScript nor torch.compile."""
    if torch.jit.is_scripting():
        return False
    return not torch.compiler.is_compiling()


def is_compiling() -> bool:
    """Whether torch.compile or torch.export traces."""
    if torch.jit.is_scripting():
        return False
    return torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Whether torch.export traces."""
    if torch.jit.is_scripting():
        return False
    return torch.compiler.is_exporting()


def becomes_program() -> bool:
    """Whether a program is made of a module that keeps no hooks, so that nobody can ask for its attention weights."""
    if torch.jit.is_scripting():
        return True
    return torch.compiler.is_exporting()


def is_onnx_export() -> bool:
    """Whether an exporter to ONNX runs, of either kind."""
    if torch.jit.is_scripting():
        return False
    return torch.onnx.is_in_onnx_export()


def takes_formula(first: Tensor, second: Tensor, third: Tensor, fourth: Optional[Tensor]) -> bool:
    """:func:`vicinal.kernels.dispatch.needs_formula` of the tensors; a scripted program has the first derivative."""
    if torch.jit.is_scripting():
        return False
    return needs_formula(first, second, third, fourth)
