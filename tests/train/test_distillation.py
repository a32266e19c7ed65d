"""Learning from a teacher, through timm's task."""

import pytest
import torch
from safetensors.torch import load_file

from vicinal.errors import UserError
from vicinal.train.build import build_task
from vicinal.train.config import AugmentationConfig, ModelConfig, RunConfig, TrainConfig
from vicinal.train.network.create import build_model
from vicinal.train.run.world import World

STUDENT = ("--model", "shvit_pico_vicinal", "--model-kwargs", "distilled=true", "--batch-size", "64")


def test_student_learns_from_the_labels_and_from_the_teachers_guesses(train, tmp_path, records):
    assert train("--epochs", "1", output="teacher")[0] == 0
    teacher = f"local-dir:{tmp_path / 'teacher' / 'best'}"
    code, folder = train(*STUDENT, "--teacher", teacher, "--epochs", "2", output="student")
    assert code == 0
    losses = [record["train_loss"] for record in records(folder) if record["event"] == "epoch"]
    assert losses[1] < losses[0]
    saved = load_file(folder / "best" / "model.safetensors")
    assert sum(name.startswith("head.") and value.shape == (10,) for name, value in saved.items()) == 2
    assert not any("teacher" in name for name in saved)

    whole = ModelConfig(
        name="shvit_pico_vicinal", model_kwargs={"distilled": True}, teacher=teacher, teacher_weight=0.25
    )
    config = TrainConfig(model=whole, augmentation=AugmentationConfig(mixup=0.0, cutmix=0.0))
    task = build_task(build_model(whole, 32, 10), None, config, World(torch.device("cpu")))
    task.get_trainable_module().train()
    result = task(torch.randn(4, 3, 32, 32), torch.arange(4))
    wanted = 0.75 * result["task_loss"] + 0.25 * result["distill_loss"]
    # Two products and a sum of float32 numbers below 8.
    torch.testing.assert_close(result["loss"], wanted, rtol=0, atol=2e-6)


def test_networks_without_a_second_classifier_are_refused():
    model = ModelConfig(name="nat_pico", teacher="local-dir:nowhere")
    network = build_model(model, 32, 10)
    with pytest.raises(UserError, match="nat_pico has no second classifier"):
        build_task(network, None, TrainConfig(model=model), World(torch.device("cpu")))
    with pytest.raises(UserError, match="--teacher works on whole networks"):
        TrainConfig(model=model, run=RunConfig(parallel="fsdp"))
