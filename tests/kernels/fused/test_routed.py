"""Fused routed attention: outputs and every gradient against the definition."""

from dataclasses import replace

import pytest
import torch
from operator_testing import (
    LAYOUTS,
    assert_single_keys_have_no_gradient,
    describe,
    random_inputs,
    run_with_gradients,
    subsets,
    sweep,
)
from test_routed_attention import TENSORS, Case, check_against_definition, check_maps, draw

from vicinal.kernels import backend, explain, routed_attention
from vicinal.kernels.routed import fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(case: Case) -> None:
    with backend("fused"):
        check_against_definition(case)


def several_keys(case: Case) -> Case:
    """With a single key the gradient of its score is 0, and nothing measures its rounding."""
    return replace(case, tokens=max(case.tokens, 2))


SPECIAL = [
    Case(1, 2, 1),
    Case(6, 4, 6, index=torch.int32),  # routed to all regions
    Case(4, 5, 4, repeated=True, head_dim=40),  # some regions come twice, some are asked by nobody
    Case(3, 65, 2, batch=1, heads=1, head_dim=24),  # one more than a block
    Case(9, 16, 4, batch=1, heads=1, head_dim=32),  # fills a block
    Case(20, 1, 8, batch=1, heads=1),
    Case(3, 7, 1, heads=3, value_dim=24),
    Case(3, 7, 1, heads=1, head_dim=24, value_dim=1),
    Case(2, 9, 2, batch=1, heads=1, head_dim=160, value_dim=160),
]


