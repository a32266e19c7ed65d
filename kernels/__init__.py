"""Attention operators on plain tensors in the layout (batch, *spatial, heads, head_dim)."""

from .dispatch import backend, explain
from .window import window_attention

__all__ = ["backend", "explain", "window_attention"]
