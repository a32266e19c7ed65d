"""Vicinal: local-attention vision backbones for timm, and the attention operators that they share.

``import vicinal.zoo`` registers the models with timm; ``vicinal.kernels`` holds the operators on plain tensors.
This module imports neither, so that reading the version costs nothing.
"""

__version__ = "0.1.0"
