"""Every network that timm has too: timm's weights in ours give timm's logits, at the size that it was made for."""

import pytest
import timm
import torch
from golden import fill
from torch import nn

from vicinal.checkpoints import convert
from vicinal.zoo.names import variants

TOO_LARGE = {"davit_giant"}  # two of it are 11 GB
SIZES = {"maxvit_tiny": (224, 384, 512), "maxvit_small": (224, 384, 512)}


def counterparts() -> list[tuple[str, str, dict[str, int]]]:
    """Our name, timm's, and options for ours; MaxViT's weights of three sizes make one network of ours."""
    ours = variants()
    found = []
    for name in ours:
        plain = name.removesuffix("_vicinal")
        if plain in TOO_LARGE:
            continue
        if name != plain and timm.is_model(plain) and plain not in ours:
            found.append((name, plain, {}))
        elif name.startswith("maxvit_") and timm.is_model(f"{name}_tf_224"):
            found += [(name, f"{name}_tf_{size}", {"img_size": size}) for size in SIZES.get(name, (224,))]
    return found


def build_theirs(name: str) -> nn.Module:
    """timm's network with the golden weights, which leave no branch at zero."""
    model = timm.create_model(name).eval()
    state_dict = {key: fill(key, value.shape).to(value.dtype) for key, value in model.state_dict().items()}
    model.load_state_dict(state_dict)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other", "options"), counterparts(), ids=str)
def test_timms_weights_give_timms_logits(name: str, other: str, options: dict[str, int]):
    theirs = build_theirs(other)
    options = {**options, "num_classes": theirs.num_classes}
    ours = timm.create_model(name, **options).eval()
    ours.load_state_dict(convert(name, theirs.state_dict(), **options))
    image = torch.randn(1, *theirs.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        actual, expected = ours(image), theirs(image)
    # the rounding of the parity tests: float32 over some fifty layers, summed in another order
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()
