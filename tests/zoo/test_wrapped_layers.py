"""Linear layers that something else stands for: adapters, which have no weight of their own, and dynamic int8.

A network that reads a layer's weight, device or dtype instead of calling the layer breaks under both, or bypasses them.
"""

import copy

import pytest
import timm
import torch
from test_accelerate import CASES
from test_accelerate import create as create_timms
from test_accelerate import image as image_of
from torch import Tensor, nn

from vicinal.zoo import accelerate
from vicinal.zoo.names import variants

NAMES = variants("*_pico*")
PROBE = "attentive_probe"
ACCELERATED = ["swin_padded", "maxvit_rmlp", "maxvit_parallel", "coatnet", "davit", "convit", "halonet"]


class Adapter(nn.Module):
    """A low-rank update (LoRA) around a layer; whatever is read of it but its forward is an error."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        dd = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, **dd)
        self.up = nn.Linear(2, base.out_features, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def wrap(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy with an adapter around every linear layer, and one whose weights have the updates merged into them."""
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        adapter = Adapter(adapted.get_submodule(name))
        adapted.set_submodule(name, adapter)
        with torch.no_grad():
            merged.get_submodule(name).weight.add_(adapter.up.weight @ adapter.down.weight)
    return adapted, merged


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **({"backbone": "convit_pico_vicinal"} if name == PROBE else {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # a residual branch that begins as zero would hide what is in it
    return model.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 70, 52, generator=torch.Generator().manual_seed(1))


def assert_adapters_work(model: nn.Module, batch: Tensor, rounding: float) -> None:
    adapted, merged = wrap(model)
    adapters = {name: module for name, module in adapted.named_modules() if isinstance(module, Adapter)}
    fired = set()
    for name, module in adapters.items():
        module.register_forward_hook(lambda _, __, ___, name=name: fired.add(name))
    with torch.no_grad():
        expected = merged(batch)
        assert (adapted(batch) - expected).abs().max() <= rounding * expected.std()
        # the update is large enough that one left out would be seen
        assert (model(batch) - expected).abs().max() > 0.1 * expected.std()
    assert fired == set(adapters)


@pytest.mark.parametrize("name", [*NAMES, PROBE])
def test_an_adapter_around_every_linear_layer_is_its_merged_weight(name: str):
    # float32 over some ten layers, summed in another order
    assert_adapters_work(create(name), image(), 1e-4)


@pytest.mark.parametrize("name", ACCELERATED)
def test_accelerated_models_take_adapters(name: str):
    model = create_timms(CASES[name])
    accelerate(model)
    # float64, as in the tests of acceleration
    assert_adapters_work(model, image_of(CASES[name]), 1e-10)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize("name", NAMES)
def test_every_convolution_is_called(name: str):
    """With an image of several channels: a map (B, C, H, W), not the channels-last map that the network holds."""
    model, seen = create(name), {}
    for key, module in convolutions(model).items():
        module.register_forward_hook(lambda _, inputs, __, key=key: seen.update({key: inputs[0].shape[1]}))
    with torch.no_grad():
        model(image())
    assert seen == {key: module.in_channels for key, module in convolutions(model).items()}


def assert_int8_is_near(model: nn.Module, batch: Tensor) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    with torch.no_grad():
        expected = model(batch)
        difference = (quantized(batch) - expected).norm() / (expected - expected.mean()).norm()
    # eight bits round a layer's weights and inputs by about 1 % of their deviation; some ten layers, and routes and
    # samples that move, add up to several times that
    assert 0 < difference < 0.2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*NAMES, PROBE])
def test_dynamic_int8_is_near_the_float_network(name: str):
    assert_int8_is_near(create(name), image())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["swin_padded", "maxvit_rmlp", "davit", "convit"])
def test_dynamic_int8_of_accelerated_models(name: str):
    model = create_timms(CASES[name]).float()
    accelerate(model)
    # convit's coordinates are made in the first forward pass, here that of the quantized copy
    assert_int8_is_near(model, image_of(CASES[name]).float())


def test_position_scores_keep_their_distances_in_bfloat16():
    """Squared distances up to 2 * 23 ** 2; bfloat16 has no odd numbers beyond 256."""
    model = timm.create_model("convit_pico_vicinal", dtype=torch.bfloat16)
    attention = model.stages[0].blocks[0].attn
    scores = attention.position_scores(torch.empty(1, 1, 24, 128, dtype=torch.bfloat16))
    weight, bias = attention.pos_proj.weight.double(), attention.pos_proj.bias.double()
    dx = torch.arange(24.0, dtype=torch.float64)
    expected = weight @ torch.stack([dx, 0 * dx, dx.square()]) + bias[:, None]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, 0].double(), expected, rtol=1e-6, atol=1e-6)
