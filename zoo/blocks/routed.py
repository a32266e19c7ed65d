"""Routed attention as a module: regions of the map find each other by their averages, and attend to each other."""

from typing import List, Sequence, Union

import torch
from timm.layers import register_notrace_module
from torch import Tensor

from ...kernels.routed import aggregate, as_list, in_form_of, routed_attention_weights
from ...kernels.scripted import routed_attention_packed
from .attention import PackedAttention
from .base import aggregate_all, positive_pair
from .padding import crop, pad_to_multiple
from .tracing import larger, smaller


@register_notrace_module  # its forward is inherited, so torch.fx would not find the functions that it must not enter
class RoutedAttention(PackedAttention):
    """Attention of each region of the map to the tokens of the ``topk`` regions whose average keys suit it best.

    The map is zero-padded before the projection to a multiple of the grid, as the official code for dense tasks does.

    The values, convolved, are added to the output (locally enhanced position encoding).

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        grid: regions down and across, or one number for both.
        topk: regions that each region attends to.
        **kwargs: see :class:`PackedAttention`.

    Shape:
        (B, H, W, dim) to the same, at any height and width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``; ``grid`` is not positive, or has fewer than ``topk``
            regions.

    Source:
        arXiv:2303.08810, section 3.2. The scale is dim**-0.5, not that of a head, as in the released code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Union[int, Sequence[int]] = 7,
        topk: int = 4,
        **kwargs,
    ) -> None:
        super().__init__(dim, num_heads, **{"local_encoding": "values", **kwargs})
        self.grid = positive_pair("grid", grid)
        if not 1 <= topk <= self.grid[0] * self.grid[1]:
            raise ValueError(f"topk={topk} must be from 1 to the {self.grid[0] * self.grid[1]} regions of {grid=}")
        self.topk = topk
        self.scale = dim**-0.5

    def pad(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, self.grid)

    def divide(self, x: Tensor) -> Tensor:
        """A map (B, H, W, ...) divided into its regions, (B, rows, y, columns, x, ...), a view."""
        return unflatten_map(x, self.grid)

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse, to a map of the size of ``like``."""
        return flatten_map(x, [like.shape[1], like.shape[2]])

    def average(self, x: Tensor) -> Tensor:
        """Averages (B, rows, columns, ...) of the regions of a map (B, H, W, ...)."""
        return self.divide(x).mean(dim=4).mean(dim=2)  # one axis at a time: both at once take a CPU ten times as long

    def route(self, packed: Tensor) -> Tensor:
        """Routes (B, regions, topk), without gradient: the regions whose average keys suit an average query best."""
        averages = self.average(packed.detach()[:, :, :, :2])  # (B, rows, columns, 2, heads, head_dim)
        query, key = averages.flatten(4).flatten(1, 2).unbind(2)
        return choose_routes(query, key, self.topk)

    def attend_packed(self, packed: Tensor) -> Tensor:
        x = routed_attention_packed(self.divide(packed), self.route(packed), self.scale)
        return self.join(x, packed)

    @torch.jit.unused
    def attend_by_weights(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights, routes = self.weights_of_routes(query, key)
        values = self.divide(value)
        attended = aggregate(self.attn_drop(weights), as_list(values), routes)
        return self.join(in_form_of(values, attended), value)

    @torch.jit.unused
    def weights_of_routes(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax weights (B, regions, tokens, heads, topk * tokens), and the routes."""
        routes = self.route(torch.stack([query, key], dim=3))
        queries, keys = as_list(self.divide(query)), as_list(self.divide(key))
        return routed_attention_weights(queries, keys, routes, self.scale), routes

    @torch.jit.unused
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax weights (B, H, W, heads, H * W), zero where a region is not routed to.

        Padding that takes part in the softmax has the rest of a sum below one.
        """
        height, width = query.shape[1:3]
        weights, routes = self.weights_of_routes(query, key)
        places = torch.arange(1, height * width + 1, device=query.device).view(1, height, width, 1, 1)
        places = as_list(self.divide(places))[0, routes, :, 0, 0].flatten(2)  # (B, regions, keys); padding is at 0
        everywhere = weights.new_zeros(*weights.shape[:-1], height * width + 1)
        everywhere.scatter_(-1, places[:, :, None, None].expand(weights.shape), weights)
        return self.join(in_form_of(self.divide(query), everywhere[..., 1:]), query)

    @torch.jit.unused
    def aggregate(self, weights: Tensor, value: Tensor) -> Tensor:
        return aggregate_all(weights, value)


@register_notrace_module
class ProjectedRoutedAttention(RoutedAttention):
    """The refactored form: regions of ``size // grid`` tokens, and queries, keys and values that are padded with zeros.

    A map that the grid does not divide has more regions than the grid; padding does not count in their averages.
    Arguments and shapes are :class:`RoutedAttention`'s.

    Source:
        The implementation by channels-first maps in the official repository, rayleizhu/BiFormer.
    """

    def pad(self, x: Tensor) -> Tensor:
        return x

    def region(self, x: Tensor) -> List[int]:
        """Height and width of the regions of a map."""
        return [larger(1, x.shape[1] // self.grid[0]), larger(1, x.shape[2] // self.grid[1])]

    def divide(self, x: Tensor) -> Tensor:
        region = self.region(x)
        x = pad_to_multiple(x.flatten(3), region).unflatten(3, x.shape[3:])
        return unflatten_map(x, [x.shape[1] // region[0], x.shape[2] // region[1]])

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        return crop(flatten_map(x, [x.shape[1] * x.shape[2], x.shape[3] * x.shape[4]]), like.shape[1], like.shape[2])

    def average(self, x: Tensor) -> Tensor:
        counts = self.divide(torch.ones_like(x[:1, :, :, :1, :1, :1])).sum(dim=4).sum(dim=2)
        return self.divide(x).sum(dim=4).sum(dim=2) / counts


def unflatten_map(x: Tensor, grid: List[int]) -> Tensor:
    """A map (B, H, W, ...) with its axes split in regions and places, a view (B, rows, y, columns, x, ...)."""
    return x.unflatten(2, [grid[1], x.shape[2] // grid[1]]).unflatten(1, [grid[0], x.shape[1] // grid[0]])


def flatten_map(x: Tensor, size: List[int]) -> Tensor:
    """The inverse of :func:`unflatten_map`; size: height and width of the map."""
    # all at once: torch.export cannot reason about the size of one axis made of a number and a symbol
    return x.flatten(1, 4).unflatten(1, size)


def choose_routes(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """For each average query (B, regions, dim) the ``topk`` best average keys, all if there are fewer."""
    affinity = query @ key.transpose(1, 2)
    return affinity.topk(smaller(topk, affinity.shape[2]), dim=-1)[1]
