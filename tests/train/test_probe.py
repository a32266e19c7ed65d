"""Probing: only the head learns, and a checkpoint holds the whole network."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from vicinal.errors import UserError
from vicinal.train.config import ModelConfig, RunConfig, TrainConfig
from vicinal.train.network.create import build_model
from vicinal.train.network.probe import set_training_mode
from vicinal.zoo.probe import AttentiveProbe, MultiQueryPool


def test_pooling_is_attention_of_learned_queries_to_unprojected_tokens():
    torch.manual_seed(0)
    pool = MultiQueryPool(12, num_queries=3).double()
    tokens = torch.randn(2, 5, 12, dtype=torch.double)
    found = pool(tokens)
    for image in range(2):
        parts = []
        for query in range(3):
            scores = tokens[image] @ pool.queries[query] / 12**0.5
            values = tokens[image] @ pool.value.weight[4 * query : 4 * query + 4].T
            parts.append(scores.softmax(0) @ values)
        # Sums of twelve float64 products of numbers of order one, in another order.
        torch.testing.assert_close(found[image], torch.cat(parts), rtol=0, atol=1e-13)


def test_queries_must_divide_the_features():
    with pytest.raises(ValueError, match="num_queries 5 must divide the 12 features of the network, as 4 does"):
        MultiQueryPool(12, num_queries=5)
    with pytest.raises(UserError, match="--probe-queries 7"):
        build_model(ModelConfig(name="nat_pico", probe="attentive", probe_queries=7), 32, 10)


@pytest.mark.parametrize(
    "name", ["nat_pico", "shvit_pico_vicinal", "convit_pico_vicinal", "maxvit_pico", "test_vit", "test_byobnet"]
)
def test_tokens_are_the_map_of_the_network_in_row_major_order(name):
    options = {"img_size": 64} if name == "test_vit" else {}
    side = 64 if name in ("test_vit", "test_byobnet") else 32
    torch.manual_seed(0)
    model = AttentiveProbe(name, num_classes=3, num_queries=2, backbone_args=options).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found = model.forward_features(images)
        _, maps = model.backbone.forward_intermediates(images, indices=1, norm=True)
        assert torch.equal(found, maps[-1].flatten(2).transpose(1, 2))
        assert model(images).shape == (2, 3)
        assert model.forward_head(found, pre_logits=True).shape == (2, model.num_features)


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_only_the_head_is_trained_and_norms_of_the_network_stay(probe):
    model = build_model(ModelConfig(name="shvit_pico_vicinal", probe=probe, probe_queries=4), 32, 5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("head.") for name in trained)
    set_training_mode(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms
    assert not any(module.training for module in norms.values())
    assert model.get_classifier().training
    whole = build_model(ModelConfig(name="shvit_pico_vicinal"), 32, 5)
    set_training_mode(whole)
    assert all(module.training for module in whole.modules())


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_probe_run_leaves_the_network_and_saves_it_with_the_head(probe, train, tmp_path, records):
    assert train("--epochs", "1", output="first")[0] == 0
    before = load_file(tmp_path / "first" / "best" / "model.safetensors")
    # Queries of a quarter of the 64 features each.
    flags = ("--weights", str(tmp_path / "first"), "--probe", probe, "--probe-queries", "4", "--epochs", "3")
    code, folder = train(*flags, "--lr", "2e-2", "--weight-decay", "0")
    assert code == 0
    after = load_file(folder / "best" / "model.safetensors")
    prefix = "backbone." if probe == "attentive" else ""
    kept = [name for name in before if not name.startswith("head.")]
    assert all(torch.equal(after[prefix + name], before[name]) for name in kept)
    assert any(name.startswith("head.") for name in after)
    losses = [record["train_loss"] for record in records(folder) if record["event"] == "epoch"]
    assert losses[-1] < losses[0]
    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_resumed_probe_equals_the_uninterrupted_one(train, records):
    flags = ("--probe", "attentive", "--probe-queries", "4", "--schedule", "constant")
    train(*flags, "--epochs", "1", output="parts")
    code, resumed = train(*flags, "--epochs", "2", "--resume", "auto", output="parts")
    assert code == 0
    _, straight = train(*flags, "--epochs", "2", output="straight")
    assert records(resumed) == records(straight)


def test_shards_are_refused():
    with pytest.raises(UserError, match="--probe trains a head only"):
        TrainConfig(model=ModelConfig(probe="linear"), run=RunConfig(parallel="fsdp"))
