"""The MLP that streams large hidden maps computes what timm's does, and leaves it to the layers where it must."""

import pytest
import torch
from timm import layers
from torch import Tensor, nn

from vicinal.zoo.blocks import mlp
from vicinal.zoo.blocks.activation import GELU, GELUTanh


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mlp, "LARGE_HIDDEN", 1)
    monkeypatch.setattr(mlp, "HIDDEN_IN_CACHE", 200)


def build(act_layer: type[nn.Module] = GELU, **options: object) -> tuple[mlp.Mlp, layers.Mlp, Tensor]:
    torch.manual_seed(0)
    ours = mlp.Mlp(12, 40, act_layer=act_layer, **options)
    theirs = layers.Mlp(12, 40, act_layer=act_layer, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(2, 3, 7, 12)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen = []
    apply = mlp._StreamedMlp.apply
    monkeypatch.setattr(mlp._StreamedMlp, "apply", lambda *args: seen.append("streamed") or apply(*args))
    return seen


@pytest.mark.parametrize("act_layer", [GELU, GELUTanh])
@pytest.mark.parametrize("frozen", [(), ("fc1",), ("fc2",), ("fc1", "fc2")], ids="+".join)
@pytest.mark.parametrize("needs_input", [True, False])
def test_numbers_and_gradients(act_layer: type, frozen: tuple, needs_input: bool, monkeypatch: pytest.MonkeyPatch):
    ours, theirs, x = build(act_layer)
    seen, results = calls(monkeypatch), []
    for module in (ours, theirs):
        for name in frozen:
            getattr(module, name).requires_grad_(False)
        image = x.clone().requires_grad_(needs_input)
        output = module(image)
        if output.requires_grad:
            output.square().sum().backward()
        results.append([output, image.grad, *(parameter.grad for parameter in module.parameters())])
    assert seen == ["streamed"]
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_layers_compute_where_someone_looks_or_precision_is_low(monkeypatch: pytest.MonkeyPatch):
    seen = calls(monkeypatch)
    ours, theirs, x = build()
    handle = ours.act.register_forward_hook(lambda *_: seen.append("hook"))
    torch.testing.assert_close(ours(x), theirs(x))
    assert seen == ["hook"]
    handle.remove()
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    with torch.no_grad():
        ours(x)
    assert ours.double()(x.double()).dtype == torch.float64
    build(drop=0.5)[0](x)
    ours, _, _ = build()
    nn.utils.parametrizations.weight_norm(ours.fc1)
    ours(x)
    assert seen == []


def test_graphs_hold_the_layers(monkeypatch: pytest.MonkeyPatch):
    seen = calls(monkeypatch)
    ours, theirs, x = build()
    expected = theirs(x)
    scripted = torch.jit.script(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for graph in (scripted, torch.fx.symbolic_trace(ours), compiled, torch.export.export(ours, (x,)).module()):
        torch.testing.assert_close(graph(x), expected)
    assert seen == []


def test_second_derivatives():
    ours, theirs, x = build()
    results = []
    for module in (ours, theirs):
        image = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(image).square().sum(), image, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [image, *module.parameters()]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
