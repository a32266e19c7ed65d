"""The numbers that a run keeps and writes down, each against what it must be and not against another run."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from launch import assert_identical, weights
from timm.task import ClassificationTask

from vicinal.checkpoints import save
from vicinal.train.config import DataConfig, TrainConfig
from vicinal.train.data.images import ArrayImages
from vicinal.train.data.transforms import InputSpec, Preprocess, eval_batches
from vicinal.train.evaluate import evaluate
from vicinal.train.run.folder import RunFolder
from vicinal.train.run.randomness import stream_seed
from vicinal.train.run.state import TrainState
from vicinal.train.run.world import World
from vicinal.train.update import Updater

ALONE = World(torch.device("cpu"))
SPEC = InputSpec((8, 8), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


@pytest.fixture
def run(train, jpeg_tree):
    """Runs on 24 images; returns the folder."""

    def call(*arguments, **options):
        code, folder = train("--data", jpeg_tree, "--workers", 0, *arguments, **options)
        assert code == 0
        return folder

    return call


def by_event(records, folder, event):
    return [record for record in records(folder) if record["event"] == event]


def test_the_loss_of_an_epoch_is_the_mean_over_its_batches(run, records):
    """An update of three batches and one of a single one: the first counts three times."""
    folder = run("--batch-size", 6, "--accumulation", 3, "--epochs", 2)
    losses = [record["train_loss"] for record in by_event(records, folder, "step")]
    for epoch, first, second in zip(by_event(records, folder, "epoch"), losses[::2], losses[1::2], strict=True):
        assert epoch["train_loss"] == pytest.approx((3 * first + second) / 4, rel=1e-12)
        assert abs(first - second) > 1e-3  # else the weights would not show


def test_the_schedule_counts_updates_and_records_the_largest_rate(run, records):
    """Two updates an epoch, of two batches each; a decay by layer leaves the classifier the whole rate."""
    flags = ("--batch-size", 6, "--accumulation", 2, "--epochs", 2, "--layer-decay", 0.5, "--min-lr", 1e-4)
    rates = [record["lr"] for record in by_event(records, run(*flags), "step")]
    expected = [1e-4 + (2e-3 - 1e-4) * (1 + math.cos(math.pi * update / 4)) / 2 for update in range(4)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_checkpoints_of_epochs_stay_as_many_as_asked_for(run, tmp_path):
    folder = run("--batch-size", 24, "--epochs", 5, "--save-epochs", 2, "--keep", 1)
    assert sorted(path.name for path in folder.glob("epoch-*")) == ["epoch-0004"]
    other = RunFolder(tmp_path / "many")
    for epoch in (9999, 10000, 998):
        (other.path / f"epoch-{epoch:04d}").mkdir(parents=True)
    other.keep_newest(2)
    assert sorted(path.name for path in other.path.iterdir()) == ["epoch-10000", "epoch-9999"]


def test_the_checkpoint_before_is_that_of_the_epoch_before(run):
    folder = run("--batch-size", 24, "--epochs", 3, "--save-epochs", 1)
    assert_identical(weights(folder, "previous"), weights(folder, "epoch-0002"))
    assert_identical(weights(folder, "last"), weights(folder, "epoch-0003"))


def test_every_batch_of_an_update_draws_its_own_numbers(monkeypatch):
    """What a forward pass draws, against a generator with the seed of (seed, epoch, position, batch, rank)."""
    drawn, forward = [], ClassificationTask.forward

    def note(task, *given):
        drawn.append(float(torch.rand(())))
        return forward(task, *given)

    monkeypatch.setattr(ClassificationTask, "forward", note)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    task = ClassificationTask(model, verbose=False)
    state = TrainState(task, torch.optim.SGD(model.parameters(), lr=0.1))
    spec = SPEC._replace(img_size=(32, 32))
    updater = Updater(TrainConfig(), replace(ALONE, rank=3), state, Preprocess(spec, ALONE.device, 3))
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1])
    updater.run([batch] * 3, (7, 96))
    seeds = [stream_seed("batch", 0, 7, 96, number, 3) for number in range(3)]
    assert drawn == [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds]
    assert len(set(drawn)) == 3


def make_state(seed):
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=2)
    task = ClassificationTask(model, verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0 * (seed + 1))
    return TrainState(task, optimizer, scaler)


def test_a_checkpoint_gives_back_every_number_that_it_was_given(tmp_path, monkeypatch):
    """Values that no default has, in each place; a state that holds others takes all of them over."""
    config = {"optimizer": {"optimizer_kwargs": {}, "weight_decay": 0}, "data": {"name": "x"}}
    monkeypatch.setattr("vicinal.train.run.state.hold_against", lambda *_: ["said"])
    state, other = make_state(0), make_state(1)
    given = {
        "epoch": 3,
        "position": 64,
        "step": 41,
        "loss_sum": 2.5,
        "loss_batches": 7,
        "skips": 2,
        "unreadable": ["a"],
    }
    given |= {"top1": 12.5, "best_top1": 25.0, "best_epoch": 2}
    for name, value in given.items():
        setattr(state, name, value)
    state.settings = other.settings = {"config": config}
    for kind, number in (("weights", 0.25), ("average", 0.75)):
        module = state.task.get_trainable_module(ema=kind == "average")
        module = getattr(module, "module", module)
        for tensor in module.state_dict().values():
            tensor.copy_(torch.full_like(tensor, number))
    for parameter in state.model.parameters():
        state.optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 0.5)
    (tmp_path / "last").mkdir()
    state.prepare(ALONE)(tmp_path / "last")
    assert other.restore(tmp_path / "last", ALONE) == ["said"]
    assert {name: getattr(other, name) for name in given} == given
    for average, number in ((False, 0.25), (True, 0.75)):
        for name, tensor in other.weights(average).items():
            assert (tensor == torch.full_like(tensor, number)).all(), name
    assert all((entry["momentum_buffer"] == 0.5).all() for entry in other.optimizer.state.values())
    assert len(other.optimizer.state) == len(list(other.model.parameters()))
    assert other.scaler.get_scale() == 8.0
    assert other.facts() == {"epoch": 3, "position": 64, "best_epoch": 2}


@pytest.mark.parametrize(("rank", "counted", "right"), [(0, 3, 2), (1, 2, 1)])
def test_images_that_fill_a_process_up_are_not_counted(rank, counted, right):
    """Five images on two processes: the second one's third image is the first again."""
    shades = np.stack([np.full((8, 8), level, np.uint8) for level in (0, 255, 255, 0, 255)])
    images = ArrayImages(shades, [0, 1, 0, 1, 1], ["dark", "light"])
    batches = eval_batches(images, DataConfig("digits", batch_size=2), SPEC, World(ALONE.device, rank=rank, size=2))

    class Brightness(torch.nn.Module):
        def forward(self, x):
            return torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)

    metrics = evaluate(
        Brightness(), batches, Preprocess(SPEC, ALONE.device, 2), torch.autocast("cpu", enabled=False), ALONE
    )
    assert metrics["images"] == counted
    assert metrics["top1"] == pytest.approx(100 * right / counted)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file flushed, then listed, then the folders renamed, then the run's folder flushed."""
    events, flush, rename = [], os.fsync, Path.rename

    def fsync(descriptor):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        flush(descriptor)

    def renamed(path, target):
        events.append(("rename", path.name, Path(target).name))
        return rename(path, target)

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for value in (1.0, 2.0):
        events.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(Path, "rename", renamed)
            folder.replace(
                "last", lambda path, value=value: save(path / "w.safetensors", {"w": torch.tensor(value)}), ALONE
            )
    kinds = [event[0] for event in events]
    assert kinds[-3:] == ["rename", "rename", "flush"]
    assert events[-3:-1] == [("rename", "last", "previous"), ("rename", ".last.partial", "last")]
    assert events[-1][1] == folder.path
    # One file, the manifest, and after each of them the folder that has its name.
    names = [event[1].name for event in events[:-3]]
    assert [name.split(".")[1] for name in names[::2]] == ["w", "manifest"]
    assert names[1::2] == [".last.partial"] * 2


def test_unreadable_images_are_counted_once_in_a_resumed_run(train, jpeg_tree, tmp_path, capsys):
    root = shutil.copytree(jpeg_tree, tmp_path / "images")
    (root / "train" / "blue" / "0.jpg").write_bytes(b"no image")
    flags = ("--data", root, "--workers", 0, "--batch-size", 12, "--schedule", "constant", "--max-unreadable", 1)
    _, folder = train(*flags, "--epochs", 1)
    assert train(*flags, "--epochs", 2, "--resume", "auto")[0] == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["event"] == "unreadable"]) == 1
    assert len(torch.load(folder / "last" / "trainer.pt", weights_only=True)["unreadable"]) == 1
