"""Fused aggregated attention: outputs and every gradient against the definition."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from operator_testing import (
    LAYOUTS,
    assert_matches_definition,
    describe,
    run_with_gradients,
    subsets,
    sweep,
)
from test_aggregated_attention import TENSORS, Case, dense, draw
from torch import Tensor

from vicinal.kernels import aggregated_attention, backend, explain
from vicinal.kernels.aggregated import fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def largest_score(case: Case, tensors: dict[str, Tensor]) -> float:
    """A bound of it, from the norms of queries and keys."""
    query, *keys = (tensors[name].double().norm(dim=-1).max().item() for name in ("query", "key", "pooled_key"))
    biases = [tensors[name].abs().max().item() for name in ("local_bias", "pooled_bias") if name in tensors]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return abs(scale) * query * max(keys) + max(biases, default=0.0)


def check(case: Case) -> None:
    tensors = case.inputs()
    with backend("fused"):
        assert_matches_definition(case.run, partial(dense, case), tensors, case.dtype, largest_score(case, tensors))


SPECIAL = [
    Case(map=(1, 1), pooled=1),
    Case(map=(2, 3), pooled=1, window=5, batch=1),  # the window is larger than the map
    Case(map=(4, 4), window=1),
    Case(map=(8, 9), pooled=65, batch=1, heads=1, head_dim=40),  # one more than a tile, and than a block of pooled keys
    Case(map=(7, 17), pooled=64, batch=1, heads=1, bias_dtype=torch.bfloat16),
    Case(map=(2, 50), pooled=3, batch=1, heads=1, head_dim=48),
    Case(map=(9, 6), bias_dtype=None, extra=False, heads=1),
    Case(map=(5, 5), extra=False, scale=None, heads=3),
    Case(map=(3, 4), batch=1, heads=1, head_dim=160, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", SPECIAL, ids=describe)
def test_special_shapes(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [SPECIAL[3], SPECIAL[7]], ids=describe)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(Case(map=(5, 4), layout=layout, heads=1))


@pytest.mark.parametrize("case", sweep(draw, 5, seed=2))
def test_random_cases(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sweep(draw, 200, seed=3))
def test_many_random_cases(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 24, 40, 48, 64, 80, 128, 160])
def test_head_dimensions(head_dim: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        head_dim = min(head_dim, 64)
    check(Case(map=(5, 9), pooled=5, batch=1, heads=1, head_dim=head_dim, dtype=dtype))


def test_wide_float32_heads_are_left_to_tiled() -> None:
    tokens, pooled = torch.zeros(1, 3, 3, 1, 65), torch.zeros(1, 2, 1, 65)
    with backend("fused"):
        reason = explain(aggregated_attention, tokens, tokens, tokens, pooled, pooled, 3)
    assert "heads of 65 channels in torch.float32 take more registers or shared memory" in reason


CHOICES = [(name,) for name in TENSORS] + [TENSORS[:3], TENSORS[3:5], TENSORS[5:], TENSORS[1:7:2]]


@pytest.mark.parametrize("wanted", CHOICES, ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case(map=(3, 4), batch=1, heads=1)
    tensors = case.inputs()
    with backend("fused"):
        expected = run_with_gradients(case.run, tensors, TENSORS)
        actual = run_with_gradients(case.run, tensors, wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_every_subset(wanted: tuple[str, ...]) -> None:
    test_gradients_of_a_subset(wanted)


@pytest.mark.parametrize("arrange", ["expanded", "permuted", "sliced"])
def test_layouts_of_the_output_gradient(arrange: str) -> None:
    tensors = Case(map=(4, 5), head_dim=8, batch=1).inputs()
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    shape = (1, 4, 5, 2, 8)
    grad_output = {
        "expanded": torch.randn(()).expand(shape),
        "permuted": torch.randn(1, 2, 8, 4, 5).movedim((1, 2), (-2, -1)),
        "sliced": torch.randn(1, 4, 5, 2, 16)[..., 3:11],
    }[arrange]
    with backend("fused"):
        output = aggregated_attention(**tensors)
        actual = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
        expected = torch.autograd.grad(output, leaves, grad_output.contiguous())
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(), (2, 1, 1), (12, 4), (1, 12, 1)], ids=str)
def test_a_pooled_bias_is_broadcast(shape: tuple[int, ...]) -> None:
    case = Case(map=(3, 4))
    tensors = case.inputs()
    small = torch.randn(shape)
    full = small.expand(2, 12, 4).contiguous()
    with backend("fused"):
        actual, expected = (
            run_with_gradients(case.run, {**tensors, "pooled_bias": bias}, ["pooled_bias", "query"])
            for bias in (small, full)
        )
    assert torch.equal(actual["output"], expected["output"])
    assert torch.equal(actual["grad_pooled_bias"], expected["grad_pooled_bias"].sum_to_size(shape))


def test_tensors_of_unusual_layout() -> None:
    """Pooled maps, and biases and value weights whose last axis is not adjacent in memory."""
    case = Case(map=(4, 4), pooled=6, layout="permuted", heads=1)
    tensors = case.inputs()
    unusual = {name: tensors[name].unflatten(1, (2, 3)) for name in ("pooled_key", "pooled_value")}
    unusual |= {name: tensors[name].mT.contiguous().mT for name in TENSORS[5:]}
    with backend("fused"):
        actual, expected = (run_with_gradients(case.run, {**tensors, **other}, TENSORS) for other in (unusual, {}))
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name].view(tensor.shape))


def test_sums_in_parts_are_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer programs each sums several tiles or images; the last part is not full."""
    case = Case(map=(9, 9), batch=3, heads=1, window=1)
    monkeypatch.setattr(fused, "PROGRAMS", 2)
    check(case)


