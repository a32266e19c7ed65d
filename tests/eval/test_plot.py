import json
import math

import pytest
from PIL import Image

from vicinal.__main__ import main
from vicinal.eval.plot import labels, points, smooth


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
    assert "first/run: 3 epochs, best held-out top-1 30.00 % in epoch 3" in out
    assert "second/run: 2 epochs" in out
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
    assert "no records of a run" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), str(tmp_path)]) == 2
