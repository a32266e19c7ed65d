"""vicinal bench ops: the table has every case, and what it compares computes the same."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vicinal.errors import UserError
from vicinal.eval.bench import command, ops, ops_cases
from vicinal.eval.bench.measure import peak_bytes


@pytest.mark.parametrize("op", ops_cases.EAGER)
def test_table_and_csv(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.csv"
    arguments = ["ops", "--op", op, "--dtype", "bfloat16", "--repeats", "1", "--shapes", "small", "--csv", str(path)]
    assert command.main(arguments) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    cases = {(row["shape"], row["step"], row["implementation"]) for row in rows}
    shapes = ["x".join(map(str, shape)) for shape in ops.shapes_of(op, "small")]
    implementations = ("tiled", "reference", "eager")  # fused refuses the CPU
    assert cases == {(shape, step, name) for shape in shapes for step in ops.STEPS for name in implementations}
    for row in rows:
        values = [float(value) for name, value in row.items() if name.startswith(("ms", "ratio", "peak", "floor"))]
        assert len(values) == 6
        assert all(math.isfinite(value) and value >= 0 for value in values)
        assert row["implementation"] != "tiled" or float(row["ratio_to_tiled"]) == 1
    printed = capsys.readouterr().out
    assert "Only ratios inside this table count" in printed
    assert printed.count(op) == len(rows)


@pytest.mark.parametrize("op", ops_cases.EAGER)
def test_compared_implementations_agree(op: str) -> None:
    shapes = [(2, 14, 21, 2, 8), (1, 7, 7, 1, 8)] if "window" in op or "neigh" in op else ops.shapes_of(op, "small")
    for shape in shapes:
        problem = ops_cases.make_problem(op, shape, torch.float64)
        leaves = [leaf.detach().double().requires_grad_() for leaf in problem.leaves]
        results = {}
        for name in ("tiled", "reference", "eager"):
            output = problem.implementations[name](*leaves)
            results[name] = (output, *torch.autograd.grad(output, leaves, problem.grad_output))
        for result in results.values():
            for pair in zip(result, results["reference"], strict=True):
                torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mask", "op"),
    [(ops_cases._window_mask, "window_attention"), (ops_cases._neighborhood_mask, "neighborhood_attention")],
    ids=["window", "neighborhood"],
)
def test_flex_attention_expresses_the_operator(mask: Callable, op: str) -> None:
    """Not compiled, and without gradients: on the CPU it has none."""
    problem = ops_cases.make_problem(op, (1, 14, 21, 2, 16), torch.float32)
    leaves = [leaf.detach() for leaf in problem.leaves]
    actual = ops_cases.flex_over_map(mask, flex_attention, *leaves)
    expected = problem.implementations["reference"](*leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_flex_attention_is_measured_forward(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    arguments = ["--op", "window_attention", "--dtype", "float32", "--repeats", "1", "--shapes", "small", "--flex"]
    assert command.main(["ops", *arguments, "--csv", str(path)]) == 0
    with path.open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["implementation"] == "flex"]
    assert steps == ["forward"] * 2


def test_floors_are_those_of_the_shape() -> None:
    """Swin-T's first stage in bfloat16: four maps of 77 MB forward, seven backward, as the packed projection counts."""
    problem = ops_cases.make_problem("window_attention", (2, 56, 56, 3, 32), torch.bfloat16)
    one_map, table = 2 * 56 * 56 * 96 * 2, 3 * 13 * 13 * 4
    product = 2 * 2 * 56 * 56 * 96 * 49
    assert problem.floor("forward") == (4 * one_map + table, 2 * product)
    assert problem.floor("backward") == (7 * one_map + 2 * table, 5 * product)
    assert problem.floor("forward+backward") == (11 * one_map + 3 * table, 7 * product)


def test_peak_counts_what_a_call_holds_at_a_time() -> None:
    def call() -> None:
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8).fill_(0)

    assert peak_bytes(call) == 1 << 20


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    assert "vicinal bench ops" in capsys.readouterr().out
    for arguments, message in {
        ("--repeats", "0"): "--repeats 0: must be at least 1",
        ("--op", "window"): "--op window: must be one of all, neighborhood_attention, window_attention",
        ("--without", "refrence"): "--without refrence: .* did you mean reference?",
        ("--csv", "times.json"): "--csv times.json: .*; give times.csv",
        **({} if torch.cuda.is_available() else {("--device", "cuda"): "--device cuda: torch finds no GPU here"}),
    }.items():
        with pytest.raises(UserError, match=message):
            command.main(["ops", *arguments])
    for benchmark in ("opps", "operators"):
        with pytest.raises(UserError, match=f"unknown benchmark '{benchmark}'; did you mean ops"):
            command.main([benchmark])
