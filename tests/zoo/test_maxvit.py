"""MaxViT against timm's port of it, and its windows: derived, set, resized and recorded."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import convert, save_model
from vicinal.zoo.blocks.attention import WindowAttention

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def windows(model: nn.Module) -> set[tuple[int, ...]]:
    return {tuple(module.window_size) for module in model.modules() if isinstance(module, WindowAttention)}


def table_shapes(model: nn.Module) -> set[tuple[int, ...]]:
    return {tuple(x.shape[1:]) for name, x in model.named_parameters() if name.endswith("relative_position_bias")}


def theirs(**kwargs: object) -> nn.Module:
    """timm's network with every kind of parameter away from its initial value."""
    torch.manual_seed(0)
    model = timm.create_model("maxvit_tiny_tf_224", num_classes=5, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model


def assert_same_logits(ours: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        actual, expected = ours(IMAGE), other(IMAGE)
    # float32 rounding over some seventy layers; the tables alone move the logits by 5e-4 of their deviation
    assert (actual - expected).abs().max() <= 3e-5 * expected.std()


@pytest.mark.parametrize("img_size", [(64, 96), (128, 96)], ids=str)
def test_timms_weights_give_timms_logits(img_size: tuple[int, int]):
    other = theirs(img_size=img_size)
    ours = timm.create_model("maxvit_tiny", num_classes=5, img_size=img_size).eval()
    ours.load_state_dict(convert("maxvit_tiny", other.state_dict(), img_size=img_size))
    image = torch.randn(1, 3, *img_size)
    with torch.no_grad():
        actual, expected = ours(image), other(image)
    assert (actual - expected).abs().max() <= 3e-5 * expected.std()


def test_tables_are_resized_on_loading_as_timm_resizes_them():
    at_224 = theirs()
    ours = timm.create_model("maxvit_tiny", num_classes=5, img_size=(64, 96)).eval()
    ours.load_state_dict(ours.adapt_state_dict(at_224.state_dict()))
    at_224.set_input_size(img_size=(64, 96))
    assert_same_logits(ours, at_224)


def test_a_tag_of_weights_brings_its_window():
    for tag, window, mean in (("goog_in1k", 7, 0.485), ("goog_in1k_384", 12, 0.5), ("goog_in1k_512", 16, 0.5)):
        model = timm.create_model(f"maxvit_tiny.{tag}", device="meta")
        assert windows(model) == {(window, window)}
        assert model.pretrained_cfg["mean"][0] == mean
    assert windows(timm.create_model("maxvit_tiny.goog_in1k_384", img_size=224, device="meta")) == {(7, 7)}


def test_window_is_derived_from_the_image_or_set():
    create = timm.create_model
    assert windows(create("maxvit_tiny", img_size=(256, 320), device="meta")) == {(8, 10)}
    assert windows(create("maxvit_tiny", img_size=256, window_ratio=16, device="meta")) == {(16, 16)}
    assert windows(create("maxvit_tiny", window_size=(4, 6), device="meta")) == {(4, 6)}
    with pytest.raises(ValueError, match="img_size=24 gives no window at window_ratio=32; use at least 32 pixels"):
        create("maxvit_tiny", img_size=24)


def test_set_input_size_resizes_the_tables_and_keeps_what_is_frozen():
    model = timm.create_model("maxvit_pico", num_classes=5).eval()
    model.stages[0].requires_grad_(False)
    model.set_input_size(img_size=(96, 128), window_ratio=16)
    assert windows(model) == {(6, 8)}
    assert table_shapes(model) == {(11, 15)}
    assert not any(parameter.requires_grad for parameter in model.stages[0].parameters())
    assert all(parameter.requires_grad for parameter in model.stages[1].parameters())
    assert model(IMAGE).shape == (2, 5)
    model.set_input_size(window_size=4)
    assert windows(model) == {(4, 4)}
    assert model.img_size == (96, 128)


def test_set_input_size_to_the_same_size_changes_nothing():
    model = timm.create_model("maxvit_pico", num_classes=5).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_input_size()
    model.set_input_size(window_size=4)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_resized_model_is_saved_with_its_windows(tmp_path: Path):
    model = timm.create_model("maxvit_pico", num_classes=5).eval()
    model.set_input_size(img_size=(64, 96), window_size=(2, 3))
    save_model(tmp_path, model)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert windows(again) == {(2, 3)}
    with torch.no_grad():
        assert torch.equal(again(IMAGE), model(IMAGE))


def test_padding_of_odd_maps_stays_out_of_the_pooled_shortcut():
    shortcut = timm.create_model("maxvit_pico").stages[0].blocks[0].conv.shortcut
    x = torch.randn(1, 32, 5, 7)
    pooled = nn.functional.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(shortcut(x), pooled)
