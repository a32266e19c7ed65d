"""Fused window attention: outputs and every gradient against the definition."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from operator_testing import LAYOUTS, assert_matches_definition, random_inputs, run_with_gradients, subsets, sweep
from test_window_attention import TENSORS, Case, dense, draw

from vicinal.kernels import backend, explain, window_attention
from vicinal.kernels.dispatch import accumulation_dtype
from vicinal.kernels.triton_common import interpreted
from vicinal.kernels.window import fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(case: Case) -> None:
    with backend("fused"):
        assert_matches_definition(case.run, partial(dense, case), case.inputs(), case.dtype)


SPECIAL = [
    Case(map=(7, 7), window=(7, 7), shift=(3, 3), head_dim=40),  # one window: no shift
    Case(map=(14, 21), window=(7, 7), shift=(3, 3), head_dim=24),
    Case(map=(14, 14), window=(7, 7), shift=(0, 6)),
    Case(map=(12, 10), window=(4, 5), partition="grid", head_dim=32),
    Case(map=(2, 40), window=(2, 4), shift=(1, 2), heads=1),  # eight windows share a block, the last is not full
    Case(map=(5, 3), window=(1, 1), bias_dtype=None),
    Case(map=(8, 8), window=(8, 8), head_dim=16),  # fills a block
    Case(map=(9, 18), window=(9, 9), shift=(4, 4), head_dim=24),  # several blocks of tokens, the last not full
    Case(map=(20, 9), window=(10, 9), partition="grid", bias_dtype=None),
    Case(map=(4, 4), window=(4, 4), head_dim=160, batch=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: f"{case.map}-{case.window}-{case.shift}-{case.head_dim}")
def test_special_shapes(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(Case(map=(8, 4), window=(4, 4), shift=(1, 0), layout=layout))


@pytest.mark.parametrize("case", sweep(draw, 12, seed=2))
def test_random_cases(case: Case) -> None:
    check(replace(case, batch=1, heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("case", sweep(draw, 300, seed=3))
def test_many_random_cases(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    ("case", "programs"),
    [
        (Case(map=(8, 12), window=(4, 4), shift=(1, 2), batch=3), 9),  # 6, 3, 6 and 3 windows of a kind, 4 at a time
        (
            Case(map=(2, 40), window=(2, 4), batch=5, heads=1),
            3,
        ),  # 7 blocks of 8 windows, 2 at a time, the last not full
        (Case(map=(9, 24), window=(9, 8), shift=(0, 4), batch=1, heads=1), 5),  # 3 windows of 2 parts, 2 at a time
    ],
    ids=["shifted", "shared blocks", "parts"],
)
def test_programs_that_walk_several_windows(case: Case, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on maps with more windows than a GPU takes programs; the last program has fewer than the others."""
    monkeypatch.setattr(fused, "PROGRAMS", dict.fromkeys(fused.PROGRAMS, programs))
    check(case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("poisoned", ["query", "key", "value", "grad_output"])
def test_windows_that_share_a_block_do_not_share_a_nan(poisoned: str, dtype: torch.dtype) -> None:
    """A block holds windows of several images."""
    tensors = dict(zip(("query", "key", "value", "grad_output"), random_inputs((2, 4, 4, 1, 16), dtype), strict=False))
    tensors["grad_output"] = random_inputs((2, 4, 4, 1, 16), dtype, seed=1)[0]
    results = []
    for number in (0.5, float("nan")):
        tensors[poisoned][1, 2, 3, 0, 5] = number
        leaves = [tensors[name].clone().requires_grad_() for name in ("query", "key", "value")]
        with backend("fused"):
            output = window_attention(*leaves, 2)
            results.append([output.detach(), *torch.autograd.grad(output, leaves, tensors["grad_output"])])
    bad = torch.zeros(2, 4, 4, dtype=torch.bool)
    bad[1, 2:, 2:] = True  # its window
    for index, (clean, found) in enumerate(zip(*results, strict=True)):
        assert torch.equal(clean[~bad], found[~bad])
        if poisoned in ("key", "value"):
            assert not found[bad].isfinite().any()
        elif index:  # a query or a gradient is in no other output of its window
            assert not found[1, 2, 3].isfinite().all()


@pytest.mark.parametrize("window", [(4, 4), (9, 9)], ids=["whole", "parts"])
@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...], window: tuple[int, int]) -> None:
    case = Case(map=window, window=window, batch=1, heads=1)
    tensors = case.inputs()
    with backend("fused"):
        expected = run_with_gradients(case.run, tensors, TENSORS)
        actual = run_with_gradients(case.run, tensors, wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("arrange", ["expanded", "permuted", "sliced"])
def test_layouts_of_the_output_gradient(arrange: str) -> None:
    shape = (2, 8, 4, 2, 8)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(shape, torch.float32)]
    grad_output = {
        "expanded": torch.randn(()).expand(shape),
        "permuted": torch.randn(2, 2, 8, 8, 4).movedim((1, 2), (-2, -1)),
        "sliced": torch.randn(2, 8, 4, 2, 16)[..., 3:11],
    }[arrange]
    with backend("fused"):
        output = window_attention(*inputs, 4, shift=1)
        actual = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
        expected = torch.autograd.grad(output, inputs, grad_output.contiguous())
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("window", [4, 9])
def test_logsumexp_and_large_scores(window: int) -> None:
    case = Case(map=(window, window), window=(window, window), batch=1, heads=1)
    tensors = {name: tensor * 100 for name, tensor in case.inputs().items()}
    arguments = [tensors[name] for name in TENSORS[:3]]
    options = ([window], "block", [0], tensors["relative_position_bias"], None)
    with backend("fused"):
        output, logsumexp = torch.ops.vicinal.window_attention(*arguments, *options)
    with backend("tiled"):
        expected = torch.ops.vicinal.window_attention(*arguments, *options)
    assert logsumexp.dtype == accumulation_dtype(output.dtype)
    # A score of this size is off by eps times itself, in the weights as in the logsumexp.
    rounding = torch.finfo(torch.float32).eps * expected[1].abs().max().item()
    torch.testing.assert_close(logsumexp, expected[1], rtol=0, atol=4 * rounding)
    torch.testing.assert_close(output, expected[0], rtol=4 * rounding, atol=4 * rounding * 100)


