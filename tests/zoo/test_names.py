"""Names in timm's registry: ours are added, timm's are untouched."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
from timm.models import get_pretrained_cfg, model_entrypoint

import vicinal.zoo
from vicinal.checkpoints import RELEASED, ReleasedWeights
from vicinal.zoo.names import Variant, default_cfgs_of, families, register_variants, variants


def test_names_stand_literally_in_the_tables_of_the_families():
    ours = [name for name in timm.list_models() if is_ours(name)]
    source = "".join(path.read_text() for path in Path(vicinal.zoo.__file__).parent.glob("*.py"))
    assert [name for name in ours if f'"{name}"' not in source] == []


def test_a_name_is_what_the_table_says_whatever_timm_registers(monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("somewhere.else")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    table = {"nat_brand_new": Variant({}), "nat_mini": Variant({})}
    with pytest.raises(
        ValueError, match=r"'nat_mini' of somewhere\.else is registered already, by vicinal\.zoo\.nat: inst"
    ):
        register_variants(module.__name__, table, lambda *_: None)
    assert not timm.is_model("nat_brand_new")
    assert model_entrypoint("nat_mini").__module__ == "vicinal.zoo.nat"


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


def test_a_name_of_timms_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match=r"'resnet50' .* by timm\.models\.resnet: .*timm<1\.1.*such as resnet50_vicinal"
    ):
        register_variants("vicinal.zoo.nat", {"resnet50": Variant({})}, lambda *_: None)
    assert model_entrypoint("resnet50").__module__ == "timm.models.resnet"


def test_released_weights_of_no_variant_are_refused():
    with pytest.raises(ValueError, match=r"released weights \['nat_huge.in1k'\] are of no variant"):
        default_cfgs_of({"nat_mini": Variant({})}, {"nat_huge.in1k": ReleasedWeights()})


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


def test_families_and_their_variants_are_asked_for_by_name():
    assert families() == sorted(
        ("biformer", "convit", "davit", "halonet", "litv2", "maxvit", "nat", "shvit", "transnext")
    )
    assert variants(family="litv2") == ["litv2_pico", "litv2_small", "litv2_medium", "litv2_base"]
    assert variants("*_pico*", "halonet") == ["halonet_pico", "lamhalobotnet_pico"]
    assert sorted(variants()) == sorted(
        name for name in timm.list_models() if is_ours(name) and name != "attentive_probe"
    )
    with pytest.raises(ValueError, match=r"family='lit' is not registered; there are .*litv2"):
        variants(family="lit")
