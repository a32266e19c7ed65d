import json
import math

import pytest
from PIL import Image

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.eval.plot import choose_points, draw_curves, labels, points, read_run, smooth


@pytest.fixture
def run(tmp_path):
    """Write the records of a run of three epochs of ten updates."""

    def write(name, epochs=3):
        lines = []
        for step in range(1, epochs * 10 + 1):
            lines.append(
                {"event": "step", "epoch": (step - 1) // 10 + 1, "step": step, "lr": 0.1, "train_loss": 1 / step}
            )
            if step % 10 == 0:
                values = {"train_loss": 0.1, "val_loss": 2 / step, "val_top1": step, "lr": 0.1}
                lines.append({"event": "epoch", "epoch": step // 10, "step": step, **values})
        lines.append({"event": "skipped", "epoch": epochs, "step": epochs * 10, "train_loss": "nan"})
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def test_several_runs_in_one_picture(run, tmp_path, capsys):
    paths = [run("first/run"), run("second/run", epochs=2)]
    picture = tmp_path / "out.png"
    assert main(["plot", *map(str, paths), "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "first/run: 3 epochs, best val top-1 30.00 % in epoch 3" in out
    assert "second/run: 2 epochs, best val top-1 20.00 % in epoch 2" in out
    assert Image.open(picture).size == (1440, 840)


def test_updates_lie_at_fractions_of_epochs(run):
    records = [json.loads(line) for line in (run("run") / "metrics.jsonl").read_text().splitlines()]
    epochs, losses = points(records, "train_loss")
    assert epochs[:2] == [0.1, 0.2]
    assert losses[-1] == 1 / 30
    assert points(records, "val_top1") == ([1, 2, 3], [10, 20, 30])


def test_smoothing_keeps_a_constant_and_weighs_recent_values_more():
    assert smooth([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    # Weights 0.1 and 0.09, by hand.
    assert smooth([0.0, 1.0], 0.9)[1] == pytest.approx(0.1 / 0.19)
    assert math.isclose(smooth([3.0], 0.98)[0], 3.0)


def test_labels_are_as_short_as_they_can_be():
    assert labels(["runs/a", "other/b"]) == ["a", "b"]
    assert labels(["x/run", "y/run/"]) == ["x/run", "y/run"]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["plot"]) == 2
    assert main(["plot", str(tmp_path)]) == 2
    assert "metrics.jsonl is not that of a run: it is missing or empty" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), str(tmp_path)]) == 2


def test_lines_that_are_no_records_are_counted(run, capsys):
    folder = run("run", epochs=1)
    records = read_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"event": "st')
    assert read_run(folder) == records
    assert capsys.readouterr().err == f"note: {folder}: 1 lines of metrics.jsonl are no records and are left out\n"


SIGNATURES = {
    "png": b"\x89PNG",
    "svg": b"<?xml",
    "pdf": b"%PDF",
    "jpg": b"\xff\xd8\xff",
    "webp": b"RIFF",
    "PNG": b"\x89PNG",
}


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_the_suffix_chooses_the_format(run, tmp_path, suffix):
    picture = draw_curves({"run": read_run(run("run", epochs=1))}, tmp_path / f"x.{suffix}")
    assert picture.read_bytes().startswith(SIGNATURES[suffix])


@pytest.mark.parametrize("name", ["x", "x.gif", "x.txt", "x.png.tar"])
def test_other_suffixes_are_refused(run, tmp_path, name, capsys):
    folder = run("run", epochs=1)
    assert main(["plot", str(folder), "--output", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}: the suffix chooses the format; use one of .png, .svg, .pdf" in line
    assert not (tmp_path / name).exists()


def test_runs_of_one_picture_are_drawn_alike(run, tmp_path, monkeypatch):
    """One of them has 110 updates, which are smoothed, and the other 20."""
    drawn = {}
    monkeypatch.setattr(
        "vicinal.eval.plot._draw_curve", lambda axes, *curve: drawn.setdefault(axes, []).append(curve[-1])
    )
    runs = {"long": read_run(run("long", epochs=11)), "short": read_run(run("short", epochs=2))}
    draw_curves(runs, tmp_path / "x.png")
    assert list(drawn.values()) == [[True, True], *[[False, False]] * 3]
    drawn.clear()
    draw_curves({"edge": read_run(run("edge", epochs=10))}, tmp_path / "x.png")
    assert list(drawn.values()) == [[False]] * 4


def test_runs_without_updates_are_compared_by_epoch(run):
    by_update, by_epoch = read_run(run("a", epochs=2)), read_run(run("b", epochs=3))
    by_epoch = [record for record in by_epoch if record["event"] == "epoch"]
    assert choose_points({"a": by_update, "b": by_epoch}, "train_loss") == {
        "a": ([1, 2], [0.1, 0.1]),
        "b": ([1, 2, 3], [0.1, 0.1, 0.1]),
    }
    assert len(choose_points({"a": by_update}, "train_loss")["a"][0]) == 20
    first = [record for record in by_update if record["event"] == "step"][:5]
    assert choose_points({"new": first, "b": by_epoch}, "train_loss")["new"][0] == [1, 2, 3, 4, 5]


def test_python_refuses_what_cannot_be_drawn(run, tmp_path):
    for factor in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"factor={factor} must lie in \[0, 1\)"):
            smooth([1.0], factor)
    assert smooth([1.0, 3.0], 0.0) == [1.0, 3.0]
    with pytest.raises(ValueError, match="paths is empty"):
        labels([])
    with pytest.raises(ValueError, match="runs is empty"):
        draw_curves({}, tmp_path / "x.png")


@pytest.mark.parametrize(
    "line", ['{"event": "epoch"}', "[1]", "{}", '{"event": "step", "step": 1, "epoch": 1, "lr": null}']
)
def test_records_of_something_else(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=f"{tmp_path}: metrics.jsonl is not that of a run"):
        read_run(tmp_path)
