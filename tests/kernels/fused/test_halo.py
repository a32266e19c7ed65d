"""Fused halo attention: outputs and every gradient against the definition."""

from dataclasses import replace

import pytest
import torch
from operator_testing import (
    LAYOUTS,
    assert_single_keys_have_no_gradient,
    random_inputs,
    run_with_gradients,
    subsets,
    sweep,
)
from test_halo_attention import TENSORS, Case, check_against_definition, draw

from vicinal.kernels import backend, explain, halo_attention
from vicinal.kernels.halo import fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = [
    Case((2, 2), 8, 3, batch=1),  # HaloNet: a window of 14 x 14 takes four steps, the last not full
    Case((2, 3), 8, 3, stride=2, batch=1, heads=1, value_dim=24),  # queries at half the size, wider values
    Case((2, 2), 5, 2, batch=1, mask_padding=True, head_dim=40),  # the tiles of keys do not meet the blocks
    Case((1, 3), 7, 9, batch=1, heads=1, relative="width"),  # the halo is larger than a block
    Case((3, 1), 9, 1, batch=1, heads=1, relative="height"),  # more queries in a block than a program takes
    Case((3, 2), 2, 0, relative="none"),
    Case((2, 1), 1, 1, head_dim=1, value_dim=1),
    Case((2, 2), 4, 2, batch=1, heads=1, head_dim=160, value_dim=96, scale=0.05, dtype=torch.bfloat16),
]


def check(case: Case) -> None:
    """The kernels hold scores in base 2: each is rounded apart from those of the dense formula."""
    query, key, _, *logits = case.inputs().values()
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    score = scale * (query.norm(dim=-1).max() * key.norm(dim=-1).max()) + sum(x.abs().max() for x in logits)
    with backend("fused"):
        check_against_definition(case, score.item())


def several_keys(case: Case) -> Case:
    """With a single key the gradient of its score is 0, and nothing measures its rounding."""
    alone = case.block == 1 and (case.halo == 0 or (case.mask_padding and case.blocks == (1, 1)))
    return replace(case, block=2) if alone else case


def identify(case: Case) -> str:
    return f"{case.blocks}-{case.block}-{case.halo}-{case.stride}"


@pytest.mark.parametrize("case", SPECIAL, ids=identify)
def test_special_shapes(case: Case) -> None:
    check(case)


