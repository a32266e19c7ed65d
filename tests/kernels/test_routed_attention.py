"""routed_attention computes what its definition says, on every backend, dtype and layout."""

import random
from dataclasses import dataclass

import pytest
import torch
from operator_testing import (
    LAYOUTS,
    assert_matches_definition,
    dense_attention,
    random_inputs,
    run_with_gradients,
    seeded,
    subsets,
    sweep,
)
from torch import Tensor

from vicinal.kernels import backend, routed_attention, routed_attention_packed, window_attention
from vicinal.kernels.routed import aggregate, routed_attention_weights, tiled
from vicinal.kernels.tiling import Budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("query", "key", "value")


@dataclass(frozen=True)
class Case:
    regions: int
    tokens: int
    topk: int
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    repeated: bool = False
    index: torch.dtype = torch.int64
    scale: float | None = None

    def inputs(self) -> dict[str, Tensor]:
        shape = (self.batch, self.regions, self.tokens, self.heads)
        query, key, _ = random_inputs((*shape, self.head_dim), self.dtype, self.layout)
        value = random_inputs((*shape, self.value_dim), self.dtype, self.layout, seed=1)[0]
        return {"query": query, "key": key, "value": value}

    @property
    def routes(self) -> Tensor:
        """Different regions for each region, or any, so that some come twice."""
        generator = seeded(2)
        shape = (self.batch, self.regions)
        if self.repeated:
            return torch.randint(self.regions, (*shape, self.topk), generator=generator, dtype=self.index)
        order = torch.rand(*shape, self.regions, generator=generator).argsort(-1)
        return order[..., : self.topk].to(self.index)

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return routed_attention(query, key, value, self.routes, scale=self.scale)


