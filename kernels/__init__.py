"""Attention operators on plain tensors in the layout (batch, *spatial, heads, head_dim)."""

from .aggregated import aggregated_attention
from .dispatch import backend, explain
from .gated import gated_positional_attention
from .halo import halo_attention
from .neighborhood import neighborhood_attention, neighborhood_attention_packed
from .routed import routed_attention, routed_attention_packed
from .window import window_attention, window_attention_packed

__all__ = [
    "aggregated_attention",
    "backend",
    "explain",
    "gated_positional_attention",
    "halo_attention",
    "neighborhood_attention",
    "neighborhood_attention_packed",
    "routed_attention",
    "routed_attention_packed",
    "window_attention",
    "window_attention_packed",
]