def test_gradients_of_windows_take_some_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three images two and then one, as on maps whose windows do not fit into the scratch memory."""
    case = Case((1, 2), 2, 1, batch=3, heads=1, value_dim=5)
    numbers = 2 * (case.block + 2 * case.halo) ** 2 * case.heads * (case.head_dim + case.value_dim)  # of an image
    monkeypatch.setattr(fused, "SCRATCH", 4 * numbers * 2)
    firsts = []
    add = fused._Call._add_windows
    monkeypatch.setattr(
        fused._Call,
        "_add_windows",
        lambda call, images, query_parts, held: (firsts.append(held.first), add(call, images, query_parts, held)),
    )
    check(case)
    assert set(firsts) == {0, 2}


LARGE = [pytest.param(case, marks=pytest.mark.slow) for case in SPECIAL if case.block > 4]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [*LARGE, *(case for case in SPECIAL if case.block <= 4)], ids=identify)
def test_special_shapes_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


_FOUR_KEYS = Case((1, 1), 2, 2, batch=1, heads=1, head_dim=40, mask_padding=True, scale=1.0)
FOUR_KEYS = [
    replace(_FOUR_KEYS, layout="expanded"),
    replace(_FOUR_KEYS, layout="packed", head_dim=16),
    replace(_FOUR_KEYS, layout="expanded", halo=1, stride=2),
    replace(_FOUR_KEYS, layout="packed", halo=1, stride=2),
]
"""Maps of 2 x 2, their padding masked. Scores are large, so that one key of a query has most of its weight."""


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", FOUR_KEYS, ids=lambda case: f"{identify(case)}-{case.layout}")
def test_few_keys(case: Case, dtype: torch.dtype) -> None:
    """The gradient of the largest score is a small difference, in which the rounding of the output would show."""
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(Case((2, 1), 4, 2, batch=2, heads=1, layout=layout))


@pytest.mark.parametrize("case", sweep(draw, 6, seed=7))
def test_random_cases(case: Case) -> None:
    check(replace(several_keys(case), batch=1, heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("case", sweep(draw, 200, seed=8))
def test_many_random_cases(case: Case) -> None:
    check(several_keys(case))


@pytest.mark.parametrize("case", [Case((2, 1), 1, 0), Case((1, 1), 1, 2, mask_padding=True)], ids=identify)
def test_a_single_key_has_no_gradient(case: Case) -> None:
    assert_single_keys_have_no_gradient(case.run, case.inputs())


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case((2, 1), 2, 1, batch=1, heads=1)
    with backend("fused"):
        expected = run_with_gradients(case.run, case.inputs(), TENSORS)
        actual = run_with_gradients(case.run, case.inputs(), wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_layouts_of_the_output_gradient() -> None:
    shape = (1, 8, 4, 2, 8)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(shape, torch.float32)]
    with backend("fused"):
        output = halo_attention(*inputs, 4, 1)
        for grad_output in (torch.randn(()).expand(shape), torch.randn(1, 2, 8, 8, 4).movedim((1, 2), (-2, -1))):
            actual = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
            expected = torch.autograd.grad(output, inputs, grad_output.contiguous(), retain_graph=True)
            assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_logits_of_float32_beside_bfloat16() -> None:
    tensors = Case((2, 2), 4, 1, batch=1, dtype=torch.bfloat16).inputs()
    wide = {name: tensor.float() if "relative" in name else tensor for name, tensor in tensors.items()}
    results = []
    for inputs in (tensors, wide):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        with backend("fused"):
            output = halo_attention(**leaves, block_size=4, halo_size=1)
            output.sum().backward()
        results.append((output, leaves))
    assert torch.equal(results[0][0], results[1][0])
    for name, tensor in results[1][1].items():
        assert tensor.grad.dtype == tensor.dtype
        # The interpreter cuts a float32 off to bfloat16, which loses up to one step of 2**-7. Kernels for other dtypes
        # are compiled apart, so a weight next to a tie may be rounded the other way: 2**-8 of one term of a sum.
        expected = results[0][1][name].grad.float()
        atol = 2**-9 * expected.abs().max().item()
        torch.testing.assert_close(tensor.grad.float(), expected, rtol=2**-7, atol=atol)


def test_logsumexp() -> None:
    case = Case((2, 2), 4, 2, batch=1, mask_padding=True)
    arguments = list(case.inputs().values())
    options = (4, 2, *arguments[3:], True, None)
    with backend("fused"):
        _, actual = torch.ops.vicinal.halo_attention(*arguments[:3], *options)
    with backend("tiled"):
        _, expected = torch.ops.vicinal.halo_attention(*arguments[:3], *options)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    inputs = [(tensor * 100).requires_grad_() for tensor in random_inputs((1, 4, 4, 1, 16), dtype)]
    with backend("fused"):
        output = halo_attention(*inputs, 4, 2, mask_padding=True)
        gradients = torch.autograd.grad(output.sum(), inputs)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


def test_minus_infinity_in_the_logits_masks_a_row() -> None:
    tensors = Case((2, 2), 2, 1, batch=1, heads=1).inputs()
    tensors["relative_height_logits"][..., 3] = float("-inf")
    results = []
    for name in ("fused", "tiled"):
        with backend(name):
            results.append(
                run_with_gradients(lambda **x: halo_attention(**x, block_size=2, halo_size=1), tensors, TENSORS[:3])
            )
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits() -> None:
    """Rows of the map lie 2**30 elements apart; the pages between them are never touched."""
    storage = torch.empty(3 * 2**30 + 256, dtype=torch.float16)
    tokens = storage.as_strided((1, 4, 4, 1, 16), (0, 2**30, 16, 16, 1))
    tokens.copy_(torch.randn(tokens.shape))
    with backend("fused"):
        far = halo_attention(tokens, tokens, tokens, 2, 1)
        near = halo_attention(*[tokens.contiguous()] * 3, 2, 1)
    assert torch.equal(far, near)


def test_empty_batch() -> None:
    tensors = [torch.zeros(0, 4, 4, 1, 8, requires_grad=True) for _ in range(3)]
    with backend("fused"):
        output = halo_attention(*tensors, 4, 1)
        assert all(gradient.shape == output.shape for gradient in torch.autograd.grad(output.sum(), tensors))


@pytest.mark.parametrize(
    ("channels", "reason"),
    [(161, "value_dim 161 is above 160"), (65, "heads of 65 channels in torch.float32 take more registers")],
)
def test_values_too_wide_are_left_to_tiled(channels: int, reason: str) -> None:
    tokens = torch.zeros(1, 4, 4, 1, channels)
    with backend("fused"):
        assert reason in explain(halo_attention, tokens[..., :8], tokens[..., :8], tokens, 2, 1)
