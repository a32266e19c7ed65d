"""Conversion is strict and reports everything at once; released weights load through timm from a server."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from golden import Golden, list_golden

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import convert, save_model
from vicinal.zoo.names import variants

FAMILIES = ("nat", "dinat", "davit", "shvit", "maxvit", "litv2", "convit", "halonet", "biformer")
BY_NAME = {golden.name: golden for golden in list_golden(*FAMILIES, "transnext") if not golden.model_args}
SMALLEST = [
    "nat_mini",
    "dinat_s_tiny",
    "nat_isotropic_small",
    "vitrpb_small",
    "davit_tiny_vicinal",
    "shvit_s1_vicinal",
    "litv2_small",
    "convit_tiny_vicinal",
    "maxvit_tiny",
    "transnext_micro",
    "halonet26t_vicinal",
    "biformer_tiny",
    "biformer_stl",
    "biformer_stl_nchw",
]


@pytest.mark.parametrize("name", SMALLEST)
def test_one_error_lists_every_problem(name: str):
    state_dict = BY_NAME[name].state_dict()
    keys = list(state_dict)
    missing, reshaped = keys[4], keys[-4]
    del state_dict[missing]
    state_dict[reshaped] = torch.zeros(3, 5)
    state_dict["surplus"] = torch.zeros(2)
    with pytest.raises(ValueError, match="does not fit") as error:
        convert(name, state_dict)
    lines = str(error.value).split("\n")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["missing", "left over", "shape"]
    assert "surplus" in str(error.value)
    assert "is (3, 5), expected" in str(error.value)


@pytest.mark.parametrize("name", SMALLEST)
def test_our_own_state_dict_comes_back_unchanged(name: str):
    state_dict = timm.create_model(name, num_classes=3).state_dict()
    converted = convert(name, state_dict)
    assert list(converted) == list(state_dict)


WITH_BATCH_NORMS = ["shvit_pico_vicinal", "maxvit_pico", "litv2_pico", "halonet_pico", "biformer_pico"]


@pytest.mark.parametrize("name", WITH_BATCH_NORMS)
def test_the_counters_of_batch_norms_may_be_missing(name: str, tmp_path: Path):
    """Old files lack them, and exported ones; nothing is computed from them."""
    full = timm.create_model(name, num_classes=1000)
    for key, value in full.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_()
    bare = {key: value for key, value in full.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(bare) < len(full.state_dict())
    converted = convert(name, bare)
    assert set(converted) == set(full.state_dict())
    save_model(tmp_path, full, bare)
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    ours = timm.create_model(name, num_classes=1000)
    ours.load_state_dict(converted)
    for model in (ours, by_timm):
        for key, value in model.state_dict().items():
            expected = bare.get(key, torch.tensor(0))
            assert torch.equal(value, expected), key
            assert value.dtype == expected.dtype
    with pytest.raises(ValueError, match=r"missing: .*running_var"):
        convert(name, {key: value for key, value in bare.items() if not key.endswith("running_var")})


def test_key_order_does_not_matter():
    golden = BY_NAME["dinat_s_tiny"]
    state_dict = golden.state_dict()
    backwards = dict(reversed(state_dict.items()))
    assert set(convert(golden.name, backwards)) == set(convert(golden.name, state_dict))


def test_a_classifier_of_another_size_is_read_from_the_weights():
    state_dict = BY_NAME["nat_mini"].state_dict()
    state_dict["head.weight"], state_dict["head.bias"] = torch.zeros(21841, 512), torch.zeros(21841)
    assert convert("nat_mini", {"model": state_dict})["head.fc.weight"].shape == (21841, 512)
    with pytest.raises(ValueError, match=r"head\.fc\.weight is \(21841, 512\), expected \(1000, 512\)"):
        convert("nat_mini", state_dict, num_classes=1000)


@pytest.mark.parametrize("name", ["davit_tiny", "shvit_s1"])
def test_timms_layout_gives_the_same_logits(name: str):
    theirs = timm.create_model(name, num_classes=5).eval()
    ours = timm.create_model(f"{name}_vicinal", num_classes=5).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)  # nothing hides behind a zero of the initialisation
    ours.load_state_dict(convert(f"{name}_vicinal", theirs.state_dict()))
    image = torch.randn(1, 3, 96, 130)
    with torch.no_grad():
        expected = theirs(image)
        assert (ours(image) - expected).abs().max() <= 1e-5 * expected.std()


def test_unknown_and_foreign_names_are_refused():
    with pytest.raises(ValueError, match="unknown model 'nat_gigantic'"):
        convert("nat_gigantic", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="'davit_tiny' is timm's own model; ours is davit_tiny_vicinal"):
        convert("davit_tiny", {"a": torch.zeros(1)})


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def create_pretrained(golden: Golden, url: str, cache: Path, **kwargs: object) -> torch.nn.Module:
    overlay = {"url": url, "hf_hub_id": None}
    return timm.create_model(
        golden.name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache, **kwargs
    ).eval()


@pytest.mark.parametrize("name", ["dinat_mini", "davit_tiny_vicinal"])
def test_released_files_load_by_url_in_their_official_layout(name: str, served: tuple[Path, str], tmp_path: Path):
    folder, address = served
    golden = BY_NAME[name]
    torch.save({"state_dict": golden.state_dict(), "epoch": 300}, folder / "official.pth")
    model = create_pretrained(golden, f"{address}/official.pth", tmp_path / "cache")
    features = create_pretrained(golden, f"{address}/official.pth", tmp_path / "cache", features_only=True)
    other_head = create_pretrained(golden, f"{address}/official.pth", tmp_path / "cache", num_classes=5, in_chans=1)
    image = golden.image("default")[:1]
    with torch.no_grad():
        logits, maps = model(image), features(image)
        assert (logits - golden.logits["default"][:1]).abs().max() <= 1e-4 * golden.logits["default"].std()
        assert torch.equal(maps[-1], model.forward_intermediates(image, intermediates_only=True)[-1])
        assert other_head(image[:, :1]).shape == (1, 5)


def test_global_attention_tables_are_resized_to_another_image_size(served: tuple[Path, str], tmp_path: Path):
    folder, address = served
    golden = BY_NAME["vitrpb_small"]
    torch.save(golden.state_dict(), folder / "vit.pth")
    at_224 = create_pretrained(golden, f"{address}/vit.pth", tmp_path / "cache")
    at_288 = create_pretrained(golden, f"{address}/vit.pth", tmp_path / "cache", img_size=288)
    table = at_288.stages[0].blocks[0].attn.relative_position_bias
    assert table.shape == (12, 35, 35)
    image = torch.randn(1, 3, 288, 288)
    with torch.no_grad():
        resized_on_the_fly, resized_on_loading = at_224(image), at_288(image)
    # two interpolations of the same table: close, and unlike the network without any bias
    assert (resized_on_the_fly - resized_on_loading).norm() < 0.05 * resized_on_loading.norm()


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 3}, {"features_only": True}], ids=str)
@pytest.mark.parametrize("name", [name for name in variants() if "_pico" in name])
def test_whole_weights_load_into_a_network_with_less_or_another_head(name: str, options: dict, tmp_path: Path):
    whole = timm.create_model(name).state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    overlay = {"file": str(tmp_path / "whole.pth")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    loaded = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    classifiers = model.pretrained_cfg["classifier"] if "num_classes" in options else ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    for key, value in loaded.items():
        if not key.startswith(classifiers):
            assert torch.equal(value, whole[key]), key
