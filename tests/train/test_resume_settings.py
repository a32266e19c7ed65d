"""What a resumed run is held against, and what of its settings takes effect: said, done, and only then written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from launch import assert_identical, weights
from PIL import Image

from vicinal.errors import UserError
from vicinal.train import loop
from vicinal.train.config import SECTIONS, TrainConfig
from vicinal.train.recipe import as_plain, read_recipe
from vicinal.train.run import resume
from vicinal.train.run.folder import RunFolder, find_best, find_damage, read_facts
from vicinal.train.update import Updater


@pytest.fixture
def run(train, jpeg_tree):
    """Runs of two updates an epoch; returns (exit code, folder)."""
    arguments = ("--data", jpeg_tree, "--workers", 0, "--batch-size", 12, "--schedule", "constant", "--save-epochs", 1)
    return lambda *more, **options: train(*arguments, *more, **options)


def test_every_option_is_free_effective_or_fixed():
    """A new option of the configuration has to be decided."""
    for section, kind in SECTIONS.items():
        decided = [name for table in (resume.FREE, resume.EFFECTIVE, resume.FIXED) for name in table.get(section, ())]
        names = [field.name for field in dataclasses.fields(kind)]
        assert sorted(decided) == sorted(set(names) - ({"name"} if section == "data" else set())), section


REFUSED = {
    ("--seed", 5): "--seed 5 (was 0)",
    ("--optimizer", "sgd"): "--optimizer sgd (was adamw)",
    ("--optimizer", "nadamw"): "--optimizer nadamw (was adamw)",
    ("--layer-decay", 0.5): "--layer-decay 0.5 (was None)",
    ("--weight-decay", 0): "--weight-decay 0.0 (was 0.05) groups the weights otherwise",
    ("--optimizer-kwargs", "amsgrad=true"): "--optimizer-kwargs amsgrad changes what the optimizer keeps",
    ("--optimizer-kwargs", "no_such=0.5"): "no_such",
    ("--mean", 0.1, 0.1, 0.1): "--mean [0.1, 0.1, 0.1] (was None)",
    ("--repeats", 2): "--repeats 2 (was 1)",
    ("--split-seed", 1): "--split-seed 1 (was 0)",
    ("--model", "test_vit2"): "--model test_vit2 (was test_vit)",
    ("--model-kwargs", "depth=5"): "--model-kwargs {'depth': 5} (was {})",
    ("--weights", "run"): "--weights run (was None)",
    ("--ema-decay", 0.9): "saved without an average; leave out --ema-decay",
}


@pytest.fixture
def first(run):
    code, folder = run("--epochs", 1, output="run")
    assert code == 0
    return folder


def test_what_makes_it_another_run_is_refused(run, first, capsys):
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and path.name != ".lock"}
    for flags, message in REFUSED.items():
        capsys.readouterr()
        assert run("--epochs", 2, "--resume", "auto", *flags, output="run")[0] == 2, flags
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
        after = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and path.name != ".lock"}
        assert after == before, flags


def test_fewer_epochs_than_are_done_are_refused(run, capsys):
    run("--epochs", 2, output="run")
    capsys.readouterr()
    assert run("--epochs", 1, "--resume", "auto", output="run")[0] == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --epochs 1: ")
    assert "has done 2 already" in line


def other_tree(jpeg_tree, tmp_path, kind):
    root = tmp_path / "other"
    if kind in ("other pixels", "one image less", "labels swapped"):
        shutil.copytree(jpeg_tree, root)
    if kind == "renamed class":
        shutil.copytree(jpeg_tree, root)
        for split in ("train", "val"):
            (root / split / "blue").rename(root / split / "zebra")
    elif kind == "other pixels":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / "train" / "blue" / "0.jpg")
    elif kind == "one image less":
        (root / "train" / "blue" / "0.jpg").unlink()
    elif kind == "labels swapped":
        (root / "train" / "blue" / "7.jpg").rename(root / "train" / "green" / "9.jpg")
    return root


MESSAGES = {
    "renamed class": "--data has class 0 is 'green', not 'blue'",
    "other pixels": "has other training images than",
    "one image less": "--data has 23 training images (was 24)",
    "labels swapped": "training images of other classes than before",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_other_data_is_refused(run, first, jpeg_tree, tmp_path, capsys, kind):
    root = other_tree(jpeg_tree, tmp_path, kind)
    capsys.readouterr()
    assert run("--epochs", 2, "--resume", "auto", "--data", root, output="run")[0] == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert MESSAGES[kind] in line
    assert read_recipe(first / "config.yaml")["data"].name == str(jpeg_tree)


def test_data_that_moved_goes_on_the_same(run, first, jpeg_tree, tmp_path, capsys, records):
    _, whole = run("--epochs", 2, output="whole")
    shutil.copytree(jpeg_tree, tmp_path / "moved")
    capsys.readouterr()
    code, parts = run("--epochs", 2, "--resume", "auto", "--data", tmp_path / "moved", output="run")
    assert code == 0
    assert f"--data {tmp_path / 'moved'} (was {jpeg_tree}; the same images)" in capsys.readouterr().out
    assert_identical(weights(parts), weights(whole))
    assert records(parts) == records(whole)


def adamw(parameter, gradient, state, lr, weight_decay, betas, eps=1e-8):
    """One update of AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in float64."""
    mean, square, step = (state[key].double() for key in ("exp_avg", "exp_avg_sq", "step"))
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    corrected = mean / (1 - betas[0] ** (step + 1)), square / (1 - betas[1] ** (step + 1))
    return parameter * (1 - lr * weight_decay) - lr * corrected[0] / (corrected[1].sqrt() + eps)


@pytest.mark.parametrize(
    ("flags", "weight_decay", "betas", "lr"),
    [
        (("--weight-decay", 0.9), 0.9, (0.9, 0.999), 2e-3),
        (("--optimizer-kwargs", "betas=[0.5,0.8]"), 0.05, (0.5, 0.8), 2e-3),
        (("--lr", 0.01), 0.05, (0.9, 0.999), 0.01),
    ],
    ids=["weight decay", "betas", "learning rate"],
)
def test_changed_options_of_the_optimizer_take_effect(run, first, capsys, monkeypatch, flags, weight_decay, betas, lr):
    """The first update after the resume, against AdamW's formula with the new options on the old state."""
    saved = torch.load(first / "last" / "trainer.pt", weights_only=True)["optimizer"]
    before, seen = weights(first), []
    step = torch.optim.AdamW.step

    def note(optimizer, *given):
        groups = optimizer.param_groups
        gradients = [parameter.grad.double().clone() for group in groups for parameter in group["params"]]
        result = step(optimizer, *given)
        seen.append(
            (gradients, [parameter.detach().double().clone() for group in groups for parameter in group["params"]])
        )
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    capsys.readouterr()
    assert run("--epochs", 2, "--resume", "auto", *flags, output="run")[0] == 0
    assert f"from here on: {flags[0]} " in (out := capsys.readouterr().out)
    assert "--epochs 2 (was 1)" in out
    gradients, after = seen[0]
    by_shape = {value.numel(): value for value in before.values()}
    number = max(range(len(after)), key=lambda index: after[index].numel())
    start = by_shape[after[number].numel()].double()
    expected = adamw(start, gradients[number], saved["state"][number], lr, weight_decay, betas)
    # One update of float32 weights below 1: roundings of 6e-8, and of the step of about lr.
    torch.testing.assert_close(after[number], expected, rtol=0, atol=3e-7)
    assert read_recipe(first / "config.yaml")["schedule"].epochs == 2


