"""The halo attention module against timm's, at sizes that timm's refuses, and as a graph."""

import pytest
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models.feature_extraction import NodePathTracer

from vicinal.zoo.blocks.halo import HaloAttention

OPTIONS = {
    "plain": {"block_size": 4, "halo_size": 1},
    "strided": {"stride": 2, "block_size": 4, "halo_size": 3},
    "pooled": {"stride": 2, "block_size": 3, "halo_size": 2, "qk_ratio": 0.33},
    "narrow queries": {"block_size": 4, "halo_size": 2, "dim_head": 16},
}


def images(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def create(**options: object) -> HaloAttention:
    torch.manual_seed(0)
    return HaloAttention(16, 48, num_heads=2, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_timms_weights_give_timms_numbers(options: dict):
    theirs = HaloAttn(16, 48, num_heads=2, **options).double()
    ours = create(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x = images(12, 24, torch.float64).requires_grad_()
    actual, expected = ours(x), theirs(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad(y, [x, *m.parameters()], direction) for y, m in ((actual, ours), (expected, theirs))
    ]
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (12, 9)], ids=str)
def test_any_size(options: dict, mask_padding: bool, size: tuple[int, int]):
    module = create(**options, mask_padding=mask_padding)
    output = module(images(*size))
    output.square().sum().backward()
    stride = options.get("stride", 1)
    assert output.shape == (2, 48, -(-size[0] // stride), -(-size[1] // stride))
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_padding_for_the_blocks_is_that_of_a_larger_map():
    module = create(**OPTIONS["strided"])
    x = images(5, 7)
    padded = torch.nn.functional.pad(x, [0, 1, 0, 3])
    torch.testing.assert_close(module(x), module(padded)[:, :, :3, :4], rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_masked_cells_get_no_weight(options: dict):
    """Values that are 1 inside the map sum to 1 only if no weight falls outside."""
    for mask_padding in (True, False):
        module = create(**options, mask_padding=mask_padding)
        head = module.kv.weight.data.unflatten(0, (2, -1))
        head[:, module.head_dim :] = 0
        head[:, module.head_dim :, 0] = 1
        x = images(5, 7)
        x[:, 0] = 1
        kept = torch.allclose(module(x), torch.ones(()), rtol=0, atol=1e-5)
        assert kept == mask_padding


def trace(module: nn.Module) -> nn.Module:
    """The module as torch.fx sees it, with timm's leaves: functions that compute with sizes."""
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    graph = NodePathTracer(**leaves).trace(module)
    return torch.fx.GraphModule(module, graph)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_graphs_at_other_sizes(mask_padding: bool):
    module = create(**OPTIONS["strided"], mask_padding=mask_padding).eval()
    shapes = ({0: Dim("batch", min=1, max=64), 2: Dim("height", min=9, max=512), 3: Dim("width", min=9, max=512)},)
    exported = torch.export.export(module, (images(12, 24),), dynamic_shapes=shapes).module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for graph in (exported, compiled, torch.jit.script(module), trace(module)):
        for size in ((12, 24), (17, 30)):
            # float32 in another order of summation
            torch.testing.assert_close(graph(images(*size)), module(images(*size)), rtol=1e-5, atol=1e-5)


def test_options_are_refused_by_name():
    with pytest.raises(ValueError, match="dim_out=48 is not a multiple of num_heads=5"):
        HaloAttention(16, 48, num_heads=5)
    with pytest.raises(ValueError, match="stride=3 must be 1 or 2"):
        HaloAttention(16, 48, stride=3)
