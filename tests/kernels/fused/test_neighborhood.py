"""Fused neighborhood attention: outputs and every gradient against the definition, on maps of one to three axes."""

import random
from dataclasses import replace

import pytest
import torch
from operator_testing import LAYOUTS, describe, run_with_gradients, subsets, sweep
from test_neighborhood_attention import CORNERS, TENSORS, Case, assert_accurate, draw, ids, operator, oracle

from vicinal.kernels import backend, neighborhood_attention
from vicinal.kernels.neighborhood import fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = [
    Case((7, 7), 7, batch=1),  # the kernel covers the map
    Case((8, 9), 7, batch=1, dim=40),  # one larger than the kernel, one more than a tile
    Case((9, 9), 3, dilation=3, batch=1, heads=1),  # kernel * dilation is the map
    Case((7, 10), 3, dilation=(2, 3), batch=1, heads=1, dim=24),  # groups of two lengths
    Case((9, 10), (4, 2), batch=1, dim=24),  # even kernels
    Case((8, 8), 4, stride=4, batch=1),  # non-overlapping windows
    Case((17, 9), 5, stride=(2, 3), batch=1, heads=1),  # strides that do not divide the map
    Case((10, 9), 5, stride=(2, 5), dilation=(2, 1), causal=(True, False), batch=1, heads=1),
    Case((2, 40), (2, 7), batch=1),
    Case((65,), 7, batch=1),
    Case((70,), 6, stride=4, dilation=3, causal=True, batch=1),
    Case((4, 5, 6), (2, 3, 1), stride=(1, 2, 1), causal=(False, True, False), batch=1, heads=1),
]


@pytest.mark.parametrize("case", ids(SPECIAL))
def test_special_shapes(case: Case) -> None:
    assert_accurate(case, "fused")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ids([SPECIAL[1], SPECIAL[3]]))
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_accurate(replace(case, dtype=dtype), "fused")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    assert_accurate(Case((5, 6), 3, layout=layout, heads=1), "fused")


@pytest.mark.parametrize("case", sweep(draw, 5, seed=5))
def test_random_cases(case: Case) -> None:
    assert_accurate(replace(case, batch=1, heads=2), "fused")


@pytest.mark.parametrize(
    "case",
    ids(
        [
            Case((4, 6), (3, 2), dilation=(1, 2), batch=1, heads=1),
            Case((5, 4), (3, 2), stride=(2, 1), causal=(True, False), batch=1, heads=1),
            Case((19,), 5, batch=2, heads=1),
        ]
    ),
)
def test_gradients_by_the_kernels(case: Case) -> None:
    """Elsewhere only the forward is forced, and the backward is fused on a GPU only: the interpreter takes minutes."""
    with backend("fused"):
        assert_accurate(case, "fused")


def test_the_gradient_of_the_table_takes_some_tiles_and_some_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three tiles two and then one, of three images two in a program and one in another, as on large maps."""
    monkeypatch.setattr(fused, "IMAGES", 2)
    monkeypatch.setattr(fused, "PROGRAMS", 1)
    monkeypatch.setattr(fused, "SCRATCH", 2**15)
    counts = []
    submit = fused._Call.submit

    def spy(call, kernel, *rest, **arguments):
        if kernel is fused.backward_bias_kernel:
            counts.append((arguments["count"], arguments["images"]))
        submit(call, kernel, *rest, **arguments)

    monkeypatch.setattr(fused._Call, "submit", spy)
    case = Case((4, 20), 3, batch=3, heads=1)
    tensors, wanted = case.tensors(), ["relative_position_bias"]
    with backend("fused"):
        found = run_with_gradients(operator(case, "fused"), tensors, wanted)
    expected = run_with_gradients(oracle(case), {name: x.double() for name, x in tensors.items()}, wanted)
    assert counts == [(2, 2), (1, 2)]
    # sums of 240 products of numbers of size one
    torch.testing.assert_close(
        found["grad_relative_position_bias"].double(), expected["grad_relative_position_bias"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CORNERS, *sweep(draw, 150, seed=6)])
def test_many_cases(case: Case) -> None:
    assert_accurate(case, "fused")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 128, 160])
def test_head_dimensions(dim: int, dtype: torch.dtype) -> None:
    assert_accurate(Case((7, 8), 3, dim=dim, heads=1, dtype=dtype), "fused")


@pytest.mark.parametrize("case", ids([SPECIAL[3], SPECIAL[7], SPECIAL[10], SPECIAL[11]]))
def test_deterministic_gradient_of_the_bias(case: Case) -> None:
    tensors = case.tensors()
    first, second = (run_with_gradients(operator(case, "fused"), tensors, TENSORS[3:]) for _ in range(2))
    assert torch.equal(first["grad_relative_position_bias"], second["grad_relative_position_bias"])


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case((5, 5), 3, batch=1, heads=1)
    tensors = case.tensors()
    expected = run_with_gradients(operator(case, "fused"), tensors, TENSORS)
    for name, tensor in run_with_gradients(operator(case, "fused"), tensors, wanted).items():
        assert torch.equal(tensor, expected[name])


def test_expanded_output_gradient() -> None:
    inputs = [torch.randn(1, 5, 5, 1, 8, requires_grad=True) for _ in range(3)]
    with backend("fused"):
        output = neighborhood_attention(*inputs, 3)
        actual = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad(output, inputs, torch.ones(output.shape))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_logsumexp() -> None:
    tensors = Case((5, 6), 3, batch=1).tensors()
    arguments = [tensors[name] for name in TENSORS[:3]]
    with backend("fused"):
        _, actual = torch.ops.vicinal.neighborhood_attention(*arguments, [3])
    with backend("tiled"):
        _, expected = torch.ops.vicinal.neighborhood_attention(*arguments, [3])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_queries_that_see_a_key_are_found_exactly() -> None:
    """The box of queries of a tile of keys must hold all that see it: values of one key at a time reach them all."""
    generator = random.Random(0)
    for _ in range(4):
        kernel = generator.randint(2, 6)
        stride, causal = generator.randint(1, kernel), generator.random() < 0.5
        case = Case((67,), kernel, stride=stride, causal=causal, batch=1, heads=1, bias=False)
        tensors = case.tensors()
        found = run_with_gradients(operator(case, "fused"), tensors, ["value"])
        expected = run_with_gradients(operator(case, "tiled"), tensors, ["value"])
        message = describe(case)
        torch.testing.assert_close(found["grad_value"], expected["grad_value"], rtol=1e-5, atol=1e-5, msg=message)


def test_a_single_key_has_no_gradient() -> None:
    """The softmax of one score is 1: what is left of its gradient is the rounding of two sums that cancel."""
    case = Case((9, 9), 1, bias=False, batch=1, heads=1)
    tensors = case.tensors()
    found = run_with_gradients(operator(case, "fused"), tensors, TENSORS[:3])
    assert torch.equal(found["output"], tensors["value"])
    size = tensors["value"].shape[-1] * max(tensor.abs().max().item() for tensor in tensors.values()) ** 3
    for name in ("grad_query", "grad_key"):
        assert found[name].abs().max() <= 2 * torch.finfo(torch.float32).eps * size
