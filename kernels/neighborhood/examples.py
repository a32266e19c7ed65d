"""Example arguments of neighborhood attention; see :mod:`..examples`."""

from collections.abc import Sequence
from typing import Optional

from ..checks import per_axis
from ..examples import Example, Examples, bias_table, map_for_compilation, tokens_of_one_projection

KERNEL_SIZE = 7
"""The kernel of NAT."""


def example(
    *shape: int,
    kernel_size: Sequence[int] = (KERNEL_SIZE,),
    stride: Sequence[int] = (1,),
    dilation: Sequence[int] = (1,),
    is_causal: Sequence[bool] = (False,),
    bias: bool = True,
    scale: Optional[float] = None,
) -> Example:
    """Args: shape: (batch, *spatial, heads, head_dim)."""
    kernel = per_axis("kernel_size", kernel_size, len(shape) - 3)
    return Example(
        {
            **tokens_of_one_projection(shape),
            "kernel_size": list(kernel_size),
            "stride": list(stride),
            "dilation": list(dilation),
            "is_causal": list(is_causal),
            "relative_position_bias": bias_table(shape[-2], kernel) if bias else None,
            "scale": scale,
        }
    )


EXAMPLES = Examples(
    small={
        "every argument": example(
            2, 6, 5, 2, 3, kernel_size=(3, 2), dilation=(2, 1), is_causal=(False, True), scale=0.7
        ),
        "dilated": example(2, 8, 8, 2, 8, kernel_size=(3,), dilation=(2, 1)),
    },
    stage=example,
    shapes={
        "gpu": [
            (128, 56, 56, 2, 32),
            (128, 28, 28, 4, 32),
            (128, 14, 14, 8, 32),
            (128, 7, 7, 16, 32),
            (2, 200, 304, 2, 32),
        ],
        "full": [(8, 56, 56, 2, 32), (8, 28, 28, 4, 32), (8, 14, 14, 8, 32), (8, 7, 7, 16, 32), (1, 112, 112, 2, 32)],
        "small": [(2, 14, 14, 2, 16), (1, 28, 28, 2, 16)],
    },
    compile=lambda window, rank, head_dim: example(
        *map_for_compilation(window, rank, head_dim), kernel_size=(window,), dilation=(2,)
    ),
    compiled=[(7, 2), (13, 1), (3, 3)],
)
"""The stages are those of NAT-Mini, and one large map."""
