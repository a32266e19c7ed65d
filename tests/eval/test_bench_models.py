"""vicinal bench models: every step of every implementation is in the table."""

import csv
import math
from pathlib import Path

import pytest
import timm

from vicinal.__main__ import main
from vicinal.eval.bench_models import COUNTERPARTS


def test_table_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(COUNTERPARTS, "nat_pico", "test_vit")
    path = tmp_path / "bench.csv"
    options = ["--models", "nat_pico", "davit_pico_vicinal", "--batch-size", "2", "--img-size", "160", "--repeats", "1"]
    assert main(["bench", "models", *options, "--csv", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    expected = {("nat_pico", name) for name in ("ours", "ours, reference kernels", "timm")}
    expected |= {("davit_pico_vicinal", name) for name in ("ours", "ours, reference kernels")}
    cases = {(row["model"], row["step"], row["implementation"]) for row in rows}
    assert cases == {(model, step, name) for model, name in expected for step in ("inference", "training")}
    for row in rows:
        assert all(float(row[key]) > 0 and math.isfinite(float(row[key])) for key in ("cpu_ms", "peak_mib"))
        assert row["image"] == "2x160x160"


def test_counterparts_are_the_same_networks():
    for ours, theirs in COUNTERPARTS.items():
        if timm.is_model(ours):
            sizes = [
                sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) for name in (ours, theirs)
            ]
            assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--models", "davit_tiny_vicinall"], "did you mean davit_tiny_vicinal"), (["--repeats", "0"], "--repeats 0")],
)
def test_wrong_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "models", *options]) == 2
    assert message in capsys.readouterr().err
