"""pytest plugin: timm's own tests/test_models.py, unchanged, on the models that vicinal registers.

timm parametrises its tests over ``timm.list_models``; here that function answers with our names only. Tests that name
their models in a mark are pointed at ours. The names come from ``VICINAL_ACCEPTANCE`` (comma separated).
"""

import os

import pytest
import timm
import timm.models
from package_under_test import use_package
from timm.models import get_arch_name

use_package(os.environ["VICINAL_PACKAGE"])
import vicinal.zoo  # noqa: E402, F401 (of the package that is under test)

NAMES = os.environ["VICINAL_ACCEPTANCE"].split(",")
# Tests whose body holds for any standard model, although timm lists a few.
RETARGETED = {
    "test_reset_classifier_keeps_pool",
    "test_features_only_grad_checkpointing_backward",
    "test_feature_getter_stage_ends_torchscript",
    "test_prune_intermediate_layers_params_used",
    "test_head_hidden_size",
    "test_headless_checkpoint_reload",
    "test_model_init_weights_after_to_empty",
}
# timm asks it of four models. Its image of 64 pixels leaves these one position, whose average is its maximum, and
# timm's own shvit does not pass it either.
NO_POOL_TO_KEEP = "shvit_"
MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward")

_list_models = timm.list_models


def list_our_models(filter="", module="", pretrained=False, *args, **kwargs):
    if pretrained:
        return []  # those tests download weights
    # a list of modules is timm's list of families with forward_intermediates: all of ours have it
    module = "" if isinstance(module, (list, tuple)) else module
    return [name for name in _list_models(filter, module, pretrained, *args, **kwargs) if get_arch_name(name) in NAMES]


timm.list_models = timm.models.list_models = list_our_models


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: one of timm's")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ not in RETARGETED:
        return
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name == "parametrize" and "model_name" in mark.args[0]:
            with_options = "," in mark.args[0]
            values = [(name, {}) for name in NAMES] if with_options else NAMES
            marks[index] = pytest.mark.parametrize(mark.args[0], values).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours, others = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        name = get_arch_name(str(parameters.get("model_name", "")))
        excused = name.startswith(NO_POOL_TO_KEEP) and item.originalname == "test_reset_classifier_keeps_pool"
        (ours if name in NAMES and not excused else others).append(item)
    items[:] = ours
    config.hook.pytest_deselected(items=others)
