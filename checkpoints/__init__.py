"""Weights: files on disk, key maps from every released layout to ours, and the table of released weights.

Files that this room writes are safetensors, written under a temporary name and renamed; files that it reads are never
unpickled beyond tensors (``weights_only=True``).
"""

from .convert import convert, rename_keys
from .files import fetch, load, save, save_model, write_atomically
from .keys import Layout
from .released import RELEASED, ReleasedWeights

__all__ = [
    "RELEASED",
    "Layout",
    "ReleasedWeights",
    "convert",
    "fetch",
    "load",
    "rename_keys",
    "save",
    "save_model",
    "write_atomically",
]