def draw(generator: random.Random) -> Case:
    regions = generator.choice([1, 2, 4, 6, 15, 49])
    repeated = generator.choice([False, False, True])
    return Case(
        regions=regions,
        tokens=generator.choice([1, 2, 5, 12]),
        topk=generator.choice([1, 3, 4] if repeated else [1, max(1, regions // 3), regions]),
        batch=generator.choice([1, 3]),
        heads=generator.choice([1, 2, 3]),
        head_dim=generator.choice([1, 8, 16, 37]),
        value_dim=generator.choice([1, 8, 24]),
        dtype=generator.choice(DTYPES),
        layout=generator.choice(LAYOUTS),
        repeated=repeated,
        index=generator.choice([torch.int64, torch.int32]),
        scale=generator.choice([None, None, 0.0, -0.3, 1.0]),
    )


def listed(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition: the keys of each region listed one by one, in the dtype of the inputs."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    images = []
    for image in range(case.batch):
        rows = []
        for region, chosen in enumerate(case.routes[image].tolist()):
            keys, values = (torch.cat([tokens[image, other] for other in chosen]) for tokens in (key, value))
            scores = torch.einsum("nhd,mhd->hnm", query[image, region], keys) * scale
            rows.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values))
        images.append(torch.stack(rows))
    return torch.stack(images)


def check_against_definition(case: Case) -> None:
    tensors = case.inputs()
    norms = [tensors[name].double().norm(dim=-1).max().item() for name in ("query", "key")]
    score = (case.head_dim**-0.5 if case.scale is None else abs(case.scale)) * norms[0] * norms[1]
    assert_matches_definition(case.run, lambda **leaves: listed(case, **leaves), tensors, case.dtype, score)


@pytest.mark.parametrize("case", sweep(draw, 60))
def test_tiled_against_the_definition(case: Case) -> None:
    check_against_definition(case)


@pytest.mark.parametrize("case", sweep(draw, 20, seed=1))
def test_reference_against_the_definition(case: Case) -> None:
    with backend("reference"):
        check_against_definition(case)


PLANS = [Case(12, 3, 5, batch=3, value_dim=5), Case(12, 3, 5, repeated=True), Case(6, 4, 6, index=torch.int32)]


@pytest.mark.parametrize("case", PLANS, ids=["different", "repeated", "all"])
@pytest.mark.parametrize("plan", [tiled.GatherPlan, tiled.DensePlan])
@pytest.mark.parametrize("numbers", [1, 2000, 1 << 30])
def test_both_plans_in_chunks_of_any_size(
    case: Case, plan: type[tiled.GatherPlan], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same case on both plans; small chunks cut an image between regions, large ones hold several images."""
    monkeypatch.setattr(tiled, "plan", plan)
    monkeypatch.setattr(tiled, "BUDGET", Budget(numbers))
    check_against_definition(case)


@pytest.mark.parametrize(
    ("regions", "tokens", "topk", "plan"),
    [
        (49, 64, 1, tiled.GatherPlan),  # the stages of BiFormer at 224 pixels
        (49, 16, 4, tiled.GatherPlan),
        (49, 4, 16, tiled.GatherPlan),
        (49, 4, 49, tiled.DensePlan),
        (49, 1, 16, tiled.DensePlan),
        (49, 64, 49, tiled.GatherPlan),  # a map too large for its square
    ],
)
def test_the_plan_follows_the_shape(regions: int, tokens: int, topk: int, plan: type) -> None:
    case = Case(regions, tokens, topk, batch=1)
    assert type(tiled.plan(case.inputs()["query"], case.routes)) is plan


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize(("topk", "repeated"), [(1, False), (4, True), (5, False)])
def test_gradcheck(name: str, topk: int, repeated: bool) -> None:
    case = Case(5, 2, topk, 2, 2, 3, 2, torch.float64, repeated=repeated)
    leaves = [tensor.requires_grad_() for tensor in case.inputs().values()]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *values: case.run(**dict(zip(TENSORS, values, strict=True))), leaves)


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case(6, 2, 3)
    expected = run_with_gradients(case.run, case.inputs(), TENSORS)
    actual = run_with_gradients(case.run, case.inputs(), wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def to_regions(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def as_map(regions: Tensor, rows: int, columns: int, width: int) -> Tensor:
    """A list of regions as a map (batch, rows, y, columns, x, heads, channels) that is laid out as one."""
    return regions.unflatten(2, (-1, width)).unflatten(1, (rows, columns)).transpose(2, 3).contiguous()


def check_maps(case: Case, rows: int, width: int) -> None:
    """Regions that lie in a map, alone and packed, give what a list of them gives, and gradients likewise."""
    columns = case.regions // rows
    leaves = [tensor.requires_grad_() for tensor in case.inputs().values()]
    maps = [as_map(leaf, rows, columns, width) for leaf in leaves]
    expected = case.run(*leaves)
    found = [routed_attention(*maps, case.routes, scale=case.scale)]
    if case.value_dim == case.head_dim:
        found.append(routed_attention_packed(torch.stack(maps, -3), case.routes, scale=case.scale))
        found.append(routed_attention_packed(torch.stack(leaves, -3), case.routes, scale=case.scale))
    grad_output = torch.randn(expected.shape, generator=seeded(4)).to(expected.dtype)
    gradients = torch.autograd.grad(expected, leaves, grad_output)
    for output in found:
        given = grad_output
        if output.ndim == 7:
            assert torch.equal(output, as_map(expected, rows, columns, width))
            given = as_map(grad_output, rows, columns, width)
        else:
            assert torch.equal(output, expected)
        actual = torch.autograd.grad(output, leaves, given)
        assert all(torch.equal(*pair) for pair in zip(actual, gradients, strict=True))


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(2, 5), (1, 1), (6, 10)])
def test_maps_are_read_in_place(rows: int, width: int, dtype: torch.dtype, name: str) -> None:
    with backend(name):
        check_maps(Case(6, 10, 2, dtype=dtype), rows, width)
        check_maps(Case(6, 10, 5, dtype=dtype, value_dim=3), rows, width)


def test_a_region_routed_to_itself_is_a_window() -> None:
    """On a rectangular grid of 2 x 3 regions of 4 x 5 tokens."""
    maps = random_inputs((2, 8, 15, 2, 8), torch.float64)
    routes = torch.arange(6)[None, :, None].expand(2, 6, 1)
    output = routed_attention(*(to_regions(tokens, 2, 3) for tokens in maps), routes)
    expected = to_regions(window_attention(*maps, (4, 5)), 2, 3)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [3, 70])
def test_routes_to_all_regions_are_full_attention(tokens: int) -> None:
    case = Case(4, tokens, 4, dtype=torch.float64)
    tensors = case.inputs()
    expected = dense_attention(**tensors, bias=torch.zeros(1, 4 * tokens, 4 * tokens))
    torch.testing.assert_close(case.run(**tensors), expected, rtol=1e-12, atol=1e-12)


def test_many_regions_add_to_one_in_float32() -> None:
    """Ones of bfloat16 summed in bfloat16 would stop at 256."""
    value = torch.zeros(1, 400, 1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    still = value.detach()
    output = routed_attention(still, still, value, torch.zeros(1, 400, 1, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(output.sum(), value)
    assert gradient[0, 0].eq(400).all()
    assert gradient[0, 1:].eq(0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("topk", [2, 8])
def test_large_scores_stay_finite(dtype: torch.dtype, topk: int) -> None:
    case = Case(8, 4, topk, dtype=dtype)
    inputs = {name: (tensor * 100).requires_grad_() for name, tensor in case.inputs().items()}
    output = case.run(**inputs)
    gradients = torch.autograd.grad(output.sum(), list(inputs.values()))
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


@pytest.mark.parametrize("topk", [2, 6])
def test_weights_logsumexp_and_aggregate(topk: int) -> None:
    case = Case(6, 3, topk, value_dim=5, dtype=torch.float64)
    tensors = case.inputs()
    value = tensors.pop("value")
    weights = routed_attention_weights(**tensors, routes=case.routes)
    assert weights.shape == (2, 6, 3, 2, topk * 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 3, 2, dtype=torch.float64))
    torch.testing.assert_close(aggregate(weights, value, case.routes), case.run(**tensors, value=value))
    _, logsumexp = torch.ops.vicinal.routed_attention(tensors["query"], tensors["key"], value, case.routes)
    first = tensors["key"][torch.arange(2), case.routes[:, 0, 0], 0]  # the first key of the first region
    score = (tensors["query"][:, 0, 0] * first).sum(-1) * 8**-0.5
    torch.testing.assert_close((score - logsumexp[:, 0, 0]).exp(), weights[:, 0, 0, :, 0])


TOKENS = torch.randn(2, 6, 4, 2, 8)
ROUTES = torch.zeros(2, 6, 3, dtype=torch.int64)
BAD_CALLS = {
    "rank": ({"query": TOKENS[0]}, r"query has shape \(6, 4, 2, 8\); it must be \(batch, regions, tokens"),
    "map and list": ({"key": TOKENS[:, :, None, None]}, r"key has shape \(2, 6, 1, 1, 4, 2, 8\); it must be \(2, 6, 4"),
    "regions of a map": (
        dict.fromkeys(TENSORS, TOKENS[:, :3, None, None]),
        r"routes has shape \(2, 6, 3\); it must be \(2, 3, 3\)",
    ),
    "integer": ({"query": TOKENS.long()}, "query has dtype torch.int64"),
    "key dtype": ({"key": TOKENS.double()}, "key has dtype torch.float64; it must be torch.float32"),
    "key regions": ({"key": TOKENS[:, :3]}, "key has shape"),
    "key device": ({"key": TOKENS.to("meta")}, "key is on meta; it must be on cpu"),
    "value tokens": ({"value": TOKENS[:, :, :2]}, "value has shape"),
    "routes dtype": ({"routes": ROUTES.float()}, "routes has dtype torch.float32; use int64 or int32"),
    "routes rank": ({"routes": ROUTES[0]}, r"routes has shape \(6, 3\); it must be \(batch, regions, k\)"),
    "routes regions": ({"routes": ROUTES[:, :5]}, r"routes has shape \(2, 5, 3\); it must be \(2, 6, 3\)"),
    "no routes": ({"routes": ROUTES[..., :0]}, r"routes has shape \(2, 6, 0\); each region needs at least 1 route"),
    "too large": ({"routes": ROUTES + 6}, "routes has entries from 6 to 6; they must be from 0 to 5"),
    "negative": ({"routes": ROUTES - 1}, "routes has entries from -1 to -1"),
    "scale": ({"scale": float("nan")}, "scale=nan must be finite"),
}


@pytest.mark.parametrize("name", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors(name: str, wrong: dict, message: str) -> None:
    call = {"query": TOKENS, "key": TOKENS, "value": TOKENS, "routes": ROUTES, **wrong}
    with backend(name), pytest.raises(ValueError, match=message):
        routed_attention(**call)
