"""Two processes under torchrun, joined by Gloo."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import vicinal.zoo  # noqa: F401  registers the models
from vicinal.train.run.fsdp import find_blocks

WORKER = """
import sys
from pathlib import Path
from timm.utils import unwrap_model
from vicinal.checkpoints import save
from vicinal.train.run.world import join_world, leave_world
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
    """Batch norm, an average, accumulation with a partial group, and a val split that two do not divide."""
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
    """With copies of the weights (DDP) and with shards (FSDP2), update by update; and the two equal each other."""
    common = ("--data", jpeg_tree, "--workers", 0, "--epochs", 2, "--optimizer", "sgd", "--lr", 0.05)
    common = (*common, "--clip-grad", 0.5, "--ema-decay", 0.75)
    code, alone = train(*common, "--batch-size", 8, output="alone")
    assert code == 0
    for parallel in ("ddp", "fsdp"):
        options = ("--batch-size", 4, "--parallel", parallel, "--output", tmp_path / parallel)
        done = torchrun(tmp_path, "-m", "vicinal.train", *small_with(small, *common, *options))
        assert done.stdout.count("val accuracy") == 1
    for kind, other in (("ddp", alone), ("fsdp", alone), ("fsdp", tmp_path / "ddp")):
        for one, two in zip(records(other), records(tmp_path / kind), strict=True):
            # Means of 8 losses in another order: float32 roundings (6e-8) carried through six updates.
            assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
            assert two.get("val_loss") == pytest.approx(one.get("val_loss"), abs=1e-5)
        for name in ("model", "training_weights"):
            expected = load_file(other / "last" / f"{name}.safetensors")
            for key, tensor in load_file(tmp_path / kind / "last" / f"{name}.safetensors").items():
                torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)


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


def test_blocks_to_shard_are_the_repeated_ones():
    """The layers of a transformer, the blocks of each stage of a pyramid, not their stages or their parts."""
    vit = timm.create_model("test_vit")
    assert find_blocks(vit) == list(vit.blocks)
    nat = timm.create_model("nat_pico")
    blocks = find_blocks(nat)
    assert {type(block).__name__ for block in blocks} == {type(nat.stages[0].blocks[0]).__name__}
    assert len(blocks) == sum(len(stage.blocks) for stage in nat.stages)
    # Pairs of blocks in sequences, and stages of two blocks with different attention.
    davit, halonet = timm.create_model("davit_pico_vicinal"), timm.create_model("halonet26t")
    for model, share in ((davit, 0.7), (halonet, 0.8)):
        blocks = find_blocks(model)
        inside = [parameter for block in blocks for parameter in block.parameters()]
        assert len(inside) == len(set(inside))
        total = sum(parameter.numel() for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in inside) > share * total
