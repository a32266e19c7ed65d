"""Layers that others can build with: attention over :mod:`vicinal.kernels`, and what stands around it.

Layers on channels-last maps (B, H, W, channels) unless they say otherwise; docs/blocks.md shows them at work. Each
takes ``device`` and ``dtype``, and runs in float32, float64, bfloat16 and float16 at any batch, height and width.
"""

from .activation import GELU, GELUTanh
from .aggregated import AggregatedAttention, CosineAttention
from .attention import GlobalAttention, NeighborhoodAttention, PackedAttention, PlainAttention, WindowAttention
from .base import AttentionBase, AttentionModule
from .bottleneck import BottleneckAttention, LambdaAttention
from .channel import ChannelAttention
from .embed import ChannelsLastBatchNorm, ConvEmbed, PatchMerging
from .gated import GatedPositionalAttention
from .halo import HaloAttention
from .hilo import HiLoAttention
from .mlp import ConvGluMlp, DepthwiseMlp
from .position import ContinuousPositionBias, ConvPositionEncoding
from .routed import ProjectedRoutedAttention, RoutedAttention
from .transformer import TransformerBlock

__all__ = [
    "GELU",
    "AggregatedAttention",
    "AttentionBase",
    "AttentionModule",
    "BottleneckAttention",
    "ChannelAttention",
    "ChannelsLastBatchNorm",
    "ContinuousPositionBias",
    "ConvEmbed",
    "ConvGluMlp",
    "ConvPositionEncoding",
    "CosineAttention",
    "DepthwiseMlp",
    "GELUTanh",
    "GatedPositionalAttention",
    "GlobalAttention",
    "HaloAttention",
    "HiLoAttention",
    "LambdaAttention",
    "NeighborhoodAttention",
    "PackedAttention",
    "PatchMerging",
    "PlainAttention",
    "ProjectedRoutedAttention",
    "RoutedAttention",
    "TransformerBlock",
    "WindowAttention",
]
