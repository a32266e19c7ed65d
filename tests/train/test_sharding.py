"""FSDP2 in one process: the same numbers as without it. Two processes are in test_distributed and test_resume."""

import pytest
import timm
import torch
from launch import assert_identical, weights
from torch import nn

import vicinal.zoo  # noqa: F401  registers the models
from vicinal.train.run.fsdp import is_whole_on_meta

COMMON = ("--epochs", 1, "--ema-decay", 0.9, "--clip-grad", 1.0, "--accumulation", 2, "--layer-decay", 0.8)


def test_shards_of_one_process_are_the_full_tensors(train, records):
    _, whole = train(*COMMON, output="whole")
    code, sharded = train(*COMMON, "--parallel", "fsdp", "--grad-checkpointing", output="sharded")
    assert code == 0
    assert records(sharded) == records(whole)
    assert_identical(weights(sharded), weights(whole))


@pytest.mark.parametrize(
    "option", [pytest.param((), marks=pytest.mark.slow), ("--sharded-checkpoints",)], ids=["full", "shards"]
)
def test_sharded_run_resumes_bit_for_bit(train, records, capsys, option):
    common = (*COMMON, "--schedule", "constant", "--parallel", "fsdp", *option)
    _, whole = train(*common, "--epochs", 2, output="whole")
    train(*common, output="parts")
    assert train(*common, "--epochs", 2, "--resume", "auto", output="parts")[0] == 0
    assert records(whole.with_name("parts")) == records(whole)
    assert_identical(weights(whole.with_name("parts"), "best"), weights(whole, "best"))
    if option:
        capsys.readouterr()
        assert train(*COMMON, "--resume", "auto", output="parts")[0] == 2
        assert "written with --sharded-checkpoints; add --parallel fsdp" in capsys.readouterr().err


@pytest.mark.slow
def test_each_block_is_compiled_by_itself(train, records, monkeypatch):
    compile_module, compiled = nn.Module.compile, []

    def record(module, **_):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", record)
    _, plain = train("--epochs", 1, "--parallel", "fsdp", output="plain")
    code, folder = train("--epochs", 1, "--parallel", "fsdp", "--compile", output="compiled")
    assert code == 0
    assert compiled == ["Block"] * 6
    assert weights(folder).keys() == weights(plain).keys()
    assert records(folder)[-1]["val_loss"] == pytest.approx(records(plain)[-1]["val_loss"], rel=1e-3)


def test_tensors_that_a_plan_cannot_fill_are_found():
    with torch.device("meta"):
        model = timm.create_model("test_vit")
    assert is_whole_on_meta(model)
    model.blocks[0].table = torch.empty(3, device="meta")
    assert not is_whole_on_meta(model)
