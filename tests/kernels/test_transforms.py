"""Every operator under forward mode, forward over reverse and torch.func: values against central differences and loops.

In float64. A central difference of step 1e-5 is off by some 1e-10 for its cut-off and 1e-11 for rounding.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from math import prod

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from vicinal.kernels import backend
from vicinal.kernels.dispatch import OPERATORS, Operator

STEP = 1e-5
ACCURACY = 1e-8
EXACT = 1e-13
"""Of the same sums in another order."""


def randn(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """In float64 whatever the call would have."""
    return torch.randn(shape, dtype=torch.float64)


def arguments_of(operator: Operator) -> tuple:
    """Every tensor that an operator takes is given; options are neither default nor trivial."""
    return operator.examples.small["every argument"].make(torch.float64, randn)


class Case:
    """An operator as a function of its differentiable tensors, with a point and a direction."""

    def __init__(self, operator: Operator) -> None:
        torch.manual_seed(0)
        self.operator = operator
        self.arguments = arguments_of(operator)
        self.point = tuple(self.arguments[index] for index in operator.differentiable)
        self.direction = tuple(map(torch.randn_like, self.point))

    def run(self, *tensors: Tensor) -> Tensor:
        arguments = list(self.arguments)
        for index, tensor in zip(self.operator.differentiable, tensors, strict=True):
            arguments[index] = tensor
        return self.operator(*arguments)

    def loss(self, *tensors: Tensor) -> Tensor:
        return self.run(*tensors).square().sum()

    def gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(self.loss(*leaves), leaves)

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(range(len(self.point)))

    @functools.cached_property
    def tangent(self) -> Tensor:
        return central_difference(self.run, self.point, self.direction)

    @functools.cached_property
    def product(self) -> Tensor:
        """Of the matrix of second derivatives of the loss with the direction."""
        return central_difference(lambda *point: flat(self.gradients(*point)), self.point, self.direction)


@pytest.fixture(scope="module", params=OPERATORS.values(), ids=OPERATORS.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def central_difference(function: Callable[..., Tensor], point: tuple, direction: tuple) -> Tensor:
    ahead, behind = (function(*(x + step * t for x, t in zip(point, direction, strict=True))) for step in (STEP, -STEP))
    return (ahead - behind) / (2 * STEP)


def assert_near(actual: Tensor, expected: Tensor, accuracy: float = ACCURACY) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= accuracy * expected.abs().max()


def test_every_tensor_of_every_operator_is_given() -> None:
    for operator in OPERATORS.values():
        arguments = arguments_of(operator)
        assert len(arguments) == len(operator.names)
        tensors = [index for index, kind in enumerate(operator.kinds) if "Tensor" in kind]
        assert all(isinstance(arguments[index], Tensor) for index in tensors)


@pytest.mark.parametrize("backend_name", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("frozen", [torch.no_grad, nullcontext])
def test_forward_mode(case: Case, backend_name: str, frozen: Callable) -> None:
    with backend(backend_name), frozen():
        output, tangent = jvp(case.run, case.point, case.direction)
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, case.point, case.direction)
            unpacked = forward_ad.unpack_dual(case.run(*duals))
            raw = forward_ad.unpack_dual(unpacked.primal)
    assert_near(output, case.run(*case.point), EXACT)
    assert_near(tangent, case.tangent)
    assert_near(unpacked.tangent, case.tangent)
    assert raw.tangent is None


def test_forward_mode_of_each_tensor_alone(case: Case) -> None:
    for place in case.places:
        alone = tuple(t if index == place else torch.zeros_like(t) for index, t in enumerate(case.direction))
        expected = central_difference(case.run, case.point, alone)
        fixed = case.point

        def run(tensor: Tensor, place: int = place, fixed: tuple = fixed) -> Tensor:
            return case.run(*fixed[:place], tensor, *fixed[place + 1 :])

        assert_near(jvp(run, (case.point[place],), (case.direction[place],))[1], expected)


def test_forward_mode_of_the_registered_operator(case: Case) -> None:
    """As scripted modules and graphs call it: with its logsumexp, which has no tangent."""
    arguments = list(case.arguments)
    with forward_ad.dual_level():
        for index, direction in zip(case.operator.differentiable, case.direction, strict=True):
            arguments[index] = forward_ad.make_dual(arguments[index], direction)
        output, logsumexp = map(forward_ad.unpack_dual, case.operator.forward_op(*arguments))
    assert_near(output.tangent, case.tangent)
    assert logsumexp.tangent is None
    assert torch.equal(logsumexp.primal, case.operator.forward_op(*case.arguments)[1])


def test_forward_mode_in_float32(case: Case) -> None:
    def single(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.float() for tensor in tensors)

    tangent = jvp(case.run, single(case.point), single(case.direction))[1]
    assert tangent.dtype == torch.float32
    # some ten products and sums of a few terms
    assert_near(tangent.double(), case.tangent, 100 * torch.finfo(torch.float32).eps)


def test_first_order_reverse(case: Case) -> None:
    expected = case.gradients(*case.point)
    for actual, gradient in zip(grad(case.loss, case.places)(*case.point), expected, strict=True):
        assert_near(actual, gradient, EXACT)
    output, pull = vjp(case.run, *case.point)
    assert_near(flat(pull(2 * output)), flat(expected), EXACT)
    along = sum((g * t).sum() for g, t in zip(expected, case.direction, strict=True))
    assert_near(along, central_difference(case.loss, case.point, case.direction))


@pytest.mark.parametrize("backend_name", ["tiled", "reference"])
def test_forward_over_reverse_and_reverse_over_forward(case: Case, backend_name: str) -> None:
    gradients = grad(case.loss, case.places)
    expected = case.product
    with backend(backend_name):
        assert_near(flat(jvp(gradients, case.point, case.direction)[1]), expected)
        along = grad(lambda *point: jvp(case.loss, point, case.direction)[1], case.places)
        assert_near(flat(along(*case.point)), expected)
        with forward_ad.dual_level():
            leaves = [x.clone().requires_grad_() for x in case.point]
            duals = list(map(forward_ad.make_dual, leaves, case.direction))
            products = map(forward_ad.unpack_dual, torch.autograd.grad(case.loss(*duals), duals))
            assert_near(flat(tuple(product.tangent for product in products)), expected)


def test_jacobians(case: Case) -> None:
    def along(steps: Tensor) -> Tensor:
        moved = (x + steps[0] * t + steps[1] * x for x, t in zip(case.point, case.direction, strict=True))
        return case.run(*moved).flatten()[:5]

    origin = torch.zeros(2, dtype=torch.float64)
    by_point = central_difference(case.run, case.point, case.point)
    expected = torch.stack([case.tangent.flatten()[:5], by_point.flatten()[:5]], 1)
    assert_near(jacfwd(along)(origin), expected)
    assert_near(jacrev(along)(origin), expected)
    assert_near(linearize(case.run, *case.point)[1](*case.direction), case.tangent)
    second = jacfwd(jacfwd(lambda steps: along(steps).square().sum()))(origin)
    assert_near(hessian(lambda steps: along(steps).square().sum())(origin), second, 1e-12)


def mapped_axes(case: Case) -> Iterator[tuple[int | None, ...]]:
    """All tensors mapped; the first alone, on its last axis; all but the first; each alone."""
    yield tuple(index % 2 for index in case.places)
    yield (case.point[0].ndim, *[None] * (len(case.point) - 1))
    yield (None, *[0] * (len(case.point) - 1))
    for place in case.places:
        yield tuple(0 if index == place else None for index in case.places)


@pytest.mark.parametrize("backend_name", ["tiled", "reference"])
def test_vmap_is_a_loop(case: Case, backend_name: str) -> None:
    def per_sample(*point: Tensor) -> tuple[Tensor, ...]:
        return (case.run(*point), *grad(case.loss, case.places)(*point), jvp(case.run, point, case.direction)[1])

    stacks = [torch.stack([x, x + 0.1 * t, t]) for x, t in zip(case.point, case.direction, strict=True)]
    for axes in mapped_axes(case):
        if all(axis is None for axis in axes):
            continue
        pairs = list(zip(stacks, axes, strict=True))
        with backend(backend_name):
            actual = vmap(per_sample, axes)(*(x[0] if axis is None else x.movedim(0, axis) for x, axis in pairs))
            calls = [per_sample(*(x[0 if axis is None else place] for x, axis in pairs)) for place in range(3)]
        for mapped, looped in zip(actual, map(torch.stack, zip(*calls, strict=True)), strict=True):
            assert_near(mapped, looped, EXACT)


def test_vmap_of_routes(case: Case) -> None:
    if "routes" not in case.operator.names:
        return
    place = case.operator.names.index("routes")
    routes = torch.stack([case.arguments[place], 3 - case.arguments[place]])

    def run(routes: Tensor) -> Tensor:
        return case.operator(*case.arguments[:place], routes, *case.arguments[place + 1 :])

    for name in ("tiled", "reference"):
        with backend(name):
            assert_near(vmap(run)(routes), torch.stack([run(routes[0]), run(routes[1])]), EXACT)
            with pytest.raises(ValueError, match="routes has entries from 0 to 4"):
                vmap(run)(routes.clamp(max=2) + 2 * (routes == routes.max()))


def test_compiled_transforms() -> None:
    """Code that is compiled enters forward mode in another way."""
    case = Case(OPERATORS["window_attention_packed"])

    def tangent(*point: Tensor) -> Tensor:
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, point, case.direction)
            return forward_ad.unpack_dual(case.run(*duals)).tangent

    torch._dynamo.reset()
    compile_ = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    assert_near(compile_(tangent)(*case.point), case.tangent)
    assert_near(compile_(lambda *point: jvp(case.run, point, case.direction)[1])(*case.point), case.tangent)
    assert_near(jvp(torch.compile(case.run, backend="aot_eager"), case.point, case.direction)[1], case.tangent)
    product = compile_(lambda *point: jvp(grad(case.loss, case.places), point, case.direction)[1])
    assert_near(flat(product(*case.point)), case.product)


def test_an_empty_batch_has_empty_tangents() -> None:
    query = torch.zeros(0, 4, 4, 2, 3)
    operator = OPERATORS["window_attention"]
    tangent = jvp(lambda x: operator(x, query, query, 2, "block", 0, None, None), (query,), (query,))[1]
    assert (prod(tangent.shape), tangent.shape) == (0, query.shape)
