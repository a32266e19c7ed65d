"""The models as graphs: torch.compile, torch.export and ONNX keep the numbers, at sizes other than the traced one."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.export import Dim

from vicinal.zoo.names import variants

# One of each family and layout, debug-sized. vitrpb is cut to two blocks.
MODELS: dict[str, dict[str, Any]] = {name: {} for name in variants("*_pico*")} | {
    "dinat_s_tiny": {"embed_dim": 32, "depths": (1, 2), "num_heads": (1, 2), "dilations": (1, 2), "kernel_size": 3},
    "vitrpb_small": {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64},
}
# Even and odd maps, divisible by nothing in particular; the first one traces the graph.
SIZES = [(2, 64, 96), (1, 72, 81), (3, 131, 70)]
# With a stride of 64 the last map would have one row, which torch takes for a constant, as it does every size of 1.
SCALES = {"shvit_pico_vicinal": 2}
# A batch norm over vectors does not train on a single image; after one over its map, the average of the map is zero.
MANY = {"shvit_pico_vicinal", "biformer_pico"}
# Deep chains of symbolic sizes, which ONNX export reasons about for a minute or more.
SLOW_TO_TRACE = {"dinat_pico", "maxvit_pico", "transnext_pico", "litv2_pico", "biformer_pico", "lamhalobotnet_pico"}
names = pytest.mark.parametrize("name", MODELS)
names_by_tracing_time = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_TO_TRACE else ()) for name in MODELS]
)

ROUNDING = 2 * torch.finfo(torch.float32).eps
"""Of sums of numbers of size one: what is left of gradients that would be zero without it."""


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **MODELS[name]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # a residual branch that begins as zero would hide what is in it
    return model


def create_unfused(name: str) -> nn.Module:
    set_fused_attn(False)
    try:
        return create(name)
    finally:
        set_fused_attn(True)


def images(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = SCALES.get(name, 1)
    return [torch.randn(batch, 3, scale * height, scale * width, generator=generator) for batch, height, width in SIZES]


def training_images(name: str) -> list[Tensor]:
    return [image for image in images(name) if len(image) > 1 or name not in MANY]


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    # float32 kernels of another graph sum in another order, over some ten layers
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


@names
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_without_graph_breaks_trains(name: str, dynamic: bool):
    torch._dynamo.reset()
    model, eager = create(name).train(), create(name).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for image in training_images(name) if dynamic else training_images(name)[:1]:
        model.zero_grad()
        eager.zero_grad()
        actual, expected = compiled(image), eager(image)
        actual.square().sum().backward()
        expected.square().sum().backward()
        assert_same_numbers(actual, expected)
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert (ours.grad - theirs.grad).abs().max() <= 1e-3 * theirs.grad.abs().max() + ROUNDING


@pytest.mark.slow
@names
def test_compile_with_inductor(name: str):
    torch._dynamo.reset()
    model = create(name)
    compiled = torch.compile(model, fullgraph=True)
    image = images(name)[0]
    with torch.no_grad():
        assert_same_numbers(compiled(image), model(image))


@names
def test_compiled_maps_of_known_size_are_not_cropped_by_an_index(name: str):
    """An index leaves no guard on a size that is a symbol, but its gradient is a scatter."""
    found: set[str] = set()

    def collect(graph: torch.fx.GraphModule, _: list[Tensor]):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    model, image = create(name), images(name)[0]
    with torch.no_grad():
        assert_same_numbers(torch.compile(model, fullgraph=True, dynamic=False, backend=collect)(image), model(image))
    assert found
    assert "index_select" not in found


@names
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(name: str):
    model, image = create(name), images(name)[0]
    traced = torch.jit.trace(model, image)
    with torch.no_grad():
        assert_same_numbers(traced(-image), model(-image))


def dynamic_shapes(name: str) -> tuple:
    least = 64 * SCALES.get(name, 1)
    return (
        {0: Dim("batch", min=1, max=64), 2: Dim("height", min=least, max=512), 3: Dim("width", min=least, max=512)},
    )


@names
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch_and_size(name: str, strict: bool):
    model = create(name)
    program = torch.export.export(model, (images(name)[0],), dynamic_shapes=dynamic_shapes(name), strict=strict)
    for image in images(name):
        with torch.no_grad():
            assert_same_numbers(program.module()(image), model(image))


# the families whose formula of attention weights leaves guards; the others take the same branch
UNFUSED = {"davit_pico_vicinal", "dinat_pico", "litv2_pico", "maxvit_pico"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in UNFUSED else pytest.mark.slow) for name in MODELS]
)
def test_export_with_unfused_attention(name: str):
    program = torch.export.export(
        create_unfused(name), (images(name)[0],), dynamic_shapes=dynamic_shapes(name), strict=False
    )
    other = images(name)[2]
    with torch.no_grad():
        assert_same_numbers(program.module()(other), create(name)(other))


@names
def test_unfused_attention_is_scripted(name: str):
    with torch.no_grad():
        assert_same_numbers(torch.jit.script(create_unfused(name))(images(name)[0]), create(name)(images(name)[0]))


@names_by_tracing_time
def test_onnx_with_dynamic_batch_and_size(name: str, tmp_path: Path):
    model = create(name)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images(name)[0],), path, dynamic_shapes=dynamic_shapes(name), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for image in images(name):
        (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        with torch.no_grad():
            assert_same_numbers(torch.from_numpy(logits), model(image))


@names
def test_a_scripted_model_trains(name: str):
    model = create(name).train()
    scripted = torch.jit.script(model)
    image = images(name)[0]
    scripted(image).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(image).square().sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max() + ROUNDING


def test_a_scripted_model_refuses_attention_dropout():
    scripted = torch.jit.script(timm.create_model("nat_pico", attn_drop_rate=0.1).train())
    with pytest.raises(torch.jit.Error, match="annotated to be ignored and cannot be run"):
        scripted(torch.randn(1, 3, 32, 32))