def test_resume_into_another_folder_brings_the_best_model_along(run, monkeypatch, capsys):
    """The second epoch is worse: best/ is the first one's, in the new folder too."""
    accuracies(monkeypatch, 50.0, 40.0)
    _, first = run("--epochs", 1, output="first")
    capsys.readouterr()
    code, second = run("--epochs", 2, "--resume", first, output="second")
    assert code == 0
    out = capsys.readouterr().out
    assert "(best 50.00 % in epoch 1)" in out
    assert f"checkpoint: {second.name}/best" in out
    assert_identical(weights(second, "best"), weights(first, "best"))
    assert find_damage(second / "best") is None
    assert read_facts(second / "best") == {"epoch": 1}


def accuracies(monkeypatch, *values):
    """Let evaluation find these, one after the other."""
    given = iter(values)
    result = {"loss": 1.0, "top5": 100.0, "images": 6}
    monkeypatch.setattr(loop, "evaluate", lambda *_: {**result, "top1": next(given)})


def test_of_two_equal_epochs_the_first_is_the_best(run, monkeypatch, capsys):
    accuracies(monkeypatch, 50.0, 50.0)
    _, folder = run("--epochs", 2)
    assert "(best 50.00 % in epoch 1)" in capsys.readouterr().out
    assert_identical(weights(folder, "best"), weights(folder, "epoch-0001"))
    progress = torch.load(folder / "last" / "trainer.pt", weights_only=True)
    assert (progress["best_epoch"], progress["best_top1"], progress["top1"]) == (1, 50.0, 50.0)


class Killed(BaseException):
    """Ends the run at a point, as a kill would: nothing catches it."""


PLACES = [
    "before best/ is written",
    "best/ half written",
    "before best/ is listed",
    "old best/ away, new one not there",
]


