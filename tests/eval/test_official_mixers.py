"""The official forms of the mixers, which the benchmark measures ours against, compute the same, gradients included."""

import pytest
import timm
import torch
from torch import nn

from vicinal.eval.bench.models import AttentionModules
from vicinal.eval.bench.official_mixers import official_form, official_mixers


def modules(name: str, height: int = 64, width: int = 96) -> AttentionModules:
    torch.manual_seed(0)
    model = timm.create_model(name).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # so that no term is too small to show
    return AttentionModules(model, torch.randn(2, 3, height, width, dtype=torch.float64))


@pytest.mark.parametrize("size", [(64, 96), (120, 72)], ids=str)
@pytest.mark.parametrize("name", ["transnext_pico", "biformer_pico", "litv2_pico"])
def test_the_same_numbers_and_gradients(name: str, size: tuple[int, int]):
    attention = modules(name, *size)
    for ours, image in zip(attention.parts, attention.inputs, strict=True):
        results = []
        for module in (ours, official_form(ours, image)):
            leaves = [image, *ours.parameters()]
            output = module(image)
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True)))
        for actual, expected in zip(*results, strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * scale + 1e-12)


def test_all_mixers_of_a_network_or_none():
    attention = modules("litv2_pico")
    official = official_mixers(attention.parts, attention.inputs)
    torch.testing.assert_close(official(None), attention(None), rtol=1e-9, atol=0)
    for name in ("nat_pico", "biformer_stl_nchw"):
        attention = modules(name, 64, 64)
        assert official_mixers(attention.parts, attention.inputs) is None
