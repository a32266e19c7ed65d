"""``vicinal bench``: hands over to the benchmark of operators, of models or of training."""

import importlib
from collections.abc import Sequence

from ...errors import UserError, nearest

USAGE = """usage: vicinal bench ops [options]
       vicinal bench models [options]
       vicinal bench train [options]      (--help lists them)"""
PARTS = ("ops", "models", "train")
"""The benchmarks, each a module beside this one, imported when it is called."""


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal bench``; returns its exit code."""
    command, *rest = argv or ["--help"]
    if command in PARTS:
        return importlib.import_module(f".{command}", __package__).main(rest)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    hint = nearest(command, PARTS, count=1) or f"vicinal bench {', '.join(PARTS[:-1])} or {PARTS[-1]}"
    raise UserError(f"unknown benchmark {command!r}; {hint}")