def kill_at(monkeypatch, place):
    """Die inside the writing of the second best/."""
    count = iter(range(100))

    def die(*_, **__):
        raise Killed

    replace = RunFolder.replace

    def replace_or_die(folder, name, write, *more):
        if name != "best" or next(count) != 1:
            return replace(folder, name, write, *more)
        if place == "before best/ is written":
            die()
        if place == "best/ half written":
            return replace(folder, name, lambda path: ((path / "config.json").touch(), die()), *more)
        if place == "before best/ is listed":
            monkeypatch.setattr(RunFolder, "_list_files", die)
        else:
            monkeypatch.setattr(
                RunFolder, "_swap", lambda run, _, target: (target.rename(run.path / ".best.old"), die())
            )
        return replace(folder, name, write, *more)

    monkeypatch.setattr(RunFolder, "replace", replace_or_die)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_dies_between_last_and_best_loses_nothing(run, monkeypatch, capsys, place):
    """The second epoch is the best, the third is not; the process dies while it writes the second one's best/."""
    _, whole = run("--epochs", 3, output="never")  # the same weights, whatever evaluation finds
    expected = weights(whole, "epoch-0002")
    with monkeypatch.context() as patch:
        accuracies(patch, 30.0, 60.0)
        kill_at(patch, place)
        with pytest.raises(Killed):
            run("--epochs", 3, output="parts")
    parts = whole.with_name("parts")
    folder, note = find_best(parts)
    assert folder == parts / "last"
    assert "is not of the best epoch, 2" in note
    assert_identical(weights(parts), expected)
    accuracies(monkeypatch, 40.0)
    capsys.readouterr()
    assert run("--epochs", 3, "--resume", "auto", output="parts")[0] == 0
    assert "(best 60.00 % in epoch 2)" in capsys.readouterr().out
    assert_identical(weights(parts, "best"), expected)
    assert find_damage(parts / "best") is None
    assert find_best(parts) == (parts / "best", None)
    assert not list(parts.glob(".best.*"))


@pytest.mark.parametrize("damage", ["gone", "changed", "another epoch's"])
def test_a_best_model_that_is_lost_is_sought_anew(run, monkeypatch, capsys, damage):
    """The first epoch is the best; best/ is lost after the second, which takes its place, and says so."""
    accuracies(monkeypatch, 60.0, 50.0, 55.0)
    _, folder = run("--epochs", 2)
    if damage == "gone":
        shutil.rmtree(folder / "best")
    elif damage == "changed":
        (folder / "best" / "model.safetensors").write_bytes(b"no weights")
    else:
        manifest = json.loads((folder / "best" / "manifest.json").read_text())
        (folder / "best" / "manifest.json").write_text(json.dumps({**manifest, "facts": {"epoch": 7}}))
    capsys.readouterr()
    assert run("--epochs", 3, "--resume", "auto")[0] == 0
    out = capsys.readouterr().out
    assert "best is not the model of epoch 1: the best is sought anew" in out
    assert "(best 55.00 % in epoch 3)" in out
    assert_identical(weights(folder, "best"), weights(folder, "epoch-0003"))


def test_inside_an_epoch_the_best_model_is_not_the_one_at_hand(run, after_first_step, monkeypatch, capsys):
    """best/ of the first epoch is lost while the second one runs: the second one's takes its place at its end."""
    accuracies(monkeypatch, 60.0, 50.0)
    _, folder = run("--epochs", 1, "--save-interval", 1)
    after_first_step()
    code, _ = run("--epochs", 2, "--save-interval", 1, "--resume", "auto")
    assert code == 75
    assert read_facts(folder / "last") == {"epoch": 1, "position": 12, "best_epoch": 1}
    shutil.rmtree(folder / "best")
    assert "is not there" in find_best(folder)[1]  # nor is last/, inside the second epoch, the best model
    capsys.readouterr()
    assert run("--epochs", 2, "--save-interval", 1, "--resume", "auto")[0] == 0
    out = capsys.readouterr().out
    assert "best is not the model of epoch 1: the best is sought anew" in out
    assert "(best 50.00 % in epoch 2)" in out
    assert_identical(weights(folder, "best"), weights(folder, "epoch-0002"))


@pytest.fixture
def after_first_step(monkeypatch):
    """Once called, let the next run be told to end after its first update."""

    def arm():
        updates = Updater.run

        def stop(updater, *given):
            monkeypatch.setattr(Updater, "run", updates)
            updater.should_stop = lambda: True
            return updates(updater, *given)

        monkeypatch.setattr(Updater, "run", stop)

    return arm


def test_a_stream_of_the_same_images_is_another_order():
    images = {"count": 3, "labels": "digest", "pixels": "digest"}
    plain = as_plain(dataclasses.asdict(TrainConfig()))
    saved = {"config": plain, "classes": ["a"], "training images": images, "val images": images}
    assert resume.hold_against(saved, saved, "--resume run") == []
    streamed = {**plain, "data": {**plain["data"], "name": "wds/digits"}}
    own = {**saved, "config": streamed, "training images": {**images, "labels": None}}
    with pytest.raises(UserError, match=r"--data wds/digits \(was digits\): a stream has an order of its own"):
        resume.hold_against(saved, own, "--resume run")
