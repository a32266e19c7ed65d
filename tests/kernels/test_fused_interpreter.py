"""The Triton kernels in Triton's interpreter: tests/kernels/fused, in processes that import triton for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "fused"


def run_folder(name: str, marker: str) -> None:
    command = [sys.executable, "-m", "pytest", str(FOLDER / name), "-m", marker, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # counts only before triton is imported
    result = subprocess.run(
        command, cwd=FOLDER.parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]


FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_selection(name: str) -> None:
    run_folder(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_sweep(name: str) -> None:
    run_folder(name, "slow")
