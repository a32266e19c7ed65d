"""What we take from private modules of other libraries does what we take it for; an upgrade fails here by name."""

import inspect
import json
from pathlib import Path

import timm
import torch
from torch import nn

from vicinal import timm_internals


def test_timms_index_rule_of_features():
    assert timm_internals.feature_take_indices(4, 2) == ([2, 3], 3)
    assert timm_internals.feature_take_indices(4, [0, -2]) == ([0, 2], 2)
    assert timm_internals.feature_take_indices(4, None) == ([0, 1, 2, 3], 3)


def test_timms_getter_of_features_gives_nchw_maps():
    model = timm.create_model("test_convnext").eval()
    getter = timm_internals.FeatureGetterNet(model, out_indices=(0, 2))
    maps = getter(torch.zeros(1, 3, 64, 64))
    assert [x.shape[1] for x in maps] == getter.feature_info.channels()
    assert getter.model is model


def test_timms_record_of_a_new_input_size():
    model = timm.create_model("test_vit")
    timm_internals.update_model_input_size(model, (96, 128))
    assert model._model_args["img_size"] == (96, 128)


def test_timms_groups_by_a_matcher():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    matcher = {"stem": r"^0", "blocks": [(r"^(\d)", None)]}
    groups = timm_internals.group_with_matcher(model.named_parameters(), matcher, reverse=True)
    assert groups == {"0.weight": 0, "1.weight": 1, "2.weight": 2}


def test_timms_writer_of_a_hub_config(tmp_path: Path):
    timm_internals.save_config_for_hf(timm.create_model("test_vit", num_classes=3), tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_vit", 3)


def test_nothing_else_of_ours_reads_timms_private_modules():
    root = Path(inspect.getfile(timm_internals)).parent
    rooms = ("zoo", "train", "eval", "checkpoints", "kernels")
    readers = [path for room in rooms for path in (root / room).rglob("*.py") if "timm.models._" in path.read_text()]
    assert readers == []
