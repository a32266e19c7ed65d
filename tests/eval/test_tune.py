"""The launch table is retuned: which candidates are tried, what is chosen, and how the table is written."""

from pathlib import Path

import pytest
import torch

from vicinal.eval.bench import tune
from vicinal.eval.bench.kernel_table import Resources, record_case
from vicinal.kernels import launch
from vicinal.kernels.launch import Parameters

ROW = tune.Row("window_forward_whole", 2, 32)
BUSY, IDLE = Resources(64, 0, 1024, 8, 0.5), Resources(255, 0, 1024, 8, 0.125)


def run(path: Path) -> dict:
    scope: dict = {}
    exec(path.read_text(encoding="utf-8"), scope)
    return scope["TABLE"]


def test_every_kernel_of_the_table_has_a_case_and_candidates() -> None:
    assert tune.tunable() == list(launch.TABLE["hopper"])
    for kernel in tune.tunable():
        blocks = {parameters.block for parameters in tune.candidates(kernel)}
        assert blocks == ({64} if kernel.endswith("_whole") else {64, 32, 16})


@pytest.mark.parametrize("kernel", tune.tunable())
def test_a_candidate_reaches_its_kernel(kernel: str) -> None:
    parameters = Parameters(64, 2, 7)
    for case in tune.cases_of(kernel):
        with launch.replace({kernel: parameters}):
            launches = record_case(case, 32, torch.bfloat16, "hopper")
        found = launches[kernel.partition("_")[2]].parameters
        assert found.stages == parameters.stages
        # small regions lower the block, and with it the warps
        assert found.warps == parameters.warps or kernel.startswith("routed")
        assert all(
            started.parameters.stages != parameters.stages
            for started in record_case(case, 32, torch.bfloat16, "hopper").values()
        )


def test_occupancy_counts_until_it_is_enough() -> None:
    small, large = Parameters(32, 4, 1), Parameters(64, 4, 1)
    assert tune.choose(ROW, {small: BUSY, large: IDLE}, timed=False) == small
    assert tune.choose(ROW, {small: BUSY, large: BUSY}, timed=False) == large
    assert tune.choose(ROW, {}, timed=False) is None


def test_the_fastest_is_chosen_where_times_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "seconds_of", lambda row, parameters: {32: 2.0, 64: 1.0}[parameters.block])
    survivors = {Parameters(32, 4, 1): BUSY, Parameters(64, 4, 1): IDLE}
    assert tune.choose(ROW, survivors, timed=True) == Parameters(64, 4, 1)


def test_candidates_are_compiled_within_the_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = tune.compile_candidate("hopper", ROW, Parameters(64, 8, 1))
    assert found.spilled == 0
    tiny = tune.ARCHITECTURES["hopper"].__class__(90, 1024, 2048, 64)
    monkeypatch.setitem(tune.ARCHITECTURES, "hopper", tiny)
    assert tune.compile_candidate("hopper", ROW, Parameters(64, 8, 1)) is None


def test_the_table_is_written_with_the_choices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "compile_candidate", lambda architecture, row, parameters: BUSY)
    path = tmp_path / "table.py"
    arguments = ["--kernels", ROW.kernel, "--head-dims", "32", "--element-sizes", "2", "--processes", "1"]
    assert tune.main([*arguments, "--output", str(path)]) == 0
    table = run(path)
    assert table["hopper"][ROW.kernel][2][32] == (64, 4, 1)
    table["hopper"][ROW.kernel][2][32] = launch.TABLE["hopper"][ROW.kernel][2][32]
    assert table == launch.TABLE
    assert "window_forward_whole 2 32" in capsys.readouterr().out
    assert main_without_time(path) == launch.TABLE


def main_without_time(path: Path) -> dict:
    assert tune.main(["--seconds", "-1", "--processes", "1", "--output", str(path)]) == 0
    return run(path)


def test_the_table_in_the_repository_is_as_the_script_writes_it() -> None:
    assert tune.TABLE_FILE.read_text(encoding="utf-8") == tune.format_table(launch.TABLE)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels=\['window'\] are not in the launch table; use of window_forward"):
        tune.TuneOptions(kernels=("window",))
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        tune.TuneOptions(processes=0)
