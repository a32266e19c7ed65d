"""How a backend is chosen, forced and explained, shown on a toy operator that has all of them."""

import os
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from vicinal.kernels import backend, explain, window_attention
from vicinal.kernels.checks import check_attention_inputs
from vicinal.kernels.dispatch import OPERATORS, Operator, selected_backend
from vicinal.kernels.examples import Example, Examples

TOKENS = torch.randn(2, 4, 8)


def implementation(factor: float) -> SimpleNamespace:
    """A backend that can be told from the others by its result."""

    def forward(query: Tensor, key: Tensor, value: Tensor, heads: list[int]) -> tuple[Tensor, Tensor]:
        return factor * query, query.sum(-1).float()

    def backward(grad_output: Tensor, output: Tensor, logsumexp: Tensor, needs_gradient: list, *_: object) -> list:
        full = (factor * grad_output, torch.zeros_like(grad_output), torch.zeros_like(grad_output))
        return [gradient for gradient, needed in zip(full, needs_gradient, strict=True) if needed]

    return SimpleNamespace(forward=forward, backward=backward)


FUSED = ModuleType("vicinal_toy_fused")
FUSED.forward, FUSED.backward = vars(implementation(3.0)).values()
FUSED.refuse = lambda query, key, value, heads: "more than 4 heads" if heads[0] > 4 else None


def make_operator(name: str, fused: str | None) -> Operator:
    return Operator(
        name,
        "Tensor query, Tensor key, Tensor value, int[] heads=[1]",
        differentiable=("query", "key", "value"),
        check=lambda query, key, value, heads: check_attention_inputs(
            query, key, value, (3,), "(batch, tokens, channels)"
        ),
        reference=lambda query, key, value, heads: 1.0 * query,
        tiled=implementation(2.0),
        examples=Examples({}, Example, {}),
        keys_per_query=lambda query, key, value, heads: query[1],
        fused=fused,
    )


TOY = make_operator("toy", FUSED.__name__)
MISSING = make_operator("toy_with_missing_package", "vicinal_no_such_package")
for toy in (TOY, MISSING):
    del OPERATORS[toy.name]  # the tests of all operators ask the registry


@pytest.fixture(autouse=True)
def fused_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FUSED.__name__, FUSED)
    for toy in (TOY, MISSING):
        monkeypatch.setitem(OPERATORS, toy.name, toy)
    monkeypatch.delenv("VICINAL_KERNELS", raising=False)


def factor(heads: int = 1) -> float:
    """Which backend ran forward and backward: 1 reference, 2 tiled, 3 fused."""
    query = TOKENS.clone().requires_grad_()
    output = TOY(query, TOKENS, TOKENS, heads)
    (gradient,) = torch.autograd.grad(output.sum(), query)
    forward = (output / query).mean().item()
    assert forward == pytest.approx(gradient.mean().item())
    return round(forward)


@pytest.mark.parametrize(("name", "expected"), [("auto", 3), ("reference", 1), ("tiled", 2), ("fused", 3)])
def test_forced_backend_runs(name: str, expected: int) -> None:
    with backend(name):
        assert factor() == expected


def test_auto_falls_back_to_tiled() -> None:
    assert factor(heads=8) == 2


def test_forced_backend_that_cannot_run_says_why() -> None:
    with backend("fused"), pytest.raises(ValueError, match="backend='fused' cannot run toy: more than 4 heads"):
        factor(heads=8)


def test_a_missing_package_is_a_reason() -> None:
    assert "the package vicinal_no_such_package is not installed" in explain("toy_with_missing_package", *[TOKENS] * 3)
    assert torch.equal(MISSING(TOKENS, TOKENS, TOKENS, 1), 2 * TOKENS)


def test_blocks_nest_and_end_after_an_error() -> None:
    with backend("tiled"):
        with pytest.raises(RuntimeError, match="inside"), backend("reference"):
            raise RuntimeError("inside")
        assert selected_backend() == "tiled"
    assert selected_backend() == "auto"


