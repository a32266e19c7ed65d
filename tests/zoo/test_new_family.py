"""A family from outside the package is a timm citizen: docs/examples/new_family.py, as a user would write it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from vicinal.checkpoints import convert

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "new_family.py"


@pytest.fixture(scope="module")
def family() -> ModuleType:
    spec = importlib.util.spec_from_file_location("new_family", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(family: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("two_views_nano", num_classes=7).eval()


def published(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights under the names of the repository that the example invents."""
    names = (("stem.", "patch."), ("head.fc.", "classifier."), ("downsample.", "down."), ("blocks.", ""))
    state_dict = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (*names, ("stages.", "body.")):
            key = key.replace(ours, theirs)  # noqa: PLW2901 (each rule acts on what the one before left)
        state_dict[key] = value
    return state_dict


def test_weights_of_the_foreign_layout_give_the_same_logits(model: torch.nn.Module):
    image = torch.randn(2, 3, 50, 70)
    other = timm.create_model("two_views_nano", num_classes=7).eval()
    assert not torch.equal(other(image), model(image))
    other.load_state_dict(convert("two_views_nano", published(model)))
    assert torch.equal(other(image), model(image))


def test_a_file_of_the_foreign_layout_loads_through_timm(model: torch.nn.Module, tmp_path: Path):
    save_file(published(model), tmp_path / "published.safetensors")
    overlay = {"file": str(tmp_path / "published.safetensors"), "num_classes": 7}
    loaded = timm.create_model("two_views_nano", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))


def test_a_subclass_in_any_file_loads_the_layout_too(family: ModuleType, model: torch.nn.Module):
    class Wider(family.TwoViews):
        __module__ = "models"

    wider = Wider(num_classes=7).eval()
    wider.load_state_dict(wider.adapt_state_dict(published(model)))
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(wider(image), model(image))


def test_features_are_its_stages(model: torch.nn.Module):
    pyramid = timm.create_model("two_views_nano", features_only=True, out_indices=(0, 2))
    assert pyramid.feature_info.channels() == [32, 128]
    assert [tuple(x.shape) for x in pyramid(torch.randn(1, 3, 64, 96))] == [(1, 32, 16, 24), (1, 128, 4, 6)]


def test_its_exported_graph_gives_its_logits_at_another_size(model: torch.nn.Module):
    sides = {2: torch.export.Dim("height", min=40, max=128), 3: torch.export.Dim("width", min=40, max=128)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 80),), dynamic_shapes=(sides,))
    image = torch.randn(2, 3, 50, 94)
    torch.testing.assert_close(program.module()(image), model(image))


def test_the_example_runs_as_it_stands(family: ModuleType, capsys: pytest.CaptureFixture):
    family.main()
    assert capsys.readouterr().out.splitlines() == [
        "torch.Size([1, 10])",
        "[(1, 32, 16, 24), (1, 64, 8, 12), (1, 128, 4, 6)]",
        "torch.Size([5, 10])",
    ]
