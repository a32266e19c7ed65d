"""aggregated_attention computes what its definition says, on every backend, dtype and layout."""

import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from operator_testing import (
    LAYOUTS,
    assert_matches_definition,
    random_inputs,
    run_with_gradients,
    seeded,
    subsets,
    sweep,
)
from torch import Tensor

from vicinal.kernels import aggregated_attention, backend
from vicinal.kernels.aggregated import aggregate, aggregated_attention_weights, tiled
from vicinal.kernels.tiling import Budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("query", "key", "value", "pooled_key", "pooled_value", "local_bias", "pooled_bias", "value_weights")


@dataclass(frozen=True)
class Case:
    map: tuple[int, int]
    pooled: int = 4
    window: int = 3
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = torch.float32
    extra: bool = True
    layout: str = "packed"
    scale: float | None = 0.5

    def inputs(self) -> dict[str, Tensor]:
        shape = (self.batch, *self.map, self.heads, self.head_dim)
        tensors = random_inputs(shape, self.dtype, self.layout)
        tensors += random_inputs((self.batch, self.pooled, self.heads, self.head_dim), self.dtype, self.layout, 1)[:2]
        tensors = dict(zip(TENSORS, tensors, strict=False))
        generator = seeded(2)
        if self.bias_dtype:
            shapes = ((self.heads, self.window**2), (self.heads, self.map[0] * self.map[1], self.pooled))
            for name, bias_shape in zip(("local_bias", "pooled_bias"), shapes, strict=True):
                tensors[name] = torch.randn(bias_shape, generator=generator).to(self.bias_dtype)
        if self.extra:
            extra = torch.randn((*shape[:4], self.window**2), generator=generator)
            tensors["value_weights"] = extra.to(self.dtype)
        return tensors

    def run(self, **tensors: Tensor) -> Tensor:
        return aggregated_attention(**tensors, window_size=self.window, scale=self.scale)


def draw(generator: random.Random) -> Case:
    return Case(
        map=(generator.choice([1, 2, 3, 4, 7, 8, 9]), generator.choice([1, 2, 4, 5, 8])),
        pooled=generator.choice([1, 2, 9]),
        window=generator.choice([1, 3, 3, 3, 5]),
        batch=generator.choice([1, 3]),
        heads=generator.choice([1, 2, 3]),
        head_dim=generator.choice([1, 8, 24, 32]),
        dtype=generator.choice(DTYPES),
        bias_dtype=generator.choice([None, torch.float32, torch.bfloat16]),
        extra=generator.choice([True, False]),
        layout=generator.choice(LAYOUTS),
        scale=generator.choice([None, 1.0, 0.0, -0.3]),
    )


def band(case: Case, by_slot: Tensor) -> Tensor:
    """(..., tokens, tokens) from (..., tokens, window**2): each slot at its neighbour, pair by pair."""
    height, width = case.map
    radius = case.window // 2
    result = by_slot.new_zeros((*by_slot.shape[:-1], height * width))
    for slot in range(case.window**2):
        row_step, column_step = slot // case.window - radius, slot % case.window - radius
        for row in range(height):
            for column in range(width):
                neighbour = (row + row_step, column + column_step)
                if 0 <= neighbour[0] < height and 0 <= neighbour[1] < width:
                    token = row * width + column
                    result[..., token, neighbour[0] * width + neighbour[1]] = by_slot[..., token, slot]
    return result


def dense(case: Case, **tensors: Tensor) -> Tensor:
    """The definition as attention of all tokens to all tokens and pooled tokens, in the dtype of query."""
    query, key, value = (tensors[name].flatten(1, 2).transpose(1, 2) for name in TENSORS[:3])
    pooled_key, pooled_value = (tensors[name].transpose(1, 2) for name in TENSORS[3:5])
    dtype, tokens = query.dtype, case.map[0] * case.map[1]
    slots = torch.ones(1, tokens, case.window**2, dtype=dtype)
    local_bias = torch.zeros(1, tokens, tokens, dtype=dtype)
    if "local_bias" in tensors:
        local_bias = band(case, tensors["local_bias"].to(dtype)[:, None] * slots)
    local_bias = local_bias.masked_fill(band(case, slots) == 0, float("-inf"))
    pooled_bias = tensors.get("pooled_bias", torch.zeros(1, 1, 1)).to(dtype).expand(case.heads, tokens, case.pooled)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = query @ torch.cat([key, pooled_key], 2).transpose(-1, -2) * scale
    scores = scores + torch.cat([local_bias.expand(case.heads, -1, -1), pooled_bias], -1)
    local, pooled = scores.softmax(-1).split([tokens, case.pooled], -1)
    if "value_weights" in tensors:
        local = local + band(case, tensors["value_weights"].flatten(1, 2).transpose(1, 2))
    output = torch.cat([local, pooled], -1) @ torch.cat([value, pooled_value], 2)
    return output.transpose(1, 2).reshape(tensors["query"].shape)


