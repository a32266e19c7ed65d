"""Attention operators on plain tensors in the layout (batch, *spatial, heads, head_dim)."""

from .dispatch import backend, explain

__all__ = ["backend", "explain"]
