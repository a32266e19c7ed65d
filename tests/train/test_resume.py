"""A run that is killed in the middle of an epoch and resumed equals the run that was not, bit for bit."""

import os
import signal

import pytest
from launch import Launched, assert_identical, losses, weights
from layouts import digit_samples, write_webdataset

EVERYTHING = (
    *("--mixup", 0.8, "--cutmix", 1.0, "--random-erasing", 0.25, "--auto-augment", "rand-m9-mstd0.5-inc1"),
    *("--ema-decay", 0.9, "--drop-path-rate", 0.1, "--repeats", 2, "--layer-decay", 0.8, "--clip-grad", 1.0),
    *("--accumulation", 2, "--save-interval", 7, "--epochs", 2, "--batch-size", 16),
)


@pytest.fixture(scope="module")
def digit_shards(tmp_path_factory):
    """500 images of digits in shards of 120."""
    root = tmp_path_factory.mktemp("shards")
    write_webdataset(root, digit_samples())
    return root


def assert_same_run(parts, whole, records):
    """Every record of every update and epoch, and all weights."""
    assert records(parts) == records(whole)
    assert_identical(weights(parts), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_killed_inside_an_epoch_and_resumed_on_other_workers(tmp_path, small, train, records, precision):
    """44 batches per epoch make 45 updates of two and one; the kill comes in the second epoch."""
    arguments = (*EVERYTHING, "--precision", precision)
    _, whole = train(*arguments, output="whole")
    run = Launched(tmp_path, (*small, *arguments, "--output", "parts", "--workers", 2))
    run.wait_for_step("parts", 60)
    run.kill()
    assert train(*arguments, "--workers", 0, "--resume", "auto", output="parts")[0] == 0
    assert_same_run(tmp_path / "parts", whole, records)
    assert_identical(weights(tmp_path / "parts", "best"), weights(whole, "best"))


def test_stream_killed_inside_an_epoch_and_resumed_on_other_workers(tmp_path, small, train, records, digit_shards):
    """25 updates per epoch; one worker or three, two shards at a time."""
    arguments = ("--data", f"wds/{digit_shards}", "--batch-size", 20, "--epochs", 2, "--save-interval", 7)
    arguments += ("--stream-lanes", 2, "--shuffle-buffer", 80, "--auto-augment", "rand-m5-n1", "--mixup", 0.2)
    _, whole = train(*arguments, "--workers", 0, output="whole")
    run = Launched(tmp_path, (*small, *arguments, "--output", "parts", "--workers", 3))
    run.wait_for_step("parts", 38)
    run.kill()
    assert train(*arguments, "--workers", 1, "--resume", "auto", output="parts")[0] == 0
    assert_same_run(tmp_path / "parts", whole, records)


@pytest.mark.slow
def test_stream_resumed_on_another_number_of_processes_keeps_the_order(tmp_path, small, train, digit_shards):
    common = ("--data", f"wds/{digit_shards}", "--epochs", 1, "--save-interval", 5, "--optimizer", "sgd")
    common += ("--lr", 0.05, "--auto-augment", "rand-m5-n1", "--stream-lanes", 2, "--shuffle-buffer", 80)
    _, alone = train(*common, "--batch-size", 20, "--workers", 0, output="alone")
    run = Launched(tmp_path, (*small, *common, "--batch-size", 10, "--workers", 2, "--output", "parts"), processes=2)
    run.wait_for_step("parts", 12)
    run.kill()
    code, parts = train(*common, "--batch-size", 20, "--workers", 0, "--resume", "auto", output="parts")
    assert code == 0
    expected, actual = losses(alone), losses(parts)
    assert [step for step, _ in actual] == [step for step, _ in expected] == list(range(1, 26))
    # As above: float32 roundings, carried through 25 updates.
    assert [loss for _, loss in actual] == pytest.approx([loss for _, loss in expected], abs=1e-5)


@pytest.mark.slow
def test_resume_in_another_folder_from_inside_an_epoch(tmp_path, small, train, records):
    arguments = ("--epochs", 1, "--save-interval", 10)
    _, whole = train(*arguments, output="whole")
    run = Launched(tmp_path, (*small, *arguments, "--output", "parts"))
    run.wait_for_step("parts", 15)
    run.kill()
    code, continued = train(*arguments, "--resume", tmp_path / "parts", output="continued")
    assert code == 0
    assert_same_run(continued, whole, records)


DISTRIBUTED = {
    "ddp with batch norm": ("--model", "test_resnet", "--ema-decay", 0.9),
    "fsdp": ("--parallel", "fsdp", "--ema-decay", 0.9),
    "fsdp in shards": ("--parallel", "fsdp", "--sharded-checkpoints"),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in DISTRIBUTED])
def test_torchrun_restarts_after_a_killed_rank_and_the_result_is_the_same(tmp_path, small, records, kind):
    """``--max-restarts`` with the very same command line: no ``--resume``."""
    arguments = (
        *(*small, "--batch-size", 8, "--accumulation", 2, "--save-interval", 5, "--epochs", 1),
        *("--mixup", 0.2, "--drop-path-rate", 0.1, *DISTRIBUTED[kind]),
    )
    Launched(tmp_path, (*arguments, "--output", "whole"), processes=2).end()
    run = Launched(tmp_path, (*arguments, "--output", "parts"), processes=2, restarts=1)
    run.wait_for_step("parts", 23)
    os.kill(run.primary_pid("parts"), signal.SIGKILL)
    out, _ = run.end()
    assert "from epoch 1, update " in out
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert records(parts) == records(whole)
    assert_identical(weights(parts, "best"), weights(whole, "best"))


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_resume_on_another_number_of_processes_keeps_the_order(tmp_path, small, train, kind):
    """Two processes, killed; one goes on with the doubled batch and has the losses of one that did all of it."""
    common = ("--epochs", 1, "--save-interval", 8, "--optimizer", "sgd", "--lr", 0.05, "--auto-augment", "rand-m5-n1")
    _, alone = train(*common, "--batch-size", 32, output="alone")
    arguments = (*small, *common, "--batch-size", 16, "--parallel", kind, "--output", "parts")
    run = Launched(tmp_path, arguments, processes=2)
    run.wait_for_step("parts", 20)
    run.kill()
    code, parts = train(*common, "--batch-size", 32, "--resume", "auto", output="parts")
    assert code == 0
    expected, actual = losses(alone), losses(parts)
    assert [step for step, _ in actual] == [step for step, _ in expected]
    # Means over 32 images in another order of summation: float32 roundings (6e-8), carried through 44 updates.
    assert [loss for _, loss in actual] == pytest.approx([loss for _, loss in expected], abs=1e-5)
