"""Routed attention in Triton: keys and values are read from the regions that the routes name, and gathered nowhere.

Both forms of regions are read as maps, whose places are (row, y, column, x). A list is a map of one column, and its
regions are one token high.

A program owns queries of one region, or keys of one region, for one head. It goes through the keys of all its routes as
one list, so that small regions share a block. The gradients of keys need the queries that were routed to them: the
routes are turned round once, and each program reads its own section of that list. So every gradient is a sum in a fixed
order, without atomics.

Where a route names no region, its keys are left out: no memory outside the tensors is read.
"""

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ..launch import Parameters
from ..triton_common import Call, ceil_div, next_power_of_two, refuse_tensors
from .fused_kernels import backward_key_kernel, backward_query_kernel, forward_kernel, invert_kernel
from .geometry import LIST_AXES

ROUTES_OF_PROGRAM = 1024
"""ROUTES_OF_PROGRAM is the number of routes that a program looks through at a time to find who is routed to its region:
32 for each thread of a warp.
"""


class _Regions(NamedTuple):
    """The arguments of all kernels of regions.

    Attributes:
        regions: of an image.
        TOKENS: of a region.
        COLUMNS: of regions.
        WIDTH: tokens of a row of a region.
        TOPK: routes of a region.
    """

    routes: Tensor
    regions: int
    TOKENS: int
    COLUMNS: int
    WIDTH: int
    TOPK: int


class _Askers(NamedTuple):
    """Who is routed to a region, as a list by region, and the section of each region."""

    askers: Tensor
    sections: Tensor


class _Call(Call):
    """The regions of one call."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: Optional[float]) -> None:
        self.is_list = query.ndim == LIST_AXES
        super().__init__("routed", *map(self.as_map, (query, key, value)), scale, axes=4)
        self.routes = routes.contiguous()
        rows, height, columns, width = self.size
        self.regions, self.tokens_of_region, self.topk = rows * columns, height * width, routes.shape[2]
        self.shared = _Regions(self.routes, self.regions, self.tokens_of_region, columns, width, self.topk)

    def as_map(self, tokens: Tensor) -> Tensor:
        """A tensor of the call as a map, a view: a list is one of a single column, of regions one token high."""
        return tokens[:, :, None, None] if self.is_list else tokens

    def as_given(self, tokens: Tensor) -> Tensor:
        """The inverse of :meth:`as_map`."""
        return tokens[:, :, 0, 0] if self.is_list else tokens

    def submit_regions(self, kernel, name: str, *groups: NamedTuple) -> None:
        """Programs own tokens of regions; in each step they meet tokens of the regions in a list."""
        parameters = self.parameters(name)
        owned, step = (
            min(parameters.block, max(16, next_power_of_two(tokens)))
            for tokens in (self.tokens_of_region, self.topk * self.tokens_of_region)
        )
        programs = self.batch * self.regions * ceil_div(self.tokens_of_region, owned) * self.heads
        warps = _warps(owned, self.inputs.CHANNELS, self.query.element_size())
        parameters = parameters._replace(block=owned, warps=min(parameters.warps, warps))
        self.submit(kernel, programs, parameters, self.shared, *groups, STEP=step)

    def invert(self) -> _Askers:
        askers = self.routes.new_empty((self.batch, self.regions * self.topk), dtype=torch.int32)
        sections = self.routes.new_empty((self.batch, self.regions + 1), dtype=torch.int32)
        lists = _Askers(askers, sections)
        routes = next_power_of_two(self.topk)
        block = min(max(1, ROUTES_OF_PROGRAM // routes), next_power_of_two(self.regions))
        parameters = Parameters(block=block, warps=max(1, block * routes // 1024), stages=1)
        self.submit(invert_kernel, self.batch * (self.regions + 1), parameters, self.shared, lists, ROUTES=routes)
        return lists


def _warps(tokens: int, channels: int, element_size: int) -> int:
    """One for each 16 tokens, as a tensor core takes them, and more where a thread would sum too many channels.

    A warp has 1024 bytes: 16 tokens of 32 channels of two bytes.
    """
    return max(1, tokens * max(channels, 32) * element_size // 1024)


def refuse(query: Tensor, key: Tensor, value: Tensor, *_) -> Optional[str]:
    """Why these kernels cannot run the call, None if they can."""
    return refuse_tensors("routed", query, value)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    output, logsumexp = call.start_forward()
    call.submit_regions(forward_kernel, "forward")
    return call.as_given(output), call.as_given(logsumexp)


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    needs_gradient: Sequence[bool],
    *arguments,
    into: Optional[Sequence[Tensor]] = None,
) -> list[Tensor]:
    """Gradients of query, key and value, those that are needed; all three with `into`, tensors to write them to."""
    call = _Call(*arguments)
    maps = map(call.as_map, (grad_output, output, logsumexp))
    spaces = None if into is None else [call.as_map(space) for space in into]
    gradients = call.start_backward(*maps, needs_gradient, spaces)
    call.submit_regions(backward_query_kernel, "backward_query")
    if needs_gradient[1] or needs_gradient[2]:
        call.submit_regions(backward_key_kernel, "backward_key", call.invert())
    return [call.as_given(gradient) for gradient in gradients if gradient is not None]