def check_against_definition(case: Case) -> None:
    assert_matches_definition(case.run, partial(dense, case), case.inputs(), case.dtype)


SPECIAL = [
    Case(map=(1, 1), pooled=1),
    Case(map=(2, 3), pooled=1, window=5),
    Case(map=(4, 4), window=1),
    Case(map=(14, 14), pooled=49, heads=1, head_dim=24),
    Case(map=(2, 50), pooled=3, heads=1),
    Case(map=(9, 6), bias_dtype=None, extra=False),
    Case(map=(5, 5), extra=False, scale=None),
]


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: f"{case.map}-{case.pooled}-{case.window}")
def test_special_shapes(case: Case, name: str) -> None:
    with backend(name):
        check_against_definition(case)


@pytest.mark.parametrize("case", sweep(draw, 50))
def test_random_cases(case: Case) -> None:
    check_against_definition(case)


@pytest.mark.parametrize("case", sweep(draw, 15, seed=1))
def test_reference_on_random_cases(case: Case) -> None:
    with backend("reference"):
        check_against_definition(case)


@pytest.mark.parametrize("scores", [1, 1 << 11, 1 << 13])
def test_result_does_not_depend_on_the_strips(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    case = Case(map=(13, 9), batch=3, dtype=torch.float64, bias_dtype=torch.float64)
    tensors = case.inputs()
    expected = run_with_gradients(case.run, tensors, tensors)
    monkeypatch.setattr(tiled, "BUDGET", Budget(scores))
    for name, tensor in run_with_gradients(case.run, tensors, tensors).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


def test_without_neighbours_it_is_attention_to_the_pooled_tokens() -> None:
    case = Case(map=(5, 6), window=1, dtype=torch.float64, bias_dtype=None, extra=False)
    tensors = case.inputs()
    tensors["local_bias"] = torch.full((2, 1), float("-inf"), dtype=torch.float64)
    query, key, value = (
        tensors[name].flatten(1, -3).transpose(1, 2) for name in ("query", "pooled_key", "pooled_value")
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=case.scale)
    expected = expected.transpose(1, 2).reshape(tensors["query"].shape)
    torch.testing.assert_close(case.run(**tensors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("shape", [(), (1, 1, 1), (2, 1, 1), (12, 4), (1, 12, 1), (2, 1, 4)], ids=str)
def test_a_pooled_bias_is_broadcast(name: str, shape: tuple[int, ...]) -> None:
    case = Case(map=(3, 4), dtype=torch.float64, bias_dtype=torch.float64)
    tensors = case.inputs()
    small = torch.randn(shape, dtype=torch.float64)
    with backend(name):
        actual = run_with_gradients(case.run, {**tensors, "pooled_bias": small}, ["pooled_bias", "query"])
        full = small.expand(2, 12, 4).contiguous()
        expected = run_with_gradients(case.run, {**tensors, "pooled_bias": full}, ["pooled_bias", "query"])
    torch.testing.assert_close(actual["output"], expected["output"])
    torch.testing.assert_close(actual["grad_pooled_bias"], expected["grad_pooled_bias"].sum_to_size(shape))
    torch.testing.assert_close(actual["grad_query"], expected["grad_query"])


def test_pooled_maps_are_read_in_row_major_order() -> None:
    case = Case(map=(4, 4), pooled=6, layout="contiguous")
    tensors = case.inputs()
    maps = {name: tensors[name].unflatten(1, (2, 3)) for name in ("pooled_key", "pooled_value")}
    actual, expected = (run_with_gradients(case.run, {**tensors, **pooled}, maps) for pooled in (maps, {}))
    assert torch.equal(actual["output"], expected["output"])
    for name in maps:
        assert torch.equal(actual[f"grad_{name}"], expected[f"grad_{name}"].unflatten(1, (2, 3)))


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_gradcheck(name: str) -> None:
    case = Case(map=(3, 5), pooled=2, batch=1, dtype=torch.float64, bias_dtype=torch.float64, head_dim=3)
    tensors = case.inputs()
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors.values()]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *values: case.run(**dict(zip(tensors, values, strict=True))), leaves)


@pytest.mark.parametrize("wanted", subsets(TENSORS)[::7], ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case(map=(6, 5))
    tensors = case.inputs()
    expected = run_with_gradients(case.run, tensors, TENSORS)
    actual = run_with_gradients(case.run, tensors, wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    tensors = Case(map=(6, 6), dtype=dtype).inputs()
    inputs = {name: tensors[name] * 100 for name in TENSORS[:5]}
    found = run_with_gradients(aggregated_attention, inputs, inputs)
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_logsumexp() -> None:
    case = Case(map=(5, 6), dtype=torch.float64, bias_dtype=None, extra=False)
    tensors = case.inputs()
    arguments = [tensors[name] for name in TENSORS[:5]]
    _, logsumexp = torch.ops.vicinal.aggregated_attention(*arguments, 3, None, None, None, 0.5)
    weights = aggregated_attention_weights(*arguments[:2], arguments[3], scale=0.5)
    pooled_scores = torch.einsum("byxhd,bphd->byxhp", arguments[0], arguments[3]) * 0.5
    expected = pooled_scores - weights[..., 9:].log()
    torch.testing.assert_close(logsumexp[..., None].expand_as(expected), expected, rtol=1e-10, atol=1e-10)


def test_weights_and_aggregate() -> None:
    case = Case(map=(4, 6), dtype=torch.float64)
    tensors = case.inputs()
    value, pooled_value, extra = (tensors.pop(name) for name in ("value", "pooled_value", "value_weights"))
    weights = aggregated_attention_weights(**tensors, scale=case.scale)
    assert weights.shape == (2, 4, 6, 2, 9 + 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6, 2, dtype=torch.float64))
    assert (weights[:, 0, :, :, :3] == 0).all()
    output = aggregate(weights, value, pooled_value, 3, extra)
    expected = case.run(**tensors, value=value, pooled_value=pooled_value, value_weights=extra)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


MAP, POOLED = torch.randn(2, 8, 12, 2, 4), torch.randn(2, 6, 2, 4)
BAD_CALLS = {
    "rank": ({"query": MAP[0]}, r"query has shape \(8, 12, 2, 4\)"),
    "integer": ({"query": MAP.long()}, "query has dtype torch.int64"),
    "key shape": ({"key": MAP[:1]}, r"key has shape \(1, 8, 12, 2, 4\)"),
    "pooled rank": ({"pooled_key": POOLED[0]}, r"pooled_key has shape \(6, 2, 4\); it must be \(batch, pooled"),
    "pooled heads": ({"pooled_key": POOLED[:, :, :1]}, r"pooled_key has shape \(2, 6, 1, 4\); it must be \(2, 6, 2, 4"),
    "pooled dtype": ({"pooled_value": POOLED.double()}, "pooled_value has dtype torch.float64"),
    "no pooled": ({"pooled_key": POOLED[:, :0]}, "at least 1 pooled token"),
    "pooled lengths": ({"pooled_value": POOLED[:, :5]}, r"pooled_value has shape \(2, 5, 2, 4\); it must be \(2, 6,"),
    "pooled device": ({"pooled_key": POOLED.to("meta")}, "pooled_key is on meta; it must be on cpu"),
    "even window": ({"window_size": 4}, "window_size=4 must be odd and at least 1; use 5"),
    "no window": ({"window_size": 0}, "window_size=0 must be odd and at least 1; use 1"),
    "window type": ({"window_size": (3, 3)}, r"window_size=\(3, 3\) must be one int"),
    "local bias": ({"local_bias": torch.zeros(2, 3, 3)}, r"local_bias has shape \(2, 3, 3\); it must be \(2, 9\)"),
    "pooled bias": ({"pooled_bias": torch.zeros(3, 1, 1)}, r"pooled_bias has shape \(3, 1, 1\); it must be \(2, 96, 6"),
    "bias rank": ({"pooled_bias": torch.zeros(1, 1, 1, 1)}, "pooled_bias has shape"),
    "bias dtype": ({"local_bias": torch.zeros(2, 9).long()}, "local_bias has dtype torch.int64"),
    "value weights": ({"value_weights": MAP}, r"value_weights has shape .* must be \(2, 8, 12, 2, 9\)"),
    "scale": ({"scale": float("nan")}, "scale=nan must be finite"),
    "scale type": ({"scale": "1"}, "scale='1' must be a number or None"),
}


@pytest.mark.parametrize("name", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors(name: str, wrong: dict, message: str) -> None:
    call = {"query": MAP, "key": MAP, "value": MAP, "pooled_key": POOLED, "pooled_value": POOLED, **wrong}
    with backend(name), pytest.raises(ValueError, match=message):
        aggregated_attention(**call)
