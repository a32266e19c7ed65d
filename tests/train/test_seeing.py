"""What a run shows before, while and after it trains."""

import json
import shutil
import sys
import types

import pytest
import timm
import torch
from PIL import Image

from vicinal.__main__ import main
from vicinal.train.dry_run import draw_bars
from vicinal.train.run import screen
from vicinal.train.run.screen import PlainScreen, Progress, TerminalScreen


def test_dry_run_shows_everything_and_leaves_no_run(train, capsys):
    code, folder = train("--dry-run", "--epochs", 4, "--accumulation", 2, "--mixup", 0.2)
    assert code == 0
    out = capsys.readouterr().out
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    for text in (
        f"test_vit, {sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        "multiply-accumulates per image",
        "1,438 training, 359 val, 10 classes",
        "(32, 3, 32, 32) float32 on cpu; targets (32, 10)",
        "32 images x 1 processes x 2 = 64; 22 per epoch",
        "GiB at most",
        "loss 2.",
        "learning rate over 4 epochs: 2.00e-03",
    ):
        assert text in out
    assert not folder.exists()
    picture = folder.with_name("run.schedule.png")
    assert Image.open(picture).size == (840, 360)
    assert train("--epochs", 1)[0] == 0


def test_chart_of_the_schedule_is_as_high_as_its_values():
    top, middle, bottom = draw_bars([0.0, 1.5, 3.0, 3.0], 3)
    assert top == "  ██"
    assert middle == " ▄██"
    assert bottom == " ███"


def test_one_batch_is_learnt_by_heart_or_the_command_fails(train, capsys):
    code, folder = train("--overfit-batch", 60, "--lr", 3e-3, "--mixup", 0.2)
    assert code == 0
    out = capsys.readouterr().out
    assert "one batch of 32 images, 60 updates" in out
    assert not folder.exists()
    assert train("--overfit-batch", 2, "--lr", 1e-9, "--min-lr", 0)[0] == 1
    assert "the network does not learn it" in capsys.readouterr().err


def test_profile_leaves_a_trace_and_a_table(train, capsys):
    code, folder = train("--epochs", 1, "--profile", 3)
    assert code == 0
    assert "profile of 3 updates" in capsys.readouterr().out
    trace = json.loads((folder / "profile.json").read_text())
    assert sum("ProfilerStep" in event.get("name", "") for event in trace["traceEvents"]) >= 3
    assert "aten::" in (folder / "profile.txt").read_text()


PROGRESS = Progress(epoch=2, done=7, total=40, loss=1.25, images_per_second=512.4, seconds_left=93784, memory=3 * 2**29)


def test_plain_lines_come_at_intervals(capsys, monkeypatch):
    lines = PlainScreen(epochs=9)
    lines.advance(PROGRESS)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(screen, "PLAIN_INTERVAL", 0.0)
    lines.advance(PROGRESS)
    expected = "epoch   2/9  update 7/40  loss 1.2500  512 images/s  1 d 2:03:04 left  1.5 GiB\n"
    assert capsys.readouterr().out == expected


def test_terminal_shows_a_bar_with_rates(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    bars = TerminalScreen(epochs=9)
    bars.advance(PROGRESS)
    bars.bars.refresh()
    shown = bars.bars.get_renderable()
    bars.say("cannot read image [x].jpg")
    bars.close()
    assert "[x].jpg" in capsys.readouterr().out
    assert shown is not None
    assert bars.bar is None


def test_records_also_go_to_tensorboard_and_wandb(train, monkeypatch, records):
    """Stand-ins for the two packages, with the calls that ours makes of theirs."""
    scalars, runs = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            scalars.append(("purge", folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def close(self):
            scalars.append("closed")

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.finished = options, [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((values, step))

        def finish(self):
            self.finished = True

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    wandb = types.ModuleType("wandb")
    wandb.init = Run
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    arguments = ("--tensorboard", "--wandb", "project", "--log-interval", 20, "--schedule", "constant")
    _, folder = train("--epochs", 1, *arguments)
    train("--epochs", 2, *arguments, "--resume", "auto")
    assert scalars.count("closed") == 2
    assert [entry for entry in scalars if entry[0] == "purge"] == [
        ("purge", "run/tensorboard", 1),
        ("purge", "run/tensorboard", 45),
    ]
    epochs = [record for record in records(folder) if record["event"] == "epoch"]
    top1 = [entry[1:] for entry in scalars if entry[0] == "epoch/val_top1"]
    assert top1 == [(record["val_top1"], record["step"]) for record in epochs]
    first, second = runs
    assert first.options["id"] == second.options["id"]
    assert first.options["resume"] == "allow"
    assert first.options["config"]["model"]["name"] == "test_vit"
    assert first.finished
    assert [step for _, step in second.logged] == [60, 80, 88]


@pytest.mark.parametrize(("flag", "package"), [(("--tensorboard",), "tensorboard"), (("--wandb", "x"), "wandb")])
def test_missing_package_for_records_is_named(train, monkeypatch, capsys, flag, package):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if package == "tensorboard" else package, None)
    assert train("--epochs", 1, *flag)[0] == 2
    assert f"--{package} needs {package}: pip install 'vicinal[log]'" in capsys.readouterr().err


def test_data_check_reports_classes_counts_and_unreadable_files(jpeg_tree, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(jpeg_tree, root)
    (root / "train" / "red" / "6.jpg").unlink()
    unreadable = root / "train" / "green" / "3.jpg"
    unreadable.write_bytes(unreadable.read_bytes()[:200])
    assert main(["data", "check", str(root), "--json", str(tmp_path / "check.json")]) == 1
    out = capsys.readouterr().out
    assert "train: 23 images in 3 classes" in out
    assert "images per class: 7 (red) to 8 (blue)" in out
    assert f"cannot read image {unreadable}" in out
    assert "val: 15 images in 3 classes" in out
    result = json.loads((tmp_path / "check.json").read_text())
    assert result["train"]["classes"] == {"blue": 8, "green": 8, "red": 7}
    (least, most) = result["val"]["sizes"]
    assert all(40 <= side < 64 for side in least + most)
    assert [len(split["unreadable"]) for split in result.values()] == [1, 0]


def test_data_check_of_good_data_ends_well(jpeg_tree, capsys):
    assert main(["data", "check", str(jpeg_tree)]) == 0
    assert capsys.readouterr().out.count("unreadable: 0") == 2
    assert main(["data", "check", "nowhere"]) == 2
    assert main(["data", "chekc"]) == 2


def test_checkpoints_of_single_epochs_stay_the_newest_of_them(train, jpeg_tree):
    colours = ("--data", jpeg_tree, "--workers", 0, "--batch-size", 8)
    code, folder = train(*colours, "--epochs", 4, "--save-epochs", 1, "--keep", 2)
    assert code == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        *("best", "epoch-0003", "epoch-0004", "last", "previous")
    ]
    state = torch.load(folder / "epoch-0003" / "trainer.pt", weights_only=True)
    assert (state["epoch"], state["position"]) == (3, 0)
    code, again = train(*colours, "--epochs", 4, "--resume", folder / "epoch-0003", output="again")
    assert code == 0
    rows = [(path / "metrics.csv").read_text().splitlines()[1:4] for path in (folder, again)]
    assert rows[0] == rows[1]
