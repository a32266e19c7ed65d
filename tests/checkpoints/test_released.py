"""The table of released weights against the authors' figures, which the golden files and the README repeat."""

import re
from pathlib import Path

import pytest
from golden import Golden, list_golden

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import RELEASED

README = Path(__file__).parents[2] / "README.md"
FAMILIES = ("nat", "dinat", "davit", "shvit", "litv2", "maxvit", "transnext", "convit", "halonet", "biformer")
# What the golden files do not hold, of other sizes, of papers and of ImageNet-21k: accuracy by tag.
OTHERS = {
    "convit_tiny_vicinal.fb_in1k": 73.1,
    "convit_small_vicinal.fb_in1k": 81.3,
    "convit_base_vicinal.fb_in1k": 82.4,
    "litv2_base.ziplab_in1k_384": 84.7,
    "transnext_small.in1k_ft_in1k_384": 86.0,
    "transnext_base.in1k_ft_in1k_384": 86.2,
    "maxvit_tiny.goog_in1k_384": 85.24,
    "maxvit_tiny.goog_in1k_512": 85.72,
    "maxvit_small.goog_in1k_384": 85.74,
    "maxvit_small.goog_in1k_512": 86.19,
    "maxvit_base.goog_in1k_384": 86.34,
    "maxvit_base.goog_in1k_512": 86.66,
    "maxvit_large.goog_in1k_384": 86.40,
    "maxvit_large.goog_in1k_512": 86.70,
    **{
        f"maxvit_{size}.goog_{kind}": None
        for size in ("base", "large", "xlarge")
        for kind in ("in21k", "in21k_ft_in1k_384", "in21k_ft_in1k_512")
    },
    "dinat_large_21k.shi_in22k": None,
    "dinat_large_21k_11x11.shi_in22k": None,
    "dinat_s_large_21k.shi_in22k": None,
}
CLASSES = {"in22k": 21841, "in21k": 21843}
LICENCES = {"shi": "mit", "shvit": "mit", "biformer": "mit"}
# Google's normalisation, of all but the weights for 224 pixels.
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def authors_top1(golden: Golden) -> float | None:
    """Of the authors' repository, or timm's measurement of timm's own weights."""
    published = golden.data.get("published_readme") or {}
    return published.get("top1") or (golden.data.get("timm_results_csv_top1") if "halo" in golden.variant else None)


def expected_top1() -> dict[str, float | None]:
    """By tag; weights of a golden variant's native size are the first of its name."""
    found = {}
    for golden in list_golden(*FAMILIES):
        tag = next((tag for tag in RELEASED if tag.split(".")[0] == golden.name), None)
        if tag and not golden.model_args and tag not in OTHERS:
            found[tag] = authors_top1(golden)
    return {**found, **OTHERS}


def test_every_accuracy_is_the_authors():
    assert {tag: weights.top1 for tag, weights in RELEASED.items()} == expected_top1()


def test_the_readme_shows_the_accuracies_of_the_native_size():
    rows = re.findall(r"^\| `(\w+)` \| (\d+)x\d+ \| [\d.]+ \| [\d.]+ \| ([\d.]*) \|$", README.read_text(), re.MULTILINE)
    assert len(rows) > 80
    shown = {name: top1 for name, _, top1 in rows}
    native = {tag.split(".")[0]: weights.top1 for tag, weights in reversed(RELEASED.items())}
    for name, top1 in shown.items():
        expected = native.get(name)
        assert top1 == ("" if expected is None else f"{expected:.1f}"), name
    assert {name for name, top1 in native.items() if top1 is not None} <= set(shown)


@pytest.mark.parametrize("tag", RELEASED)
def test_classes_licence_and_preprocessing_follow_the_tag(tag: str):
    weights = RELEASED[tag]
    name, kind = tag.split(".")
    assert weights.num_classes == next((count for ending, count in CLASSES.items() if kind.endswith(ending)), 1000)
    family = "shi" if kind.startswith("shi_") else name.partition("_")[0]
    assert weights.license == LICENCES.get(family, "apache-2.0")
    assert bool(weights.url) != bool(weights.hf_hub_id)
    assert weights.url.startswith("https://") or weights.hf_hub_id.startswith("timm/")
    assert weights.origin.startswith("https://github.com/")
    size = next((int(pixels) for pixels in ("384", "512") if kind.endswith(f"_{pixels}")), None)
    expected: dict[str, object] = {}
    if name.startswith("maxvit_") and kind != "goog_in1k":
        expected |= HALF
    if size:
        expected |= {"input_size": (3, size, size), "pool_size": (size // 32,) * 2, "crop_pct": 1.0}
        expected |= {} if name.startswith("litv2_") else {"crop_mode": "squash"}
    assert weights.cfg == expected
