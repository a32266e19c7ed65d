"""Example arguments of window attention; see :mod:`..examples`."""

from collections.abc import Sequence
from typing import Optional

from ..examples import Example, Examples, bias_table, map_for_compilation, tokens_of_one_projection

WINDOW_SIZE = 7
"""The window of Swin Transformer, which it shifts by half."""


def example(
    *shape: int,
    window_size: Sequence[int] = (WINDOW_SIZE, WINDOW_SIZE),
    partition: str = "block",
    shift: Sequence[int] = (WINDOW_SIZE // 2,),
    bias: bool = True,
    scale: Optional[float] = None,
) -> Example:
    """Args: shape: (batch, height, width, heads, head_dim)."""
    return Example(
        {
            **tokens_of_one_projection(shape),
            "window_size": list(window_size),
            "partition": partition,
            "shift": list(shift),
            "relative_position_bias": bias_table(shape[3], window_size) if bias else None,
            "scale": scale,
        }
    )


EXAMPLES = Examples(
    small={
        "every argument": example(2, 4, 6, 2, 3, window_size=(2, 3), shift=(1, 1), scale=0.7),
        "shifted": example(2, 8, 8, 2, 8, window_size=(4, 4), shift=(1, 2)),
        "grid": example(2, 8, 8, 2, 8, window_size=(4, 2), partition="grid", shift=(0,)),
    },
    stage=example,
    shapes={
        "gpu": [(128, 56, 56, 3, 32), (128, 28, 28, 6, 32), (128, 14, 14, 12, 32), (128, 7, 7, 24, 32)],
        "full": [(8, 56, 56, 3, 32), (8, 28, 28, 6, 32), (8, 14, 14, 12, 32), (1, 112, 112, 3, 32)],
        "small": [(2, 14, 14, 2, 16), (1, 28, 28, 2, 16)],
    },
    compile=lambda window, rank, head_dim: example(
        *map_for_compilation(window, rank, head_dim), window_size=(window, window), shift=(window // 2,)
    ),
    compiled=[(7, 2), (4, 2), (14, 2)],
)
"""The stages are those of Swin-T, and one large map."""