def test_gradients_are_the_same_bits_each_time() -> None:
    case = Case(map=(9, 5), heads=1)
    tensors = case.inputs()
    with backend("fused"):
        first, second = (run_with_gradients(case.run, tensors, TENSORS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_logsumexp_and_large_scores() -> None:
    tensors = Case(map=(4, 5), heads=1).inputs()
    arguments = [tensors[name] * 30 for name in TENSORS[:5]]
    options = (3, tensors["local_bias"], tensors["pooled_bias"], None, 1.0)
    with backend("fused"):
        output, logsumexp = torch.ops.vicinal.aggregated_attention(*arguments, *options)
    with backend("tiled"):
        expected = torch.ops.vicinal.aggregated_attention(*arguments, *options)
    # A score of this size is off by eps times itself, in the weights as in the logsumexp.
    rounding = torch.finfo(torch.float32).eps * expected[1].abs().max().item()
    torch.testing.assert_close(logsumexp, expected[1], rtol=0, atol=4 * rounding)
    torch.testing.assert_close(output, expected[0], rtol=4 * rounding, atol=4 * rounding * 30)


def test_minus_infinity_in_the_biases_masks_keys() -> None:
    tensors = Case(map=(3, 4), heads=1).inputs()
    tensors["local_bias"][:, 5] = float("-inf")
    tensors["pooled_bias"][:, :, 1:] = float("-inf")
    wanted = TENSORS[:5]
    with backend("fused"):
        actual = run_with_gradients(aggregated_attention, tensors, wanted)
    with backend("tiled"):
        expected = run_with_gradients(aggregated_attention, tensors, wanted)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits() -> None:
    """Rows of the map lie 2**30 elements apart; the pages between them are never touched."""
    storage = torch.empty(3 * 2**30 + 256, dtype=torch.float16)
    far = storage.as_strided((1, 4, 4, 1, 16), (0, 2**30, 16, 16, 1))
    far.copy_(torch.randn(far.shape))
    found = []
    for tokens in (far, far.contiguous()):
        leaves = [
            tensor.detach().requires_grad_() for tensor in (tokens, tokens, tokens, tokens[:, :, 0], tokens[:, 0])
        ]
        with backend("fused"):
            output = aggregated_attention(*leaves)
            found.append((output, *torch.autograd.grad(output, leaves, tokens)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_empty_batch() -> None:
    tensors = Case(map=(3, 4), batch=0).inputs()
    with backend("fused"):
        found = run_with_gradients(aggregated_attention, tensors, TENSORS)
    assert all(found[f"grad_{name}"].shape == tensor.shape for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [(torch.float64, 8, "torch.float64 is not covered"), (torch.float32, 161, "head_dim 161 is above 160")],
    ids=["float64", "head_dim"],
)
def test_refusals(dtype: torch.dtype, head_dim: int, reason: str) -> None:
    tensors = Case(map=(3, 4), dtype=dtype, head_dim=head_dim).inputs()
    with backend("fused"):
        assert f"fused: {reason}" in explain(aggregated_attention, **tensors)