def overlap(first: str, second: str) -> tuple[list[str], str]:
    """Two blocks in two threads, of which the first ends first.

    Returns:
        what the second thread sees when the first has left, or the error that it meets; and what is selected at last.
    """
    entered, meanwhile, left = (threading.Event() for _ in range(3))
    seen = []

    def outer() -> None:
        with backend(first):
            entered.set()
            assert meanwhile.wait(10)
        left.set()

    def inner() -> None:
        assert entered.wait(10)
        try:
            with backend(second):
                meanwhile.set()
                assert left.wait(10)
                seen.append(selected_backend())
        except RuntimeError as error:
            seen.append(str(error))
        finally:
            meanwhile.set()

    threads = [threading.Thread(target=target) for target in (outer, inner)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen, selected_backend()


def test_blocks_of_two_threads_that_overlap() -> None:
    assert overlap("reference", "reference") == (["reference"], "auto")
    refusal = (
        "backend='tiled' while another thread is in a block with backend='reference': the choice holds for all "
        "threads; put one block around both, or let one end before the other begins"
    )
    assert overlap("reference", "tiled") == ([refusal], "auto")
    with backend("tiled"):
        assert factor() == 2
    assert factor() == 3


def test_equal_blocks_nest_around_another() -> None:
    with backend("reference"), backend("tiled"):
        with backend("reference"):
            assert selected_backend() == "reference"
        assert selected_backend() == "tiled"


def test_a_block_holds_for_other_threads() -> None:
    """As those in which autograd runs the backward on a GPU."""
    found = []
    with backend("tiled"):
        thread = threading.Thread(target=lambda: found.append(factor()))
        thread.start()
        thread.join()
    assert found == [2]


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VICINAL_KERNELS", "reference")
    assert factor() == 1
    with backend("tiled"):
        assert factor() == 2


def test_environment_variable_of_a_process() -> None:
    code = "import torch; from vicinal.kernels import explain; t = torch.zeros(1, 2, 2, 1, 4)"
    code += "; print(explain('window_attention', t, t, t, 2))"
    environment = {**os.environ, "VICINAL_KERNELS": "reference"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("window_attention: reference, because it is forced")


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='triton' is not a backend; use one of auto, reference, tiled, fused"):
        backend("triton").__enter__()
    monkeypatch.setenv("VICINAL_KERNELS", "cuda")
    with pytest.raises(ValueError, match="VICINAL_KERNELS='cuda' is not a backend"):
        factor()


@pytest.mark.parametrize(
    ("name", "heads", "expected"),
    [
        ("auto", 1, "toy: fused"),
        ("auto", 8, "toy: tiled\nfused: more than 4 heads"),
        ("fused", 1, "toy: fused"),
        ("fused", 8, "toy: no backend, because fused is forced\nfused: more than 4 heads"),
        ("tiled", 1, "toy: tiled, because it is forced\nfused: another backend is forced"),
        ("tiled", 8, "toy: tiled, because it is forced\nfused: more than 4 heads"),
        (
            "reference",
            1,
            "toy: reference, because it is forced\ntiled: another backend is forced\nfused: another backend is forced",
        ),
    ],
)
def test_explain(name: str, heads: int, expected: str) -> None:
    with backend(name):
        assert explain("toy", TOKENS, TOKENS, TOKENS, heads=heads) == expected


def test_explain_takes_the_function_or_its_name() -> None:
    tokens = torch.zeros(1, 4, 4, 1, 8)
    expected = "window_attention: tiled\nfused: query is on cpu; Triton kernels run on GPUs"
    expected += " (on the CPU under TRITON_INTERPRET=1)"
    assert explain(window_attention, tokens, tokens, tokens, 2, shift=1) == expected
    assert explain("window_attention", tokens, tokens, tokens, window_size=(2, 2)) == expected


def test_explain_refuses_what_the_operator_refuses() -> None:
    tokens = torch.zeros(1, 4, 4, 1, 8)
    with pytest.raises(ValueError, match="must divide the height 4"):
        explain(window_attention, tokens, tokens, tokens, 3)
    with pytest.raises(ValueError, match="op='dense_attention' is not an operator"):
        explain("dense_attention", tokens)
    with pytest.raises(TypeError, match="window_size"):
        explain(window_attention, tokens, tokens, tokens)


@pytest.mark.parametrize("name", ["reference", "tiled", "fused", "auto"])
def test_errors_are_the_same_on_every_backend(name: str) -> None:
    with backend(name), pytest.raises(ValueError, match=r"key has shape \(1, 4, 8\); it must be \(2, 4, 8\)"):
        TOY(TOKENS, TOKENS[:1], TOKENS, 1)


def test_float16_reaches_the_backend_as_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = TOY.tiled.forward
    monkeypatch.setattr(TOY.tiled, "forward", lambda *args: seen.extend(x.dtype for x in args[:3]) or forward(*args))
    half = TOKENS.half()
    with backend("tiled"):
        assert TOY(half, half, half, 1).dtype == torch.float16
    assert seen == [torch.float32] * 3
