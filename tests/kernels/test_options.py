"""Options that no map can have are refused in one line, by every operator and on every backend."""

import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vicinal.kernels import aggregated_attention, backend, halo_attention, neighborhood_attention
from vicinal.kernels.dispatch import OPERATORS

MAP = torch.randn(1, 8, 8, 2, 8)
SIZES = [
    (operator.name, name)
    for operator in OPERATORS.values()
    for name, kind in zip(operator.names, operator.kinds, strict=True)
    if kind in ("int", "List[int]")
]
NO_SIZES = [
    *(2**63, -(2**63) - 1, 2**62, 2**62 + 1, 2**31 + 1, 10**9 + 1, 10**5000, -1),
    *(True, 3.0, math.nan, "3", None, fractions.Fraction(3), np.float32(3), np.bool_(True), np.array([3, 3])),
    *(torch.tensor(3), (3, 2**63), (), (3, 3, 3, 3), [[3, 3]], {3}),
]


def run(name: str, leaves: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    """Call an operator with the last of its small examples, of zeros where no tensors are given, and these options."""
    operator = OPERATORS[name]
    *_, example = operator.examples.small.values()
    arguments = example.bind(example.leaves(torch.float32, torch.zeros) if leaves is None else leaves)
    return operator(*{**dict(zip(operator.names, arguments, strict=True)), **options}.values())


def refusal(function: Callable[..., Tensor], *args: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (each caller looks at the message)
        function(*args, **options)
    return str(raised.value)


@pytest.mark.parametrize("backend_name", ["reference", "tiled"])
@pytest.mark.parametrize(("name", "option"), SIZES)
def test_what_is_no_size_of_a_map(name: str, option: str, backend_name: str) -> None:
    with backend(backend_name):
        for value in NO_SIZES:
            message = refusal(run, name, **{option: value})
            assert message.startswith((f"{option}=", "kernel_size=", "shift=", "stride="))
            assert "\n" not in message
            assert len(message) < 300


@pytest.mark.parametrize("backend_name", ["reference", "tiled"])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_no_scale(name: str, backend_name: str) -> None:
    with backend(backend_name):
        for value in (
            1e300,
            -1e300,
            1.8e38,
            np.float64(1e300),
            10**400,
            math.inf,
            math.nan,
            fractions.Fraction(10**400),
        ):
            assert refusal(run, name, scale=value).startswith("scale=")
        for value in ("1", True, 1j, [1.0], torch.tensor(1.0), np.array(1.0)):
            assert "must be a number or None" in refusal(run, name, scale=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_largest_scale_runs_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    """Between keys of zero every scale leaves an average of values: the gradient of their sum is one for each query."""
    *_, example = OPERATORS[name].examples.small.values()
    leaves = example.leaves(dtype, torch.zeros)
    tokens = [leaves[name].requires_grad_() for name in ("packed", "pooled") if name in leaves]
    with backend("tiled"):
        output = run(name, leaves, scale=8e307 if dtype == torch.float64 else 1.7e38)
        output.sum().backward()
    assert not output.any()
    # In each corner the window of 6 x 6 has 5 x 5 tokens of the map.
    seen = (5 / 6) ** 2 if name == "halo_attention" else 1.0
    total = sum(x.grad.double().sum().item() for x in tokens)
    assert total == pytest.approx(seen * output.numel(), rel=1e-2)


def test_numbers_of_other_kinds_count_as_themselves() -> None:
    expected = neighborhood_attention(MAP, MAP, MAP, (3, 4), dilation=2, scale=0.5)
    for kind in (np.int64, np.int32, np.uint8):
        kernel_size = (kind(3), kind(4))
        found = neighborhood_attention(MAP, MAP, MAP, kernel_size, dilation=kind(2), scale=np.float32(0.5))
        assert torch.equal(found, expected)
    found = neighborhood_attention(MAP, MAP, MAP, torch.Size([3, 4]), dilation=2, scale=fractions.Fraction(1, 2))
    assert torch.equal(found, expected)


def test_reaches_beyond_small_maps_are_allowed() -> None:
    """One setting serves all maps; what lies outside has no weight."""
    x = MAP[:, :2, :2]
    wide, narrow = (aggregated_attention(x, x, x, x[:, 0], x[:, 0], window_size=size) for size in (63, 3))
    torch.testing.assert_close(wide, narrow, rtol=0, atol=1e-6)
    wide, narrow = (halo_attention(x, x, x, 2, size, mask_padding=True) for size in (64, 0))
    torch.testing.assert_close(wide, narrow, rtol=0, atol=1e-6)
    message = refusal(halo_attention, x, x, x, 2, 65)
    assert message == "halo_size=65 reaches far beyond the map of (2, 2); use at most 64"
    x = torch.zeros(1, 2, 70, 1, 4)
    message = refusal(aggregated_attention, x, x, x, x[:, 0], x[:, 0], window_size=141)
    assert message == "window_size=141 reaches far beyond the map of (2, 70); use at most 140"
