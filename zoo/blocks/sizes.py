"""What a network may ask of the sizes of its maps while it is traced."""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def always(condition: bool) -> bool:
    """A comparison of sizes; of symbols, whether it holds for all of them. To evaluate it would leave a guard."""
    if torch.jit.is_scripting():
        return condition
    if torch.jit.is_tracing():
        return bool(condition)  # torch.jit.trace makes tensors of sizes
    return statically_known_true(condition)


def is_compiling() -> bool:
    """Whether torch.compile or torch.export traces, as TorchScript may ask too."""
    if torch.jit.is_scripting():
        return False
    return torch.compiler.is_compiling()


def larger(size: int, other: int) -> int:
    """The larger of two sizes, which may be symbols."""
    if torch.jit.is_scripting():
        return max(size, other)
    if always(size >= other):  # torch.compile of torch 2.11 takes no sym_max of two numbers
        return size
    return other if always(size <= other) else torch.sym_max(size, other)


def smaller(size: int, other: int) -> int:
    """The smaller of two sizes, which may be symbols."""
    if torch.jit.is_scripting():
        return min(size, other)
    if always(size <= other):
        return size
    return other if always(size >= other) else torch.sym_min(size, other)
