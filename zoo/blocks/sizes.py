"""What a network may ask of the sizes of its maps while it is traced."""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def always(condition: bool) -> bool:
    """A comparison of sizes; of symbols, whether it holds for all of them. To evaluate it would leave a guard."""
    if torch.jit.is_scripting():
        return condition
    return statically_known_true(condition)
