"""gated_positional_attention computes what its definition says, on every backend, dtype and layout."""

import random
from dataclasses import dataclass
from math import prod

import pytest
import torch
from operator_testing import LAYOUTS, assert_matches_definition, random_inputs, run_with_gradients, subsets, sweep
from timm.models.convit import GPSA
from torch import Tensor

from vicinal.kernels import backend, gated_positional_attention
from vicinal.kernels.gated import (
    aggregate,
    gated_positional_attention_scores,
    gated_positional_attention_weights,
    tiled,
)
from vicinal.kernels.tiling import Budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("query", "key", "value", "position_scores", "gate")


@dataclass(frozen=True)
class Case:
    map: tuple[int, ...]
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    position_dtype: torch.dtype = torch.float32
    layout: str = "packed"
    scale: float | None = None

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        tokens = prod(self.map)
        position = torch.randn(self.heads, tokens, tokens, generator=generator, dtype=torch.float64)
        gate = torch.randn(self.heads, generator=generator, dtype=torch.float64)
        tensors = random_inputs((self.batch, *self.map, self.heads, self.head_dim), self.dtype, self.layout)
        tensors += [position.to(self.position_dtype), gate.to(self.position_dtype)]
        return dict(zip(TENSORS, tensors, strict=True))

    def run(self, **tensors: Tensor) -> Tensor:
        return gated_positional_attention(**tensors, scale=self.scale)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, position_scores: Tensor, gate: Tensor) -> Tensor:
        """The definition, with the normalisation of the mixture that the paper writes."""
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        queries, keys, values = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value))
        share = gate.to(query.dtype).sigmoid()[:, None, None]
        content = (queries @ keys.transpose(-1, -2) * scale).softmax(-1)
        mixture = (1 - share) * content + share * position_scores.to(query.dtype).softmax(-1)
        mixture = mixture / mixture.sum(-1, keepdim=True)
        return (mixture @ values).transpose(1, 2).reshape(query.shape)


def draw(generator: random.Random) -> Case:
    rank = generator.choice([1, 2, 2, 3])
    return Case(
        map=tuple(generator.choice([1, 2, 3, 5]) for _ in range(rank)),
        batch=generator.choice([1, 3]),
        heads=generator.choice([1, 2, 3]),
        head_dim=generator.choice([1, 8, 24, 48]),
        dtype=generator.choice(DTYPES),
        position_dtype=generator.choice([torch.float32, torch.bfloat16]),
        layout=generator.choice(LAYOUTS),
        scale=generator.choice([None, None, 0.0, -0.3, 1.0]),
    )


@pytest.mark.parametrize("case", sweep(draw, 40))
def test_random_cases(case: Case) -> None:
    assert_matches_definition(case.run, case.dense, case.inputs(), case.dtype)


@pytest.mark.parametrize("case", sweep(draw, 15, seed=1))
def test_reference_on_random_cases(case: Case) -> None:
    with backend("reference"):
        assert_matches_definition(case.run, case.dense, case.inputs(), case.dtype)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_gradcheck(name: str) -> None:
    case = Case(map=(2, 3), dtype=torch.float64, position_dtype=torch.float64, head_dim=3)
    tensors = case.inputs()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *values: case.run(**dict(zip(tensors, values, strict=True))), leaves)


