"""vicinal bench ops: the table has every case, and what it compares computes the same."""

import csv
import math
from pathlib import Path

import pytest
import torch

from vicinal.eval import bench, bench_ops
from vicinal.eval.measure import peak_bytes


@pytest.mark.parametrize("op", bench_ops.SHAPES)
def test_table_and_csv(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.csv"
    arguments = ["ops", "--op", op, "--dtype", "bfloat16", "--repeats", "1", "--shapes", "small", "--csv", str(path)]
    assert bench.main(arguments) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    cases = {(row["shape"], row["step"], row["implementation"]) for row in rows}
    shapes = ("2x14x14x2x16", "1x28x28x2x16")
    steps = ("forward", "forward+backward")
    assert cases == {
        (shape, step, name) for shape in shapes for step in steps for name in bench_ops.IMPLEMENTATIONS[op]
    }
    for row in rows:
        values = [float(row[name]) for name in ("cpu_ms", "ratio_to_tiled", "peak_mib")]
        assert all(math.isfinite(value) and value > 0 for value in values)
        assert row["implementation"] != "tiled" or float(row["ratio_to_tiled"]) == 1
    printed = capsys.readouterr().out
    assert "Only ratios inside this table count" in printed
    assert printed.count(op) == len(rows)


@pytest.mark.parametrize("op", bench_ops.SHAPES)
@pytest.mark.parametrize("shape", [(2, 14, 21, 2, 8), (1, 7, 7, 1, 8)], ids=str)
def test_compared_implementations_agree(op: str, shape: tuple[int, ...]) -> None:
    packed, table, grad_output = (tensor.detach().double() for tensor in bench_ops._inputs(shape, torch.float64))
    leaves = packed.requires_grad_(), table.requires_grad_()
    results = {}
    for name, function in bench_ops.IMPLEMENTATIONS[op].items():
        output = function(*leaves)
        results[name] = (output, *torch.autograd.grad(output, leaves, grad_output))
    for result in results.values():
        for pair in zip(result, results["reference"], strict=True):
            torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


def test_peak_counts_what_a_call_holds_at_a_time() -> None:
    def call() -> None:
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8).fill_(0)

    assert peak_bytes(call) == 1 << 20


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["operators"]) == 2
    assert bench.main(["--help"]) == 0
    assert "vicinal bench ops" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["ops", "--repeats", "0"])
