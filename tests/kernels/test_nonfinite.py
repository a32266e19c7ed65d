"""A NaN or an infinity reaches the tokens that see it, and no others, in outputs and gradients."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from operator_testing import seeded
from torch import Tensor

from vicinal.kernels import aggregated as aggregated_operator
from vicinal.kernels import (
    aggregated_attention,
    backend,
    gated_positional_attention,
    halo_attention,
    neighborhood,
    neighborhood_attention,
    routed_attention,
    window,
    window_attention,
    window_attention_packed,
)
from vicinal.kernels.nonfinite import product_of_seen
from vicinal.kernels.tiling import Budget

HEIGHT, WIDTH, HEADS, HEAD_DIM = 7, 9, 2, 4
CELLS = list(itertools.product(range(HEIGHT), range(WIDTH)))


@dataclass(frozen=True)
class Case:
    """An operator on a map of `size`, and which keys each of its queries sees, by the rows of the map."""

    run: Callable[..., Tensor]
    sees: Callable[[tuple[int, int], tuple[int, int]], bool]
    size: tuple[int, int] = (HEIGHT, WIDTH)

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = seeded(0)
        shape = (2, *self.size, HEADS, HEAD_DIM)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name in ("query", "key", "value", "grad_output")
        }

    def visible(self) -> Tensor:
        """(queries, keys)."""
        cells = list(itertools.product(*map(range, self.size)))
        return torch.tensor([[self.sees(query, key) for key in cells] for query in cells])


def in_neighborhood(query: tuple[int, int], key: tuple[int, int], dilation: int = 1, causal: bool = False) -> bool:
    """A kernel of 3, pushed inwards at the ends of the group; causal along the rows."""
    for axis, (own, other, size) in enumerate(zip(query, key, (HEIGHT, WIDTH), strict=True)):
        step = dilation if axis == 0 else 1
        place, length = own // step, len(range(own % step, size, step))
        start = place - 2 if causal and axis == 0 else min(max(place - 1, 0), length - 3)
        stop = place + 1 if causal and axis == 0 else start + 3
        if other % step != own % step or not max(start, 0) <= other // step < stop:
            return False
    return True


def in_torn_window(query: tuple[int, int], key: tuple[int, int]) -> bool:
    """Windows of 4 shifted by (1, 2) on a map of 8 x 12, whose last ones hold both ends of the map."""
    for own, other, size, shift in zip(query, key, (8, 12), (1, 2), strict=True):
        torn = [(place < shift, (place - shift) % size // 4) for place in (own, other)]
        if torn[0] != torn[1]:
            return False
    return True


ROUTES = torch.tensor([[0, 2, 3], [1, 1, 4], [5, 3, 0], [0, 4, 4], [2, 5, 1], [3, 1, 2]])
"""Of six regions of four tokens: few enough for the plan that scores all pairs."""


def routed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return routed_attention(query, key, value, ROUTES.expand(2, -1, -1))


def aggregated(query: Tensor, key: Tensor, value: Tensor, **options: Tensor) -> Tensor:
    pooled = torch.randn(2, 5, HEADS, HEAD_DIM, generator=seeded(1)).to(query.dtype)
    biases = {"local_bias": torch.randn(HEADS, 9, generator=seeded(2))}
    biases["value_weights"] = torch.randn(*query.shape[:-1], 9, generator=seeded(3)).to(query.dtype)
    return aggregated_attention(query, key, value, pooled, pooled, **biases, **options)


def near(query: tuple[int, int], key: tuple[int, int]) -> bool:
    return max(abs(own - other) for own, other in zip(query, key, strict=True)) <= 1


def gated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.randn(HEADS, len(CELLS), len(CELLS), generator=seeded(1))
    return gated_positional_attention(query, key, value, scores, torch.zeros(HEADS))


CASES = {
    "neighborhood": Case(lambda **x: neighborhood_attention(**x, kernel_size=3), in_neighborhood),
    "neighborhood with bias": Case(
        lambda **x: neighborhood_attention(
            **x, kernel_size=3, relative_position_bias=torch.randn(HEADS, 5, 5, generator=seeded(1))
        ),
        in_neighborhood,
    ),
    "dilated neighborhood": Case(
        lambda **x: neighborhood_attention(**x, kernel_size=3, dilation=(2, 1)),
        lambda query, key: in_neighborhood(query, key, dilation=2),
    ),
    "causal neighborhood": Case(
        lambda **x: neighborhood_attention(**x, kernel_size=3, is_causal=(True, False)),
        lambda query, key: in_neighborhood(query, key, causal=True),
    ),
    "window": Case(
        lambda **x: window_attention(**x, window_size=4),
        lambda query, key: [place // 4 for place in query] == [place // 4 for place in key],
        (8, 12),
    ),
    "small window": Case(  # of fewer keys than a vector register holds
        lambda **x: window_attention(**x, window_size=2),
        lambda query, key: [place // 2 for place in query] == [place // 2 for place in key],
        (6, 8),
    ),
    "packed window": Case(
        lambda query, key, value: window_attention_packed(torch.stack([query, key, value], 3), 2),
        lambda query, key: [place // 2 for place in query] == [place // 2 for place in key],
        (6, 8),
    ),
    "shifted window": Case(lambda **x: window_attention(**x, window_size=4, shift=(1, 2)), in_torn_window, (8, 12)),
    "halo": Case(
        lambda **x: halo_attention(**x, block_size=4, halo_size=1, mask_padding=True),
        lambda query, key: all(
            own // 4 * 4 - 1 <= other < own // 4 * 4 + 5 for own, other in zip(query, key, strict=True)
        ),
        (8, 12),
    ),
    "aggregated": Case(aggregated, near),
    "routed": Case(routed, lambda query, key: key[0] in ROUTES[query[0]], (6, 4)),
    "gated": Case(gated, lambda query, key: True),
}


def results(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients as (batch, tokens, heads, channels)."""
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("query", "key", "value")}
    output = case.run(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), tensors["grad_output"])
    found = {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: tensor.flatten(1, 2) for name, tensor in found.items()}


