"""Two processes under torchrun, joined by Gloo."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

WORKER = """
import sys
from pathlib import Path
from timm.utils import unwrap_model
from vicinal.checkpoints import save
from vicinal.train.distributed import join_world, leave_world
from vicinal.train.loop import Trainer
from vicinal.train.recipe import parse_arguments

config = parse_arguments(sys.argv[2:])
world = join_world("cpu")
trainer = Trainer(config, world)
trainer.fit()
for average in (False, True):
    save(Path(sys.argv[1]) / f"{world.rank}-{average}.safetensors", trainer.state.weights(average=average))
leave_world()
"""


def torchrun(tmp_path, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def small_with(small, *extra):
    return [*small, *map(str, extra)]


def test_processes_agree_and_count_every_image_once(tmp_path, small, jpeg_tree, records):
    """Batch norm, an average, accumulation with a partial group, and a held-out set that two do not divide."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    arguments = small_with(
        small,
        *("--model", "test_resnet", "--data", jpeg_tree, "--workers", 0, "--batch-size", 4, "--epochs", 2),
        *("--accumulation", 2, "--ema-decay", 0.5, "--mixup", 0.2, "--output", tmp_path / "run"),
    )
    torchrun(tmp_path, worker, tmp_path, *arguments)
    for average in (False, True):
        first, second = (load_file(tmp_path / f"{rank}-{average}.safetensors") for rank in range(2))
        for name, tensor in first.items():
            assert torch.isfinite(tensor).all(), name
            assert torch.equal(tensor, second[name]), name
    epochs = [record for record in records(tmp_path / "run") if record["event"] == "epoch"]
    assert [record["val_images"] for record in epochs] == [15, 15]
    # 24 images, 8 per batch of both processes: 3 batches, in groups of 2 and 1.
    assert [record["step"] for record in epochs] == [2, 4]


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, small, train, records, jpeg_tree):
    common = ("--data", jpeg_tree, "--workers", 0, "--epochs", 2, "--optimizer", "sgd", "--lr", 0.05)
    arguments = small_with(small, *common, "--batch-size", 4, "--output", tmp_path / "pair")
    done = torchrun(tmp_path, "-m", "vicinal.train", *arguments)
    assert done.stdout.count("held-out accuracy") == 1
    code, alone = train(*common, "--batch-size", 8, output="alone")
    assert code == 0
    pair = records(tmp_path / "pair")
    for one, other in zip(records(alone), pair, strict=True):
        if one["event"] == "epoch":
            # Means of 24 losses in another order: float32 roundings (6e-8) carried through six updates.
            assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
            assert other["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
    for name, tensor in load_file(alone / "last" / "model.safetensors").items():
        other = load_file(tmp_path / "pair" / "last" / "model.safetensors")[name]
        torch.testing.assert_close(other, tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_distributed_run_resumes_bit_for_bit(tmp_path, small, jpeg_tree, records):
    common = ("--data", jpeg_tree, "--workers", 0, "--batch-size", 4, "--schedule", "constant", "--drop-path-rate", 0.1)
    arguments = small_with(small, *common)
    torchrun(tmp_path, "-m", "vicinal.train", *arguments, "--epochs", 2, "--output", "whole")
    torchrun(tmp_path, "-m", "vicinal.train", *arguments, "--epochs", 1, "--output", "parts")
    torchrun(tmp_path, "-m", "vicinal.train", *arguments, "--epochs", 2, "--output", "parts", "--resume", "auto")
    whole, parts = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert json.dumps(records(tmp_path / "parts")) == json.dumps(records(tmp_path / "whole"))
