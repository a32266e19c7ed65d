"""Whole models: the same logits and gradients with fused kernels as with tiled operators."""

import pytest
import timm
import torch
from torch import Tensor

import vicinal.zoo  # noqa: F401 (registers the models)
from vicinal.kernels import backend

MODELS = ["transnext_pico", "biformer_pico", "nat_pico", "davit_pico_vicinal"]
SLOW_MODELS = ["dinat_pico", "maxvit_pico", "litv2_pico", "halonet_pico", "lamhalobotnet_pico"]


def logits_and_gradients(model: torch.nn.Module, images: Tensor, name: str) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    with backend(name):
        logits = model(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(parameters.values()))
    return {"logits": logits.detach(), **dict(zip(parameters, gradients, strict=True))}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODELS)])
def test_fused_and_tiled_models_agree(name: str) -> None:
    """Up to float32 rounding, 6e-8, in sums of some hundred terms; errors count beside the largest gradient."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()  # batch norms need more than one value in training
    images = torch.randn(1, *model.default_cfg["input_size"])
    fused, tiled = (logits_and_gradients(model, images, backend_name) for backend_name in ("fused", "tiled"))
    largest = max(tensor.abs().max().item() for tensor in tiled.values())
    for key, tensor in fused.items():
        torch.testing.assert_close(tensor, tiled[key], rtol=1e-4, atol=1e-5 * largest, msg=key)
