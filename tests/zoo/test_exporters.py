"""Layouts in memory, dynamic compilation of single modules, and what the exporters refuse in one line."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from test_accelerate import CASES
from test_accelerate import create as create_timms
from test_wrapped_layers import NAMES, create
from torch import Tensor, nn
from torch.export import Dim

from vicinal.zoo import accelerate
from vicinal.zoo.blocks.attention import GlobalAttention, NeighborhoodAttention, WindowAttention
from vicinal.zoo.blocks.bottleneck import BottleneckAttention
from vicinal.zoo.blocks.embed import ConvEmbed, PatchMerging
from vicinal.zoo.blocks.halo import HaloAttention
from vicinal.zoo.blocks.hilo import HiLoAttention
from vicinal.zoo.blocks.routed import RoutedAttention
from vicinal.zoo.maxvit import MBConv

names = pytest.mark.parametrize("name", NAMES)
ANY_SIZE, NOTHING = {"shvit_pico_vicinal"}, {"litv2_pico", "transnext_pico", "halonet_pico", "lamhalobotnet_pico"}
ONE_SIZE = sorted({*NAMES} - ANY_SIZE - NOTHING)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@names
def test_channels_last_weights_give_the_same_numbers(name: str):
    model, batch = create(name), image(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(batch)
        assert model.to(memory_format=torch.channels_last) is model
        kernels = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        actual = model(batch.contiguous(memory_format=torch.channels_last))
    # float32 kernels for another layout sum in another order, over some ten layers
    assert (actual - expected).abs().max() <= 1e-5 * expected.std()


def test_the_kernel_of_lambda_layers_keeps_its_shape_and_its_gradient_in_any_layout():
    model = create("lamhalobotnet_pico")
    kernel = model.stages[1].blocks[1].self_attn.conv_lambda.weight
    model(image(1, 3, 64, 64)).sum().backward()
    gradient = kernel.grad.clone()
    model.to(memory_format=torch.channels_last).double()
    assert kernel.shape == (16, 1, 5, 5, 1)
    assert kernel.dtype == kernel.grad.dtype == torch.float64
    assert torch.equal(kernel.grad, gradient.double())


# Modules by how they read a map of 32 channels: (B, C, H, W), or (B, H, W, C).
MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "halo": (lambda: HaloAttention(32, num_heads=2, block_size=4, halo_size=1), True),
    "halo strided": (lambda: HaloAttention(32, num_heads=2, block_size=4, halo_size=1, stride=2), True),
    "halo pooled": (lambda: HaloAttention(32, num_heads=2, block_size=3, halo_size=1, stride=2), True),
    "bottleneck": (lambda: BottleneckAttention(32, stride=2), True),
    "neighborhood": (lambda: NeighborhoodAttention(32, 2, 3, 2), False),
    "window": (lambda: WindowAttention(32, 2, 4), False),
    "global": (lambda: GlobalAttention(32, 2, (8, 8)), False),
    "routed": (lambda: RoutedAttention(32, 2, grid=2, topk=2), False),
    "hilo": (lambda: HiLoAttention(32, 4, 2, 0.5), False),
    "embed": (lambda: ConvEmbed(32, 64, 2, 2, norm_first=True, multiple=2), False),
    "merging": (lambda: PatchMerging(32, 64), False),
    "mbconv": (lambda: MBConv(32, 64, True), False),
}


QUICK = ("halo", "window")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in MODULES]
)
def test_a_single_contiguous_image_compiles_with_dynamic_sizes(kind: str):
    """A single image is in both layouts at once, and padding that comes to nothing copies nothing."""
    torch.manual_seed(0)
    build, channels_first = MODULES[kind]
    module = build().eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    x = image(1, 32, 8, 8)
    x = (x if channels_first else x.permute(0, 2, 3, 1)).requires_grad_()
    actual, expected = compiled(x), module(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    gradient, reference = (torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["swin", "maxvit_tf", "maxvit_nchw", "maxvit_parallel", "coatnet", "davit", "convit"])
def test_scripting_an_accelerated_network_is_refused_in_one_line(name: str):
    model = create_timms(CASES[name])
    accelerate(model)
    with pytest.raises(RuntimeError) as error:
        torch.jit.script(model)
    assert str(error.value).startswith("torch.jit.script takes no accelerated ")
    assert "\n" not in str(error.value)
    model(torch.zeros(1, 3, *CASES[name].size, dtype=torch.float64))  # and the network goes on working


def export_legacy(model: nn.Module, path: Path, batch: Tensor, axes: list[int]) -> onnxruntime.InferenceSession:
    dynamic_axes = {"image": {axis: f"axis{axis}" for axis in axes}} if axes else None
    torch.onnx.export(model, (batch,), path, dynamo=False, input_names=["image"], dynamic_axes=dynamic_axes)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_same_logits(session: onnxruntime.InferenceSession, model: nn.Module, batch: Tensor) -> None:
    (logits,) = session.run(None, {"image": batch.numpy()})
    with torch.no_grad():
        expected = model(batch)
    # float32 kernels of another library over some ten layers
    assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-4 * expected.std()


legacy = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning"
)


@legacy
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("nat_pico", "convit_pico_vicinal") else pytest.mark.slow)
        for name in ONE_SIZE
    ],
)
def test_the_old_onnx_exporter_writes_one_size(name: str, tmp_path: Path):
    model, batch = create(name), image(2, 3, 64, 70)
    assert_same_logits(export_legacy(model, tmp_path / "model.onnx", batch, []), model, batch)


@legacy
@pytest.mark.parametrize("name", ONE_SIZE)
@pytest.mark.parametrize("features_only", [False, True])
def test_the_old_onnx_exporter_is_refused_other_sizes(name: str, features_only: bool, tmp_path: Path):
    model = timm.create_model(name, features_only=features_only).eval()
    with pytest.raises(
        RuntimeError, match=r"^torch.onnx.export\(dynamo=False\) would fix the sizes of .* use dynamo=True"
    ):
        export_legacy(model, tmp_path / "model.onnx", image(1, 3, 64, 64), [2, 3])
    assert not list(tmp_path.iterdir())


@legacy
@pytest.mark.parametrize("name", sorted(NOTHING))
def test_the_old_onnx_exporter_is_refused_where_its_file_does_not_load(name: str, tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"^torch.onnx.export\(dynamo=False\) cannot export .*: use dynamo=True"):
        export_legacy(create(name), tmp_path / "model.onnx", image(1, 3, 64, 64), [])


@legacy
@pytest.mark.parametrize("name", sorted(ANY_SIZE))
def test_the_old_onnx_exporter_writes_any_size(name: str, tmp_path: Path):
    model = create(name)
    session = export_legacy(model, tmp_path / "model.onnx", image(2, 3, 128, 130), [0, 2, 3])
    for size in ((3, 3, 128, 130), (1, 3, 70, 200)):
        assert_same_logits(session, model, image(*size))


@legacy
@pytest.mark.parametrize("name", ["swin", "maxvit_tf", "maxvit_nchw", "maxvit_parallel", "coatnet", "davit", "convit"])
def test_the_old_onnx_exporter_is_refused_other_sizes_of_accelerated_networks(name: str, tmp_path: Path):
    """timm's own graphs take batches of any size; those of the operators hold the example's."""
    model = create_timms(CASES[name]).float()
    accelerate(model)
    with pytest.raises(RuntimeError, match=r"would fix the sizes of an accelerated \w+ at those of the example"):
        export_legacy(model, tmp_path / "model.onnx", image(1, 3, *CASES[name].size), [0])


@legacy
def test_the_old_onnx_exporter_is_refused_accelerated_halo_attention(tmp_path: Path):
    model = create_timms(CASES["halonet"]).float()
    accelerate(model)
    with pytest.raises(RuntimeError, match=r"cannot export an accelerated HaloAttention: use dynamo=True"):
        export_legacy(model, tmp_path / "model.onnx", image(1, 3, 64, 64), [])


# One more pixel than the stride of the last map; twice the stride where merging leaves out what it does not divide.
SMALLEST_EXAMPLE = {"shvit_pico_vicinal": 65, "convit_pico_vicinal": 17, "litv2_pico": 64}


@names
def test_an_example_too_small_for_dynamic_sizes_is_refused_with_the_minimum(name: str):
    """A last map of one row is a constant to torch: the file would take that size alone, or fail at others."""
    smallest = SMALLEST_EXAMPLE.get(name, 33)
    model = create(name)
    shapes = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    for size in ((smallest - 1, 2 * smallest), (2 * smallest, smallest - 1)):
        with pytest.raises(
            RuntimeError, match=f"^export with dynamic sizes needs .* at least {smallest} x {smallest} pixels"
        ):
            torch.export.export(model, (image(2, 3, *size),), dynamic_shapes=shapes, strict=False)


def test_the_swin_like_biformer_leaves_out_odd_rows():
    assert timm.create_model("biformer_stl", device="meta").smallest_example() == 64
    assert timm.create_model("biformer_tiny", device="meta").smallest_example() == 33


@pytest.mark.parametrize("name", ["nat_pico", "dinat_pico"])
def test_the_smallest_example_exports_every_larger_size(name: str):
    model = create(name)
    program = torch.export.export(
        model, (image(2, 3, 33, 33),), dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},), strict=False
    )
    for size in ((1, 3, 33, 64), (3, 3, 131, 40)):
        with torch.no_grad():
            expected = model(image(*size))
            assert (program.module()(image(*size)) - expected).abs().max() <= 1e-4 * expected.std()


def test_one_small_size_is_exported_as_it_is():
    model = create("nat_pico")
    program = torch.export.export(model, (image(1, 3, 32, 32),), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image(1, 3, 32, 32)), model(image(1, 3, 32, 32)))
