"""Example arguments of halo attention; see :mod:`..examples`."""

from typing import Optional

from ..examples import Example, Examples, Operand, map_for_compilation, tokens_of_one_projection

BLOCK_SIZE, HALO_SIZE = 8, 3
"""The block and halo of most HaloNets."""


def example(
    *shape: int,
    block_size: int = BLOCK_SIZE,
    halo_size: int = HALO_SIZE,
    logits: bool = True,
    mask_padding: bool = False,
    scale: Optional[float] = None,
) -> Example:
    """Args: shape: (batch, height, width, heads, head_dim)."""
    relative = Operand((*shape[:-1], block_size + 2 * halo_size)) if logits else None
    return Example(
        {
            **tokens_of_one_projection(shape),
            "block_size": block_size,
            "halo_size": halo_size,
            "relative_height_logits": relative,
            "relative_width_logits": relative,
            "mask_padding": mask_padding,
            "scale": scale,
        }
    )


EXAMPLES = Examples(
    small={
        "every argument": example(2, 4, 2, 2, 3, block_size=2, halo_size=1, mask_padding=True, scale=0.7),
        "blocks": example(2, 8, 8, 2, 8, block_size=4, halo_size=1),
    },
    stage=example,
    shapes={
        "gpu": [(128, 64, 64, 8, 16), (128, 32, 32, 8, 16), (128, 16, 16, 8, 16)],
        "full": [(8, 64, 64, 4, 16), (8, 32, 32, 8, 16), (8, 16, 16, 8, 16)],
        "small": [(1, 16, 16, 2, 16)],
    },
    compile=lambda window, rank, head_dim: example(
        *map_for_compilation(window, rank, head_dim), block_size=window, halo_size=(window - 1) // 2
    ),
    compiled=[(8, 2)],
)
"""The stages are those of HaloNet."""
