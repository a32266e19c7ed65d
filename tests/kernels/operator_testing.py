"""What the tests of every attention operator share: oracles, error measures, input layouts and readable sweeps.

Tolerances: an operator is compared with the same formula in float64. Its error may be twice that of a dense formula in
the operator's own dtype (two correct orders of summation differ by a small factor), plus rounding. On average (RMS)
that is one rounding of the result; the worst element of a gradient may meet the roundings of the four stages it passes
(scores, weights, gradient of the scores, last product) in one direction.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor

from vicinal.kernels import backend

LAYOUTS = ("contiguous", "packed", "sliced", "permuted", "expanded", "offset")


@dataclass(frozen=True)
class Errors:
    """Distance to an expected tensor, relative to the size of that tensor."""

    rms: float
    largest: float

    @classmethod
    def between(cls, actual: Tensor, expected: Tensor) -> "Errors":
        difference, expected = actual.double() - expected.double(), expected.double()
        if expected.numel() == 0:
            return cls(0.0, 0.0)
        smallest = torch.finfo(torch.float64).tiny
        rms = difference.square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=smallest)
        return cls(rms.item(), (difference.abs().max() / expected.abs().max().clamp(min=smallest)).item())


def assert_as_accurate(name: str, actual: Tensor, baseline: Tensor, exact: Tensor, score: float = 0.0) -> None:
    """Fail unless `actual` is as near to `exact` (float64) as `baseline`, the dense formula in the same dtype.

    Args:
        score: size of the largest score. Stored in float32 it is off by `eps * score`, which is the relative error of
            its weight; in which scores that shows depends on the base of the exponential.
    """
    assert actual.dtype == baseline.dtype
    assert actual.shape == exact.shape
    found, allowed = Errors.between(actual, exact), Errors.between(baseline, exact)
    rounding = torch.finfo(actual.dtype).eps + torch.finfo(torch.float32).eps * score
    if actual.is_cuda:
        rounding += 2**-22  # largest relative error of ex2.approx, by the PTX ISA; the dense formula has a longer exp
    report = f"{name} {actual.dtype}: {found}, dense formula of the same dtype {allowed}, rounding {rounding:.1e}"
    assert found.rms <= 2 * allowed.rms + rounding, report
    assert found.largest <= 2 * allowed.largest + 4 * rounding, report


def dense_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """Attention of all tokens to all tokens in the layout of our operators, in the dtype of query.

    Args:
        query, key, value: (batch, *spatial, heads, head_dim).
        bias: (heads or 1, tokens, tokens) added to the scores; -inf where a query may not see a key.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = [tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value)]
    scores = tokens[0] @ tokens[1].transpose(-1, -2) * scale + bias.to(query.dtype)
    return (scores.softmax(-1) @ tokens[2]).transpose(1, 2).reshape(query.shape)


def run_with_gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], wanted: Iterable[str], seed: int = 0
) -> dict[str, Tensor]:
    """Call `function(**tensors)` and differentiate it for a random output gradient.

    Returns:
        "output", and "grad_<name>" for each name in `wanted`.
    """
    wanted = list(wanted)
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    output = function(**leaves)
    result = {"output": output.detach()}
    if wanted:
        generator = seeded(seed)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        gradients = torch.autograd.grad(output, [leaves[name] for name in wanted], grad_output)
        result.update({f"grad_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)})
    return result


def assert_single_keys_have_no_gradient(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> None:
    """Where queries see one key each: fused is like tiled, but for rounding.

    The softmax of one score is 1, and what rounding leaves of the gradient of the score is of the size of an eps.
    """
    results = []
    for name in ("fused", "tiled"):
        with backend(name):
            results.append(run_with_gradients(function, tensors, tensors))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-6, atol=1e-6)


def assert_matches_definition(
    run: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    score: float = 0.0,
) -> None:
    """Hold output and gradients of `run(**tensors)` against the dense formula in the same dtype and in float64.

    Args:
        score: see :func:`assert_as_accurate`.
    """
    actual = run_with_gradients(run, tensors, tensors)
    baseline = run_with_gradients(dense, tensors, tensors)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    # The output gradient is rounded to the dtype of the output in both runs; the exact one must start from the same.
    exact = run_with_gradients(lambda **leaves: dense(**leaves).to(dtype), doubles, doubles)
    exact["output"] = dense(**doubles)
    for name, tensor in actual.items():
        assert_as_accurate(name, tensor, baseline[name], exact[name], score)


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Every non-empty choice of the names."""
    names = tuple(names)
    return [chosen for size in range(1, len(names) + 1) for chosen in itertools.combinations(names, size)]


def seeded(seed: int) -> torch.Generator:
    """A generator on the default device, which is a GPU where the fused kernels are tested on one."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0
) -> list[Tensor]:
    """Query, key and value of one shape (batch, *spatial, heads, head_dim), stored in one of LAYOUTS."""
    generator = seeded(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    batch, *spatial, heads, head_dim = shape
    if layout == "packed":
        return list(randn(batch, *spatial, 3, heads, head_dim).unbind(-3))
    if layout == "sliced":
        return [randn(batch, *(size + 2 for size in spatial), heads, head_dim + 3)[_inner(spatial)] for _ in range(3)]
    if layout == "permuted":
        return [randn(batch, heads, head_dim, *spatial).movedim((1, 2), (-2, -1)) for _ in range(3)]
    if layout == "expanded":
        return [randn(1, *spatial, heads, head_dim).expand(shape) for _ in range(3)]
    if layout == "offset":
        return [randn(math.prod(shape) + 1)[1:].view(shape) for _ in range(3)]
    return [randn(*shape) for _ in range(3)]


def _inner(spatial: list[int]) -> tuple:
    return (slice(None), *(slice(1, 1 + size) for size in spatial), slice(None), slice(1, -2))


def sweep(draw: Callable[[random.Random], object], count: int, seed: int = 0) -> list:
    """`count` different pytest parameters drawn by `draw`, which returns a dataclass; ids name every field."""
    generator = random.Random(seed)
    cases: dict[str, object] = {}
    while len(cases) < count:
        case = draw(generator)
        cases[describe(case)] = case
    return [pytest.param(case, id=name) for name, case in cases.items()]


def describe(case: object) -> str:
    """A dataclass as "name=value" joined by commas, short enough for a pytest id."""
    return ",".join(f"{name}={_short(value)}" for name, value in asdict(case).items())


def _short(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return "x".join(map(_short, value))
    return str(value).removeprefix("torch.")
