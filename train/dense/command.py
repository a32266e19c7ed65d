"""``vicinal detect train`` and ``vicinal segment train``: the libraries are imported once the options are read."""

from collections.abc import Sequence

import tyro

from ...command import parse_options
from .options import DenseTrain, require_packages


def train_command(task: str, argv: Sequence[str]) -> int:
    """``vicinal detect train`` and ``vicinal segment train``; returns the exit code."""
    prog = f"vicinal {task} train"
    options = parse_options(DenseTrain, prog, argv, config=(tyro.conf.OmitArgPrefixes,))
    require_packages()
    from .run import train

    return train(task, options)
