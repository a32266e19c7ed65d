"""The models against the official networks: parameters, logits, stage features and gradients, from the golden files.

Tolerances: the official networks' own float32 noise is 1e-6 to 6e-6 of the logits' deviation (recorded in the golden
files); 1e-4 leaves room for another order of summation over some twenty blocks and none for another formula.
"""

import pytest
import timm
import torch
from golden import Golden, gradient_norms, list_golden, probe

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import convert
from vicinal.checkpoints.convert import find_layout

GOLDEN = list_golden("nat", "dinat", "davit", "shvit", "litv2", "maxvit", "transnext", "convit", "halonet", "biformer")
# MaxViT's bias tables move its logits by no more than 5e-4 of their deviation.
TOLERANCES = {"maxvit": 3e-5}
WITH_FIGURES = [golden for golden in GOLDEN if golden.data["golden"]]
WITH_GRADIENTS = [golden for golden in WITH_FIGURES if "grad_probe" in golden.data]


def create(golden: Golden, tag: str = "default") -> torch.nn.Module:
    options = golden.options(tag)
    model = timm.create_model(golden.name, **options)
    model.load_state_dict(convert(golden.name, golden.state_dict(tag), **options))
    return model.eval()


def list_features(model: torch.nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Maps (B, C, H, W): "stem", "stage0" behind the blocks of a stage, and "stage0_norm" behind the stage's norm."""
    maps = {}
    taps = {"stem": model.stem, "norm": model.norm}
    for index, stage in enumerate(model.stages):
        taps |= {f"stage{index}": stage.blocks, f"stage{index}_norm": stage}
    hooks = [
        module.register_forward_hook(lambda _, __, output, key=key: maps.setdefault(key, output))
        for key, module in taps.items()
    ]
    model.forward_features(image)
    for hook in hooks:
        hook.remove()
    tokens = {f"{key}_tokens": x for key, x in maps.items() if x.ndim == 3}
    maps = {key: model.as_map(x, maps["stem"]) for key, x in maps.items()}
    return tokens | {key: x.permute(0, 3, 1, 2) if model.output_fmt == "NHWC" else x for key, x in maps.items()}


@pytest.mark.parametrize("golden", GOLDEN, ids=repr)
def test_official_keys_and_parameter_count(golden: Golden):
    shapes = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    model = timm.create_model(golden.name, device="meta", **golden.model_args)
    model.load_state_dict(convert(golden.name, shapes, **golden.model_args), strict=True, assign=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == golden.data["params"]


@pytest.mark.parametrize(
    ("golden", "tag"),
    [(golden, tag) for golden in WITH_FIGURES for tag in golden.data["inputs"]],
    ids=str,
)
def test_logits_and_features(golden: Golden, tag: str):
    model = create(golden, tag)
    image = golden.image(tag)
    with torch.no_grad():
        logits, features = model(image), list_features(model, image)
    expected = golden.logits[tag]
    assert (logits - expected).abs().max() <= TOLERANCES.get(golden.data["family"], 1e-4) * expected.std()
    for key, figures in golden.data["features"].get(tag, {}).items():
        # "block5" of an isotropic network, whose stages are single blocks
        feature = features[key.replace("block", "stage").removesuffix("_patches")]
        assert list(feature.shape) == figures["shape"]
        assert feature.double().mean().item() == pytest.approx(figures["mean"], abs=1e-4 * figures["std"])
        assert feature.double().std(correction=0).item() == pytest.approx(figures["std"], rel=1e-4)
        difference = probe(feature) - torch.tensor(figures["values"])
        assert difference.abs().max() <= 1e-4 * figures["std"]


@pytest.mark.parametrize("golden", WITH_GRADIENTS, ids=repr)
def test_gradients(golden: Golden):
    model = create(golden).train()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.eval()
    loss, norms = gradient_norms(model, golden.image("default"))
    expected = golden.data["grad_probe"]
    scale = golden.logits["default"].std().item() * golden.logits["default"].numel() ** 0.5
    assert loss == pytest.approx(expected["loss"], abs=1e-4 * scale)
    layout = find_layout(model.layouts, golden.shapes)
    official = {layout.rename_key(key): norm for key, norm in expected["norms"].items()}
    assert set(official) == set(norms)
    for name, norm in official.items():
        # norms below 1e-6 are zeros of the mathematics, reached by cancellation
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name