@pytest.mark.parametrize("scores", [1, 3000])
def test_result_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    case = Case(map=(5, 6), batch=5, dtype=torch.float64, position_dtype=torch.float64)
    tensors = case.inputs()
    expected = run_with_gradients(case.run, tensors, tensors)
    monkeypatch.setattr(tiled, "BUDGET", Budget(scores))
    for name, tensor in run_with_gradients(case.run, tensors, tensors).items():
        # sums over images change their order
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case(map=(3, 4))
    tensors = case.inputs()
    expected = run_with_gradients(case.run, tensors, TENSORS)
    actual = run_with_gradients(case.run, tensors, wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_agrees_with_the_attention_of_timm_convit() -> None:
    attention = GPSA(12, num_heads=4).double().eval()
    torch.nn.init.normal_(attention.gating_param)
    torch.nn.init.normal_(attention.pos_proj.weight)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    expected = attention(x)
    scores = attention.pos_proj(attention.rel_indices[0].double()).permute(2, 0, 1)
    query, key = attention.qk(x).unflatten(-1, (2, 4, 3)).unbind(2)
    value = attention.v(x).unflatten(-1, (4, 3))
    output = gated_positional_attention(query, key, value, scores, attention.gating_param)
    torch.testing.assert_close(attention.proj(output.flatten(-2)), expected, rtol=1e-12, atol=1e-12)


def test_the_gate_chooses_between_content_and_position() -> None:
    tensors = Case(map=(3, 4), dtype=torch.float64, position_dtype=torch.float64).inputs()
    values = tensors["value"].flatten(1, 2)
    by_position = torch.einsum("hnm,bmhd->bnhd", tensors["position_scores"].softmax(-1), values)
    closed = gated_positional_attention(**{**tensors, "gate": torch.full((2,), 50.0, dtype=torch.float64)})
    torch.testing.assert_close(closed.flatten(1, 2), by_position, rtol=1e-12, atol=1e-12)
    content = {name: tensor.flatten(1, 2).transpose(1, 2) for name, tensor in tensors.items() if name in TENSORS[:3]}
    by_content = torch.nn.functional.scaled_dot_product_attention(*content.values())
    opened = gated_positional_attention(**{**tensors, "gate": torch.full((2,), -50.0, dtype=torch.float64)})
    torch.testing.assert_close(opened.flatten(1, 2).transpose(1, 2), by_content, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    tensors = {name: (100 * tensor).requires_grad_() for name, tensor in Case(map=(4, 4), dtype=dtype).inputs().items()}
    output = gated_positional_attention(**tensors)
    gradients = torch.autograd.grad(output.sum(), tuple(tensors.values()))
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


def test_logsumexp_is_that_of_the_content() -> None:
    tensors = Case(map=(3, 4), dtype=torch.float64).inputs()
    _, logsumexp = torch.ops.vicinal.gated_positional_attention(*tensors.values(), None)
    query, key = (tensors[name].flatten(1, 2).transpose(1, 2) for name in TENSORS[:2])
    expected = (query @ key.transpose(-1, -2) * 8**-0.5).logsumexp(-1).transpose(1, 2).reshape(logsumexp.shape)
    torch.testing.assert_close(logsumexp, expected, rtol=1e-12, atol=1e-12)


def test_weights_and_aggregate() -> None:
    case = Case(map=(3, 4), dtype=torch.float64)
    tensors = case.inputs()
    value = tensors.pop("value")
    weights = gated_positional_attention_weights(**tensors)
    assert weights.shape == (2, 3, 4, 2, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, 2, dtype=torch.float64))
    # the share of position is rounded as float32 in neither
    torch.testing.assert_close(aggregate(weights, value), case.run(**tensors, value=value), rtol=1e-12, atol=1e-12)


def test_scores_have_the_weights_as_their_softmax() -> None:
    tensors = Case(map=(3, 4), dtype=torch.float64).inputs()
    tensors.pop("value")
    tensors["position_scores"] = 300 * tensors["position_scores"]  # weights that are zero as numbers
    for gate in ([0.3, -2.0], [100.0, -100.0]):
        tensors["gate"] = torch.tensor(gate, dtype=torch.float64, requires_grad=True)
        scores = gated_positional_attention_scores(**tensors)
        expected = gated_positional_attention_weights(**tensors)
        torch.testing.assert_close(scores.softmax(-1), expected, rtol=1e-10, atol=1e-12)
        assert torch.autograd.grad(scores.softmax(-1).square().sum(), tensors["gate"])[0].isfinite().all()


TENSOR, SCORES, GATE = torch.randn(2, 3, 4, 2, 4), torch.zeros(2, 12, 12), torch.zeros(2)
BAD_CALLS = {
    "rank": ({"query": TENSOR[0, 0]}, r"query has shape \(4, 2, 4\)"),
    "integer": ({"query": TENSOR.long()}, "query has dtype torch.int64"),
    "key dtype": ({"key": TENSOR.double()}, "key has dtype torch.float64; it must be torch.float32"),
    "value shape": ({"value": TENSOR[..., :2]}, "value has shape"),
    "scores tokens": ({"position_scores": SCORES[:, 1:]}, r"it must be \(2, 12, 12\), \(heads, tokens, tokens\)"),
    "scores dtype": ({"position_scores": SCORES.long()}, "position_scores has dtype torch.int64"),
    "scores device": ({"position_scores": SCORES.to("meta")}, "position_scores is on meta; it must be on cpu"),
    "gate shape": ({"gate": GATE[:1]}, r"gate has shape \(1,\); it must be \(2,\), \(heads,\)"),
    "gate dtype": ({"gate": GATE.bool()}, "gate has dtype torch.bool"),
    "scale": ({"scale": float("inf")}, "scale=inf must be finite"),
    "scale type": ({"scale": "1"}, "scale='1' must be a number or None"),
}


@pytest.mark.parametrize("name", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors(name: str, wrong: dict, message: str) -> None:
    call = {"query": TENSOR, "key": TENSOR, "value": TENSOR, "position_scores": SCORES, "gate": GATE, **wrong}
    with backend(name), pytest.raises(ValueError, match=message):
        gated_positional_attention(**call)
