"""The README's tables of speed are those of the results files."""

import csv
import json
from pathlib import Path

import pytest

from vicinal.eval.bench import performance

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_shows_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert performance.updated(text) == text


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    return tmp_path


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = {"device": "a GPU", "torch": "2", "triton": "3", "date": "today", "command": "vicinal bench"}
    path.with_suffix(".json").write_text(json.dumps(found))


def test_operators(results: Path) -> None:
    case = {"op": "window_attention", "bias": True, "shape": "1x7x7", "step": "forward"}
    times = {"fused": 0.1, "tiled": 0.3, "eager": 0.55}
    write(
        results / "operators",
        [{**case, "implementation": name, "ms": ms, "floor_fraction": 0.5} for name, ms in times.items()],
    )
    assert "| window | 1x7x7 | forward | 100 | 50 % | 3.0 | 5.5 |  |" in performance.section()
    assert "a GPU, torch 2, triton 3, today: `vicinal bench`." in performance.section()


def test_models(results: Path) -> None:
    case = {"model": "nat_tiny", "step": "training", "peak_mib": 2048}
    times = {"ours": 50, "ours, tiled": 100, "ours, tiled, replayed": 90, "ours, replayed": 30}
    times |= {"ours, compiled": 40, "timm, compiled": 60}
    write(
        results / "models",
        [{**case, "implementation": name, "ms": ms, "images_per_second": 1e3 / ms} for name, ms in times.items()],
    )
    assert "| nat_tiny | training | 2.0 | 20 | 2.00 |  | 33 | 3.00 |  | 25 |  | 1.50 |" in performance.section()


def test_a_file_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        performance.updated("# A text")
