"""What a model says about its own training reaches the optimizer."""

import pytest
import timm
import torch

from vicinal.train.build import build_optimizer, build_scheduler
from vicinal.train.config import OptimizerConfig, ScheduleConfig


def learning_rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_offsets_of_litv2_learn_at_a_hundredth_of_the_rate(optimizer_name: str, layer_decay: float | None):
    model = timm.create_model("litv2_pico")
    optimizer = build_optimizer(model, OptimizerConfig(optimizer=optimizer_name, lr=1.0, layer_decay=layer_decay))
    scheduler = build_scheduler(optimizer, ScheduleConfig(schedule="constant", epochs=4, warmup_epochs=1), 10)
    scheduler.step_update(20)
    rates = learning_rates(model, optimizer)
    for stage in (1, 2, 3):
        downsample = f"stages.{stage}.downsample"
        # other rates of the same layer: the bias keeps it, in the official code too
        assert rates[f"{downsample}.conv.weight"] == rates[f"{downsample}.offset.bias"]
        assert rates[f"{downsample}.offset.weight"] == pytest.approx(0.01 * rates[f"{downsample}.conv.weight"])
    scaled = [name for name, rate in rates.items() if rate < 0.01 + 1e-9]
    assert layer_decay is not None or scaled == [f"stages.{stage}.downsample.offset.weight" for stage in (1, 2, 3)]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.stages[1].downsample.offset.weight)] == OptimizerConfig().weight_decay


def test_frozen_offsets_are_left_out():
    model = timm.create_model("litv2_pico")
    model.stages[1].downsample.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_step_moves_the_offsets_a_hundredth_as_far():
    model = timm.create_model("litv2_pico")
    optimizer = build_optimizer(model, OptimizerConfig(optimizer="sgd", lr=1.0, weight_decay=0.0))
    build_scheduler(optimizer, ScheduleConfig(schedule="constant", epochs=4, warmup_epochs=0), 10).step_update(20)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - parameter).detach() for name, parameter in model.named_parameters()}
    offset, other = moved["stages.2.downsample.offset.weight"], moved["stages.2.downsample.conv.weight"]
    assert offset.mean().item() == pytest.approx(0.01 * other.mean().item(), rel=1e-4)
