"""``python -m vicinal.train``: the same as ``vicinal train``, and what torchrun starts with ``-m vicinal.train``."""

import sys

from ..__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
