"""SHViT: batch norms fold away, a second classifier learns from a teacher, old files keep convolutions as matrices."""

import pytest
import timm
import torch
from golden import list_golden
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import convert

IMAGE = torch.randn(2, 3, 72, 100, generator=torch.Generator().manual_seed(0))


def create(**kwargs: object) -> nn.Module:
    """A network in which no batch norm is the identity."""
    torch.manual_seed(0)
    model = timm.create_model("shvit_pico_vicinal", num_classes=5, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.bias):
                nn.init.uniform_(tensor, -0.2, 0.2)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # folding rounds each weight once more: a few float32 roundings over some thirty layers
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"drop_path_rate": 0.1}, {"num_classes": 0}], ids=str)
@torch.no_grad()
def test_fusion_folds_every_batch_norm_and_keeps_the_numbers(options: dict[str, object]):
    model = timm.create_model("shvit_pico_vicinal", **options) if "num_classes" in options else create(**options)
    model.eval()
    expected = model(IMAGE)
    fused = reparameterize_model(model)
    assert any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    assert_close(fused(IMAGE), expected)
    assert torch.equal(fused.fuse()(IMAGE), fused(IMAGE))
    assert_close(torch.jit.script(fused)(IMAGE), expected)
    assert model.fuse() is model
    assert_close(model(IMAGE), expected)


def test_fused_features_and_classifier_stay_usable():
    model = create()
    expected = model.forward_intermediates(IMAGE, intermediates_only=True)
    model.fuse()
    for actual, feature in zip(model.forward_intermediates(IMAGE, intermediates_only=True), expected, strict=True):
        assert_close(actual, feature)
    assert isinstance(model.get_classifier(), nn.Linear)


def test_the_second_classifier_is_averaged_or_returned():
    model = create(distilled=True)
    first, second = model.get_classifier()
    assert first.out_features == second.out_features == 5
    features = model.forward_head(model.forward_features(IMAGE), pre_logits=True)
    expected = model.head.fc(features), model.head.fc_dist(features)
    assert torch.equal(model(IMAGE), (expected[0] + expected[1]) / 2)
    model.set_distilled_training(True)
    assert torch.equal(model(IMAGE), (expected[0] + expected[1]) / 2)
    logits = model.train()(IMAGE)
    assert [value.shape for value in logits] == [(2, 5), (2, 5)]
    (logits[0].sum() + logits[1].square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.set_distilled_training(False)
    assert model(IMAGE).shape == (2, 5)


def test_reset_covers_both_classifiers():
    model = create(distilled=True)
    model.reset_classifier(7)
    assert [linear.out_features for linear in model.get_classifier()] == [7, 7]
    model.reset_classifier(0)
    assert torch.equal(model(IMAGE), model.forward_head(model.forward_features(IMAGE), pre_logits=True))
    model.reset_classifier(3)
    assert model(IMAGE).shape == (2, 3)


def test_every_residual_branch_of_a_block_begins_as_zero_also_after_to_empty():
    with torch.device("meta"):
        empty = timm.create_model("shvit_pico_vicinal")
    empty.to_empty(device="cpu").init_weights()
    for model in (empty, timm.create_model("shvit_pico_vicinal")):
        block = model.stages[1].blocks[0]
        for norm in (
            block.conv.m.bn,
            block.mixer.m.proj[1].bn,
            block.ffn.m.pw2.bn,
            model.stages[1].downsample[1].m.pw2.bn,
        ):
            assert not norm.weight.any()
        assert model.stages[1].downsample[0].m.bn.weight.eq(1).all()


def test_pointwise_convolutions_stored_as_matrices_load():
    golden = next(golden for golden in list_golden("shvit") if golden.variant == "shvit_s1")
    state_dict = golden.state_dict()
    expected = convert(golden.name, state_dict)
    flat = {key: value[:, :, 0, 0] if value.shape[2:] == (1, 1) else value for key, value in state_dict.items()}
    assert flat["blocks2.1.se.fc1.weight"].shape == (128, 512)
    actual = convert(golden.name, flat)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
