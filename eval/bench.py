"""``vicinal bench``: hands over to the benchmark of operators, of models or of training."""

import sys
from collections.abc import Sequence

from ..train.errors import USAGE_EXIT_CODE, nearest

USAGE = """usage: vicinal bench ops [options]
       vicinal bench models [options]
       vicinal bench train [options]      (--help lists them)"""


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal bench``; returns its exit code."""
    command, *rest = argv or ["--help"]
    if command == "ops":
        from . import bench_ops

        return bench_ops.main(rest)
    if command == "models":
        from . import bench_models

        return bench_models.main(rest)
    if command == "train":
        from . import bench_train

        return bench_train.main(rest)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    hint = nearest(command, ("ops", "models", "train"), count=1) or "vicinal bench ops, models or train"
    print(f"error: unknown benchmark {command!r}; {hint}", file=sys.stderr)
    return USAGE_EXIT_CODE
