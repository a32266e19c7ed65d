"""Fused kernels behind the registered operator: autocast, torch.compile, torch.export."""

from collections.abc import Callable

import pytest
import torch
from operator_testing import seeded
from torch import Tensor

from vicinal.kernels import (
    aggregated_attention,
    backend,
    halo_attention,
    neighborhood_attention,
    routed_attention,
    window_attention,
)


class Call(torch.nn.Module):
    """One operator on a packed projection, and a second tensor where the operator takes more."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, packed: Tensor, other: Tensor) -> Tensor:
        return self.function(*packed.unbind(3), other)


def halo(query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
    return halo_attention(query, key, value, 2, 1, relative_height_logits=logits, mask_padding=True)


def aggregated(query: Tensor, key: Tensor, value: Tensor, pooled: Tensor) -> Tensor:
    return aggregated_attention(query, key, value, *pooled.unbind(2))


OPERATORS = {
    "window": (lambda q, k, v, table: window_attention(q, k, v, 2, shift=1, relative_position_bias=table), (2, 3, 3)),
    "neighborhood": (
        lambda q, k, v, table: neighborhood_attention(q, k, v, 3, relative_position_bias=table),
        (2, 5, 5),
    ),
    "halo": (halo, (2, 4, 4, 2, 4)),
    "aggregated": (aggregated, (2, 3, 2, 2, 8)),
    "routed": (lambda q, k, v, routes: routed_attention(q, k, v, routes.long().clamp(0, 3)), (2, 4, 2)),
}


def make(name: str) -> tuple[Call, Tensor, Tensor]:
    function, shape = OPERATORS[name]
    generator = seeded(0)
    packed, other = (torch.randn(size, generator=generator).requires_grad_() for size in ((2, 4, 4, 3, 2, 8), shape))
    return Call(function), packed, other


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast(name: str) -> None:
    """It computes in bfloat16, and gradients come back in the dtype of the parameters."""
    call, packed, other = make(name)
    with backend("fused"), torch.autocast(packed.device.type, torch.bfloat16):
        output = call(packed, other)
        (gradient,) = torch.autograd.grad(output.float().sum(), packed)
    assert output.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    with backend("tiled"):
        expected = call(packed, other)
    # products of bfloat16 have a relative error of 2**-8 each, and the outputs are means of values of size one
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=2**-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_compile(name: str) -> None:
    call, packed, other = make(name)
    with backend("fused"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = []
        for function in (compiled, call):
            output = function(packed, other)
            results.append((output, *torch.autograd.grad(output.square().sum(), packed)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_export(name: str) -> None:
    call, packed, other = make(name)
    program = torch.export.export(call, (packed.detach(), other.detach()))
    with backend("fused"):
        assert torch.equal(program.module()(packed.detach(), other.detach()), call(packed, other))
