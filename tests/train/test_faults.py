"""What can go wrong in three weeks, each as a run, with its outcome."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import Launched, assert_identical, weights
from PIL import Image
from safetensors.torch import load_file
from timm.task import ClassificationTask
from torch.utils.data import Dataset, Sampler

from vicinal.errors import RunStopped
from vicinal.train.data.loader import MAX_RESTARTS, Batches, UnreadableCounter
from vicinal.train.run.folder import RunFolder, digest_files, find_damage, list_files
from vicinal.train.run.fsdp import load_shards, save_shards


def events(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def steps_recorded(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count('"event": "step"') if path.is_file() else 0


@pytest.fixture
def after_step(tmp_path):
    """Do something from another thread as soon as the run in this process has recorded an update."""
    threads = []

    def schedule(folder, step, action):
        def watch():
            end = time.monotonic() + 120
            while steps_recorded(tmp_path / folder) < step and time.monotonic() < end:
                time.sleep(0.002)
            action()

        threads.append(threading.Thread(target=watch))
        threads[-1].start()

    yield schedule
    for thread in threads:
        thread.join()


def test_disk_that_takes_no_more(train, records, capsys):
    """A limit on the size of files stands in for a full disk: the kernel refuses the write in the same place."""
    arguments = ("--schedule", "constant")
    _, whole = train(*arguments, "--epochs", 2, output="whole")
    _, parts = train(*arguments, "--epochs", 1, output="parts")
    before = weights(parts)
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        code, _ = train(*arguments, "--epochs", 2, "--resume", "auto", output="parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot write checkpoint parts/last" in line
    assert "File too large" in line
    assert "last/ of before is intact" in line
    assert find_damage(parts / "last") is None
    assert_identical(weights(parts), before)
    assert not list(parts.glob(".*.partial"))
    assert train(*arguments, "--epochs", 2, "--resume", "auto", output="parts")[0] == 0
    assert records(parts) == records(whole)
    assert_identical(weights(parts), weights(whole))


FULL_DISK = """
mount -t tmpfs -o size=32m tmpfs disk || exit 77
"$@" --epochs 1 || exit 1
cat /dev/zero > disk/filler 2> /dev/null
truncate -s -2M disk/filler
"$@" --epochs 2; echo "code $?"
cp -r disk/run when_full
rm disk/filler
"$@" --epochs 2 || exit 1
cp -r disk/run at_the_end
"""


@pytest.mark.slow
def test_full_file_system(tmp_path, small, train, records):
    """A file system of 32 MB in a namespace of its own, filled up to two: a checkpoint has nearly four."""
    arguments = ("--schedule", "constant")
    _, whole = train(*arguments, "--epochs", 2, output="whole")
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-m", "vicinal.train", *small, *arguments, "--output", "disk/run", "--resume", "auto"]
    shell = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", *command]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this system lets users mount nothing")
    assert done.returncode == 0, done.stderr
    assert "code 1" in done.stdout
    assert "cannot write checkpoint disk/run/last" in done.stderr
    assert "No space left on device" in done.stderr
    assert "last/ of before is intact" in done.stderr
    assert find_damage(tmp_path / "when_full" / "last") is None
    assert not list((tmp_path / "when_full").glob(".*.partial"))
    assert records(tmp_path / "at_the_end") == records(whole)
    assert_identical(weights(tmp_path / "at_the_end"), weights(whole))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "unlisted"])
def test_damaged_last_checkpoint_gives_way_to_the_one_before(train, records, capsys, damage):
    arguments = ("--epochs", 1, "--save-interval", 20)
    _, whole = train(*arguments, output="whole")
    parts = whole.with_name("parts")
    shutil.copytree(whole, parts)
    (parts / ".lock").unlink()
    path = parts / "last" / "trainer.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        (parts / "last" / "manifest.json").unlink()
    capsys.readouterr()
    assert train(*arguments, "--resume", "auto", output="parts")[0] == 0
    out = capsys.readouterr().out
    assert "parts/last is damaged" in out
    assert "going on from parts/previous" in out
    assert "from epoch 1, update 40" in out
    assert records(parts) == records(whole)
    assert_identical(weights(parts), weights(whole))


@pytest.fixture(scope="module")
def partly_unreadable(tmp_path_factory):
    """500 images to train on, three of them cut short or no images; ten val images, one of them cut short."""
    root = tmp_path_factory.mktemp("unreadable")
    generator = np.random.default_rng(0)
    for split, per_class in (("train", 250), ("val", 5)):
        for name, level in {"dark": 40, "light": 200}.items():
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = generator.normal(level, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.jpg")
    for path in ("train/dark/3.jpg", "train/light/200.jpg", "val/light/2.jpg"):
        (root / path).write_bytes((root / path).read_bytes()[:300])
    (root / "train/dark/77.jpg").write_text("not an image")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_counted_and_replaced(train, partly_unreadable, capsys, workers):
    arguments = ("--data", partly_unreadable, "--batch-size", 50, "--epochs", 2, "--workers", workers)
    code, folder = train(*arguments, "--max-unreadable", 4)
    assert code == 0
    out = capsys.readouterr().out
    named = [record["message"] for record in events(folder, "unreadable")]
    assert len(named) == 4
    for path in ("train/dark/3.jpg", "train/light/200.jpg", "train/dark/77.jpg", "val/light/2.jpg"):
        assert sum(path in message for message in named) == 1
        assert f"{path}" in out
    assert [record["val_images"] for record in events(folder, "epoch")] == [9, 9]


def test_one_unreadable_image_too_many_stops_the_run(train, partly_unreadable, capsys):
    code, _ = train(
        "--data", partly_unreadable, "--batch-size", 50, "--epochs", 1, "--workers", 0, "--max-unreadable", 2
    )
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "3 of at most 2 (--max-unreadable)" in line
    assert "cannot read image" in line


def poisoned(monkeypatch, updates):
    """Make the loss of some updates not a number, and with it the gradients."""
    forward, count = ClassificationTask.forward, iter(range(10**6))

    def spoiled(task, images, targets):
        bad = float("nan") if next(count) in updates else 1.0
        return {**(result := forward(task, images * bad, targets)), "loss": result["loss"] * bad}

    monkeypatch.setattr(ClassificationTask, "forward", spoiled)


def test_updates_that_are_not_finite_are_left_out(train, monkeypatch):
    poisoned(monkeypatch, {5, 6, 20})
    code, folder = train("--model", "test_resnet", "--epochs", 1, "--max-skips", 2, "--ema-decay", 0.9)
    assert code == 0
    assert [record["step"] for record in events(folder, "skipped")] == [6, 7, 21]
    assert len(events(folder, "step")) == 44 - 3
    # The statistics of batch norm among them.
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    assert np.isfinite(events(folder, "epoch")[0]["train_loss"])


def test_too_many_updates_that_are_not_finite_stop_the_run_and_keep_the_batch(train, monkeypatch, capsys):
    poisoned(monkeypatch, range(25, 100))
    code, folder = train("--epochs", 1, "--max-skips", 3, "--save-interval", 10)
    assert code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the loss is nan in epoch 1, update 29, and was so 4 times in a row; the weights are finite" in line
    batch = load_file(folder / "nonfinite-00000.safetensors")
    assert str(folder.name + "/nonfinite-00000.safetensors") in line
    assert batch["images"].shape == (32, 3, 32, 32)
    assert batch["targets"].shape == (32,)
    assert torch.load(folder / "last" / "trainer.pt", weights_only=True)["step"] == 20


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_signal_saves_and_ends_and_the_run_goes_on_the_same(train, records, after_step, capsys, name):
    handler = signal.getsignal(getattr(signal, name))
    _, whole = train("--epochs", 2, output="whole")
    after_step("parts", 20, lambda: os.kill(os.getpid(), getattr(signal, name)))
    code, parts = train("--epochs", 2, output="parts")
    assert code == 75
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"paused: {name} after epoch 0, update ")
    assert "--resume auto" in line
    assert signal.getsignal(getattr(signal, name)) == handler
    assert train("--epochs", 2, "--resume", "auto", output="parts")[0] == 0
    assert records(parts) == records(whole)
    assert_identical(weights(parts), weights(whole))


def child_processes():
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def test_killed_loader_process_costs_nothing_but_time(train, records, after_step):
    arguments = ("--epochs", 1, "--auto-augment", "rand-m5-n1")
    _, whole = train(*arguments, "--workers", 0, output="whole")
    before = set(child_processes())
    killed = []

    def kill_one():
        killed.extend(set(child_processes()) - before)
        os.kill(killed[0], signal.SIGKILL)

    after_step("parts", 10, kill_one)
    code, parts = train(*arguments, "--workers", 2, output="parts")
    assert code == 0
    assert len(killed) == 2
    assert records(parts) == records(whole)
    assert_identical(weights(parts), weights(whole))


class Suicidal(Dataset):
    """Its fifth example ends the process that loads it."""

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 4, 4, dtype=torch.uint8), index, ()


class InOrder(Sampler):
    """Eight batches of one."""

    skip, parts = 0, 1

    def __len__(self):
        return 8 - self.skip

    def __iter__(self):
        return iter([[index] for index in range(self.skip, 8)])


def test_loader_processes_that_keep_dying_stop_the_run():
    batches = Batches(Suicidal(), InOrder(), 1, torch.device("cpu"), UnreadableCounter(0))
    seen = []
    with pytest.raises(RunStopped, match=f"died {MAX_RESTARTS + 1} times in one pass.*--workers"):
        seen.extend(int(targets) for _, targets in batches)
    assert seen == sorted(set(seen))


def test_second_run_into_the_same_folder_is_refused(tmp_path, small, train, capsys):
    run = Launched(tmp_path, (*small, "--epochs", 50, "--output", "run"))
    try:
        run.wait_for_step("run", 3)
        for arguments in ((), ("--resume", "auto")):
            assert train("--epochs", 1, *arguments)[0] == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert f"another run writes here (process {run.process.pid} on " in line
    finally:
        run.kill()
    # The dead process holds no lock.
    RunFolder(tmp_path / "run").claim(may_hold_files=True)


class Evil:
    """A pickle that would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_trainer_state_that_holds_code_is_refused(train, tmp_path, capsys):
    _, folder = train("--epochs", 1)
    torch.save({"format": 4, "optimizer": Evil()}, folder / "last" / "trainer.pt")
    # Whoever writes the one can write the other.
    names = [name for name in list_files(folder / "last") if name != "manifest.json"]
    (folder / "last" / "manifest.json").write_text(json.dumps({"files": digest_files(folder / "last", names)}))
    capsys.readouterr()
    assert train("--epochs", 2, "--resume", "auto")[0] == 2
    assert "cannot read run/last/trainer.pt: " in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


def test_shards_that_hold_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = {"weight": torch.arange(6.0)}
    save_shards(tmp_path / "shards", saved)
    read = {"weight": torch.zeros(6)}
    load_shards(tmp_path / "shards", read)
    assert torch.equal(read["weight"], saved["weight"])
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="which is none of its types"):
        load_shards(tmp_path / "shards", read)
    assert not (tmp_path / "pwned").exists()


def test_shards_with_entries_that_would_be_unpickled_are_refused(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"weight": torch.zeros(2), "extra": {1, 2}}, checkpoint_id=str(tmp_path / "shards"))
    with pytest.raises(ValueError, match=r"none of its types|not tensors"):
        load_shards(tmp_path / "shards", {"weight": torch.zeros(2)})
