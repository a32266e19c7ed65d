"""Names in timm's registry: ours are added, timm's are untouched."""

import subprocess
import sys

import pytest
import timm
from timm.models import get_pretrained_cfg, model_entrypoint

import vicinal.zoo
from vicinal.checkpoints import RELEASED
from vicinal.zoo import names
from vicinal.zoo.names import Variant, register_variants, registered_name


def test_names_that_timm_owns_get_a_suffix():
    assert registered_name("davit_tiny") == "davit_tiny_vicinal"
    assert registered_name("davit_not_in_timm_yet") == "davit_not_in_timm_yet_vicinal"
    assert registered_name("resnet50") == "resnet50_vicinal"


def test_our_own_names_keep_their_form_when_asked_again():
    assert registered_name("nat_mini") == "nat_mini"


def test_timms_own_models_are_untouched_by_the_import():
    script = (
        "import timm; from timm.models import model_entrypoint, list_models;"
        "before = {name: model_entrypoint(name) for name in list_models()};"
        "tags = set(timm.list_models(pretrained=True));"
        "import vicinal.zoo;"
        "assert all(model_entrypoint(name) is entry for name, entry in before.items());"
        "assert tags <= set(timm.list_models(pretrained=True));"
        "print(len(set(list_models()) - set(before)))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) == len([name for name in timm.list_models() if is_ours(name)])


def is_ours(name: str) -> bool:
    return model_entrypoint(name).__module__.startswith("vicinal.")


def test_somebody_elses_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(names, "registered_name", lambda name: name)
    with pytest.raises(ValueError, match=r"'resnet50' is registered by timm\.models\.resnet"):
        register_variants("vicinal.zoo.nat", {"resnet50": Variant({})}, lambda *_: None)
    assert model_entrypoint("resnet50").__module__ == "timm.models.resnet"


@pytest.mark.parametrize("tag", sorted(RELEASED))
def test_every_released_checkpoint_is_a_tag_of_a_registered_model(tag: str):
    cfg = get_pretrained_cfg(tag, allow_unregistered=False)
    assert cfg.url == RELEASED[tag].url
    assert cfg.num_classes == RELEASED[tag].num_classes
    assert cfg.has_weights


def test_a_22k_name_has_the_weights_classes_only_with_the_weights():
    assert timm.create_model("dinat_large_21k", device="meta").num_classes == 1000
    assert get_pretrained_cfg("dinat_large_21k").num_classes == 21841


def test_all_is_the_network_classes_and_the_entry_points():
    assert "nat_mini" in vicinal.zoo.nat.__all__
    assert vicinal.zoo.nat.nat_mini is model_entrypoint("nat_mini")