@pytest.mark.parametrize("case", SPECIAL, ids=describe)
def test_special_shapes(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("repeated", [False, True])
def test_the_routes_are_turned_round_some_at_a_time(repeated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more routes than a program looks through at once: two of five regions, with two routes each."""
    monkeypatch.setattr(fused, "ROUTES_OF_PROGRAM", 4)
    check(Case(5, 3, 2, heads=1, repeated=repeated))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [SPECIAL[2], SPECIAL[3], SPECIAL[6]], ids=describe)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(2, 3), (3, 2)])
def test_maps_are_read_in_place(rows: int, width: int, dtype: torch.dtype) -> None:
    with backend("fused"):
        check_maps(Case(6, 6, 2, batch=1, head_dim=24, value_dim=24, dtype=dtype), rows, width)


def test_a_large_map_whose_regions_fill_blocks() -> None:
    with backend("fused"):
        check_maps(Case(4, 66, 2, batch=1, heads=1, value_dim=16), 2, 11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(Case(4, 5, 2, layout=layout, heads=1))


@pytest.mark.parametrize("case", sweep(draw, 8, seed=2))
def test_random_cases(case: Case) -> None:
    check(replace(several_keys(case), regions=min(case.regions, 6), topk=min(case.topk, 6), batch=1))


@pytest.mark.slow
@pytest.mark.parametrize("case", sweep(draw, 200, seed=3))
def test_many_random_cases(case: Case) -> None:
    check(several_keys(case))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 16, 24, 40, 48, 64, 80, 128, 160])
def test_head_dimensions(dim: int, dtype: torch.dtype) -> None:
    check(Case(3, 5, 2, batch=1, heads=1, head_dim=dim, value_dim=dim, dtype=dtype))


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case(4, 3, 2, heads=1)
    tensors = case.inputs()
    with backend("fused"):
        expected = run_with_gradients(case.run, tensors, TENSORS)
        actual = run_with_gradients(case.run, tensors, wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("arrange", ["expanded", "permuted", "sliced"])
def test_layouts_of_the_output_gradient(arrange: str) -> None:
    shape = (2, 4, 3, 2, 8)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(shape, torch.float32)]
    routes = Case(4, 3, 2).routes
    grad_output = {
        "expanded": torch.randn(()).expand(shape),
        "permuted": torch.randn(2, 2, 8, 4, 3).movedim((1, 2), (-2, -1)),
        "sliced": torch.randn(2, 4, 3, 2, 16)[..., 3:11],
    }[arrange]
    with backend("fused"):
        output = routed_attention(*inputs, routes)
        actual = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
        expected = torch.autograd.grad(output, inputs, grad_output.contiguous())
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_strided_routes() -> None:
    case = Case(5, 3, 2, heads=1)
    routes = case.routes
    strided = torch.stack((routes, routes), -1).int()[..., 0]
    with backend("fused"):
        found = [routed_attention(**case.inputs(), routes=tensor) for tensor in (routes, strided)]
    assert torch.equal(*found)


def test_a_single_key_has_no_gradient() -> None:
    case = Case(2, 1, 1)
    assert_single_keys_have_no_gradient(case.run, case.inputs())


def test_gradients_are_the_same_bits_each_time() -> None:
    case = Case(5, 5, 3, repeated=True, heads=1)
    with backend("fused"):
        first, second = (run_with_gradients(case.run, case.inputs(), TENSORS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_logsumexp_and_large_scores() -> None:
    case = Case(4, 5, 3, heads=1)
    tensors = [tensor * 30 for tensor in case.inputs().values()]
    with backend("fused"):
        output, logsumexp = torch.ops.vicinal.routed_attention(*tensors, case.routes)
    with backend("tiled"):
        expected = torch.ops.vicinal.routed_attention(*tensors, case.routes)
    # A score of this size is off by eps times itself, in the weights as in the logsumexp.
    rounding = torch.finfo(torch.float32).eps * expected[1].abs().max().item()
    torch.testing.assert_close(logsumexp, expected[1], rtol=0, atol=4 * rounding)
    torch.testing.assert_close(output, expected[0], rtol=4 * rounding, atol=4 * rounding * 30)


def test_offsets_beyond_32_bits() -> None:
    """Regions lie 2**30 elements apart; the pages between them are never touched."""
    storage = torch.empty(3 * 2**30 + 256, dtype=torch.float16)
    far = storage.as_strided((1, 4, 4, 1, 16), (0, 2**30, 16, 16, 1))
    far.copy_(torch.randn(far.shape))
    found = []
    for tokens in (far, far.contiguous()):
        leaves = [tokens.detach().requires_grad_() for _ in range(3)]
        with backend("fused"):
            output = routed_attention(*leaves, Case(4, 4, 3, batch=1).routes)
            found.append((output, *torch.autograd.grad(output, leaves, tokens)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_empty_batch() -> None:
    tensors = [torch.zeros(0, 4, 2, 1, 8, requires_grad=True) for _ in range(3)]
    with backend("fused"):
        output = routed_attention(*tensors, torch.zeros(0, 4, 1, dtype=torch.int64))
        assert all(gradient.shape == output.shape for gradient in torch.autograd.grad(output.sum(), tensors))


def test_routes_out_of_range_read_no_memory_outside() -> None:
    """On a GPU nothing refuses them before the kernels run."""
    tensors, routes = Case(3, 2, 2, batch=1, heads=1), torch.tensor([[[0, 2], [1, 1 << 30], [-(1 << 30), 0]]])
    tensors = list(tensors.inputs().values())
    output, logsumexp = fused.forward(*tensors, routes, None)
    gradients = fused.backward(torch.ones_like(output), output, logsumexp, [True] * 3, *tensors, routes, None)
    only_itself = routed_attention(*(tensor[:, 1:2] for tensor in tensors), torch.zeros(1, 1, 1, dtype=torch.int64))
    torch.testing.assert_close(output[:, 1:2], only_itself)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(2, 1, 1, dtype=torch.float64), "torch.float64 is not covered"),
        (Case(2, 1, 1, head_dim=161), "head_dim 161 is above 160"),
        (Case(2, 1, 1, value_dim=161), "value_dim 161 is above 160"),
    ],
    ids=["float64", "head_dim", "value_dim"],
)
def test_refusals(case: Case, reason: str) -> None:
    with backend("fused"):
        assert reason in explain(routed_attention, **case.inputs(), routes=case.routes)