@pytest.mark.parametrize("window", [2, 9])
def test_minus_infinity_in_the_bias_masks_a_key(window: int) -> None:
    query, key, value = random_inputs((1, window, window, 1, 8), torch.float32)
    table = torch.zeros(1, 2 * window - 1, 2 * window - 1)
    table[:, window - 1, window] = float("-inf")  # the right neighbour
    tensors = {"query": query, "key": key, "value": value, "relative_position_bias": table}
    wanted = TENSORS[:3]
    with backend("fused"):
        actual = run_with_gradients(partial(window_attention, window_size=window), tensors, wanted)
    with backend("tiled"):
        expected = run_with_gradients(partial(window_attention, window_size=window), tensors, wanted)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits() -> None:
    """Rows of the map lie 2**30 elements apart; the pages between them are never touched."""
    storage = torch.empty(3 * 2**30 + 256, dtype=torch.float16)
    tokens = storage.as_strided((1, 4, 4, 1, 16), (0, 2**30, 16, 16, 1))
    tokens.copy_(torch.randn(tokens.shape))
    with backend("fused"):
        far = window_attention(tokens, tokens, tokens, 4)
        near = window_attention(*[tokens.contiguous()] * 3, 4)
    assert torch.equal(far, near)


def test_empty_batch() -> None:
    tensors = [torch.zeros(0, 4, 4, 1, 8, requires_grad=True) for _ in range(3)]
    with backend("fused"):
        output = window_attention(*tensors, 4)
        assert all(gradient.shape == output.shape for gradient in torch.autograd.grad(output.sum(), tensors))


@pytest.mark.skipif(not interpreted(), reason="this is a rule of the interpreter, and kernels run on a GPU here")
def test_the_interpreter_runs_only_where_it_is_forced() -> None:
    tokens = torch.zeros(1, 4, 4, 1, 8)
    assert "fused: Triton's interpreter runs only where fused is forced" in explain(window_attention, *[tokens] * 3, 2)
    with backend("fused"):
        assert explain(window_attention, *[tokens] * 3, 2) == "window_attention: fused"


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (torch.zeros(1, 4, 4, 1, 8, dtype=torch.float64), "torch.float64 is not covered"),
        (torch.zeros(1, 4, 4, 1, 161), "head_dim 161 is above 160"),
        (torch.zeros(1, 4, 4, 1, 8, device="meta"), "query is on meta"),
    ],
    ids=["float64", "head_dim", "meta"],
)
def test_refusals(tokens: torch.Tensor, reason: str) -> None:
    with backend("fused"):
        assert reason in explain(window_attention, *[tokens] * 3, 2)