def lost_outputs(poisoned: str, number: float, token: int, visible: Tensor, query: Tensor) -> Tensor:
    """Queries (tokens,) whose output is no longer finite.

    Args:
        query: (tokens,), the channel of the queries that meets the bad number of a key.
    """
    if poisoned == "grad_output":
        return torch.zeros(len(visible), dtype=torch.bool)
    if poisoned == "query":
        return torch.arange(len(visible)) == token
    if poisoned == "key" and math.isinf(number):
        return visible[:, token] & (query * number > 0)  # the others have a score of -inf, which is a weight of 0
    return visible[:, token]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("poisoned", ["query", "key", "value", "grad_output"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_reaches_only_those_that_see_it(
    name: str, poisoned: str, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a clean run: queries, keys and values change only where a pair leads from the bad number to them.

    One of the numbers meets the smallest pieces of work, of single tiles and rows of windows; one meets bfloat16.
    """
    if number == -math.inf:
        for module in (neighborhood.tiled, window.tiled, aggregated_operator.tiled):
            monkeypatch.setattr(module, "BUDGET", Budget(1))
    case, dtype = CASES[name], torch.bfloat16 if number == math.inf else torch.float32
    tensors, visible = case.tensors(dtype), case.visible()
    with backend("tiled"):
        clean = results(case, tensors)
        for token in (0, len(visible) // 2, len(visible) - 1):
            bad = {name: tensor.clone() for name, tensor in tensors.items()}
            bad[poisoned].flatten(1, 2)[1, token, 0, 2] = number  # a channel of a head of the second image
            found = results(case, bad)
            lost = lost_outputs(poisoned, number, token, visible, tensors["query"].flatten(1, 2)[1, :, 0, 2])
            channels = slice(2, 3) if poisoned == "value" else slice(None)
            assert torch.equal(~found["output"][1, :, 0, channels].isfinite().any(-1), lost)
            own = torch.arange(len(visible)) == token
            by_query = own if poisoned in ("query", "grad_output") else visible[:, token]
            by_key = visible[by_query].any(0)
            touched = {
                "output": by_query & (poisoned != "grad_output"),
                "query": by_query,
                "key": by_key,
                "value": by_key,
            }
            for result, tensor in found.items():
                same = torch.ones(tensor.shape[:3], dtype=torch.bool)
                same[1, touched[result], 0] = False
                rounding = 8 * torch.finfo(dtype).eps * clean[result].abs().max().item()
                torch.testing.assert_close(tensor[same], clean[result][same], rtol=0, atol=rounding)


def test_the_product_of_seen_pairs_is_their_sum() -> None:
    """Term by term: 0 times infinity is NaN where a pair is seen, and nothing where it is hidden."""
    generator = seeded(0)
    numbers = torch.tensor([0.5, -2.0, 0.0, math.nan, math.inf, -math.inf])
    weights = torch.tensor([0.25, -0.5, 0.0])[torch.randint(3, (4, 5, 3), generator=generator)]
    hidden = torch.rand(5, 3, generator=generator) < 0.4
    weights = weights.masked_fill(hidden, 0.0)
    for odds in ([4, 4, 4, 1, 1, 1], [4, 4, 4, 0, 2, 0], [4, 4, 4, 0, 1, 1]):
        chosen = torch.multinomial(torch.tensor(odds, dtype=torch.float32), 4 * 3 * 6, True, generator=generator)
        right = numbers[chosen].view(4, 3, 6)
        terms = (weights[..., None] * right[:, None]).masked_fill(hidden[..., None], 0.0)  # (4, 5, 3, 6)
        expected = terms.sum(2)
        assert expected.isnan().any() or expected.isinf().any()
        torch.testing.assert_close(product_of_seen(weights, hidden, right), expected, equal_nan=True)
    torch.testing.assert_close(
        product_of_seen(weights, None, right), (weights[..., None] * right[:, None]).sum(2), equal_nan=True
    )


@pytest.mark.parametrize("wanted", [["query"], ["key"], ["value"], ["relative_position_bias"]], ids=str)
@pytest.mark.parametrize("shifted", [True, False])
def test_single_gradients_stay_clean_too(wanted: list[str], shifted: bool) -> None:
    """Which of the gradients shows a bad number first depends on those that are asked for."""
    case = CASES["shifted window" if shifted else "neighborhood"]
    visible = case.visible()
    options = {"window_size": 4, "shift": (1, 2)} if shifted else {"kernel_size": 3}
    extent, last = (7, len(visible) - 1) if shifted else (5, 0)
    tensors = case.tensors()
    grad_output = tensors.pop("grad_output")
    tensors["relative_position_bias"] = torch.zeros(HEADS, extent, extent)
    gradients = []
    for number in (0.5, math.nan):
        tensors["value"].flatten(1, 2)[1, last, 0, 2] = number
        leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        with backend("tiled"):
            output = (window_attention if shifted else neighborhood_attention)(**leaves, **options)
        gradients += torch.autograd.grad(output, [leaves[name] for name in wanted], grad_output)
    clean, found = gradients
    if wanted == ["relative_position_bias"]:
        # A bad value is in the gradient of all scores of the queries that see it.
        pairs = [(q, k) for q, k in itertools.product(range(len(visible)), repeat=2) if visible[q, k]]
        cells = list(itertools.product(*map(range, case.size)))
        hit = torch.zeros(extent, extent, dtype=torch.bool)
        for query, key in pairs:
            if visible[query, last]:
                offset = [other - own + extent // 2 for own, other in zip(cells[query], cells[key], strict=True)]
                if shifted:  # places inside the window, which the border tears apart
                    window = [(p - s) % n % 4 for p, s, n in zip(cells[query], (1, 2), case.size, strict=True)]
                    other = [(p - s) % n % 4 for p, s, n in zip(cells[key], (1, 2), case.size, strict=True)]
                    offset = [b - a + extent // 2 for a, b in zip(window, other, strict=True)]
                hit[tuple(offset)] = True
        assert torch.equal(~found[0].isfinite(), hit)
        torch.testing.assert_close(found[1], clean[1], rtol=0, atol=1e-4)  # the other head: sums of some hundred pairs
        return
    by_query = visible[:, last]
    touched = by_query if wanted == ["query"] else visible[by_query].any(0)
    same = torch.ones(2, len(touched), HEADS, dtype=torch.bool)
    same[1, touched, 0] = False
    if wanted == ["value"]:
        same[:] = True  # which does not depend on the values
    torch.testing.assert_close(found.flatten(1, 2)[same], clean.flatten(1, 2)[same], rtol=0, atol=1e-5)


def test_a_bad_value_weight_reaches_the_values_around_its_query() -> None:
    generator = seeded(0)
    shape = (2, HEIGHT, WIDTH, HEADS, HEAD_DIM)
    query, key, value, grad_output = (torch.randn(shape, generator=generator) for _ in range(4))
    weights = torch.randn(*shape[:-1], 9, generator=generator)
    gradients = []
    for number in (0.5, math.nan):
        weights[1, 3, 4, 0, 2] = number
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        with backend("tiled"):
            output = aggregated_attention(*leaves, key[:, 0], value[:, 0], value_weights=weights)
        gradients.append(torch.autograd.grad(output, leaves, grad_output))
    for index in (0, 1):
        torch.testing.assert_close(gradients[0][index], gradients[1][index], rtol=0, atol=1e-5)
    clean, found = (gradient[2] for gradient in gradients)
    lost = torch.zeros(shape, dtype=torch.bool)
    lost[1, 2, 5, 0] = True  # its third weight is that of the neighbour at the upper right
    assert torch.equal(found.isnan(), lost)
    torch.testing.assert_close(found[~lost], clean[~lost], rtol=0, atol=1e-5)
