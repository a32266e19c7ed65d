"""The layers that blocks exports: what docs/blocks.md says of them, alone and at work in a network of a stranger's."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vicinal.zoo import blocks

PAGE = Path(__file__).parents[2] / "docs" / "blocks.md"
DIM, HEADS = 16, 2


def continuous(reduction: int, **options: object) -> blocks.ContinuousPositionBias:
    return blocks.ContinuousPositionBias(HEADS, reduction, 8, hidden_dim=8, **options)


# Each layer as it is built for a map of 16 channels, and the shape of its output for (2, 9, 14, 16).
MAP = (2, 9, 14, DIM)
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "AggregatedAttention": (
        lambda **dd: blocks.AggregatedAttention(DIM, HEADS, continuous(4, **dd), reduction=4, **dd),
        MAP,
    ),
    "BottleneckAttention": (
        lambda **dd: ChannelsFirst(blocks.BottleneckAttention(DIM, 2 * DIM, (8, 8), stride=2, **dd)),
        (2, 5, 7, 32),
    ),
    "ChannelAttention": (lambda **dd: blocks.ChannelAttention(DIM, HEADS, **dd), MAP),
    "ChannelsLastBatchNorm": (lambda **dd: blocks.ChannelsLastBatchNorm(DIM, **dd), MAP),
    "ConvEmbed": (lambda **dd: blocks.ConvEmbed(DIM, 32, 2, 2, multiple=2, **dd), (2, 5, 7, 32)),
    "ConvGluMlp": (lambda **dd: blocks.ConvGluMlp(DIM, 24, **dd), MAP),
    "ConvPositionEncoding": (lambda **dd: blocks.ConvPositionEncoding(DIM, **dd), MAP),
    "CosineAttention": (lambda **dd: blocks.CosineAttention(DIM, HEADS, continuous(1, **dd), **dd), MAP),
    "DepthwiseMlp": (lambda **dd: blocks.DepthwiseMlp(DIM, 24, **dd), MAP),
    "GatedPositionalAttention": (lambda **dd: blocks.GatedPositionalAttention(DIM, HEADS, **dd), MAP),
    "GlobalAttention": (lambda **dd: blocks.GlobalAttention(DIM, HEADS, (7, 7), local_encoding="input", **dd), MAP),
    "HaloAttention": (
        lambda **dd: ChannelsFirst(
            blocks.HaloAttention(DIM, 2 * DIM, num_heads=HEADS, block_size=4, halo_size=1, stride=2, **dd)
        ),
        (2, 5, 7, 32),
    ),
    "HiLoAttention": (lambda **dd: blocks.HiLoAttention(DIM, HEADS, 2, 0.5, **dd), MAP),
    "LambdaAttention": (lambda **dd: ChannelsFirst(blocks.LambdaAttention(DIM, num_heads=HEADS, r=5, **dd)), MAP),
    "NeighborhoodAttention": (lambda **dd: blocks.NeighborhoodAttention(DIM, HEADS, (3, 5), (1, 2), **dd), MAP),
    "PatchMerging": (lambda **dd: blocks.PatchMerging(DIM, 32, **dd), (2, 5, 7, 32)),
    "PlainAttention": (
        lambda **dd: nn.Sequential(nn.Flatten(1, 2), blocks.PlainAttention(DIM, HEADS, **dd)),
        (2, 126, DIM),
    ),
    "ProjectedRoutedAttention": (lambda **dd: blocks.ProjectedRoutedAttention(DIM, HEADS, grid=3, topk=2, **dd), MAP),
    "RoutedAttention": (lambda **dd: blocks.RoutedAttention(DIM, HEADS, grid=(3, 2), topk=2, **dd), MAP),
    "TransformerBlock": (
        lambda **dd: blocks.TransformerBlock(DIM, nn.Identity(), position_encodings=2, init_values=0.1, **dd),
        MAP,
    ),
    "WindowAttention": (
        lambda **dd: blocks.WindowAttention(DIM, HEADS, (4, 3), partition="grid", local_encoding="values", **dd),
        MAP,
    ),
}
NO_LAYERS = {"AttentionBase", "AttentionModule", "ContinuousPositionBias", "GELU", "GELUTanh", "PackedAttention"}


class ChannelsFirst(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_the_page_runs_and_names_every_layer():
    page, names = PAGE.read_text(), {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["restored"].shape == names["clean"].shape == (2, 3, 61, 90)
    assert all(parameter.grad.isfinite().all() for parameter in names["model"].parameters())
    assert {name: tuple(received.shape) for name, received in names["maps"].items()} == {
        f"blocks.{index}.attn": (2, 16, 23) for index in range(3)
    }
    assert names["rows"].shape == (1, 5, 9, 32)
    with torch.no_grad():
        layer, x = names["CausalRows"](32, 2), torch.randn(1, 5, 9, 32)
        before = layer(x)
        x[:, :, 6:] += 1.0
        assert torch.equal(layer(x)[:, :, :6], before[:, :, :6])  # no token sees a later one
    assert all(f"`{name}`" in page for name in blocks.__all__ if name != "AttentionBase")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_alone(name: str, dtype: torch.dtype):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build(dtype=dtype), torch.randn(MAP).to(dtype).requires_grad_()
    output = layer(x)
    assert output.shape == shape
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.parameters()))
    assert all(parameter.is_meta for parameter in build(device="meta").parameters())


def test_what_is_exported_is_tested_here_and_says_what_it_is():
    assert {*LAYERS} | NO_LAYERS == {*blocks.__all__}
    for name in blocks.__all__:
        text = getattr(blocks, name).__doc__
        assert text
        assert "Attention" not in name or "Args:" in text or "Arguments" in text or name == "AttentionModule", name
        assert name not in LAYERS or "Attention" not in name or "Source:" in text or "timm" in text, name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: blocks.WindowAttention(16, 3), "dim=16 is not a multiple of num_heads=3"),
        (lambda: blocks.ChannelAttention(16, 3), "dim=16 is not a multiple of num_heads=3"),
        (lambda: blocks.HiLoAttention(16, 3, 2, 0.5), "dim=16 is not a multiple of num_heads=3"),
        (lambda: blocks.GatedPositionalAttention(16, 3), "dim=16 is not a multiple of num_heads=3"),
        (lambda: blocks.CosineAttention(16, 3, nn.Identity()), "dim=16 is not a multiple of num_heads=3"),
        (lambda: blocks.HaloAttention(16, 15, num_heads=4), "dim_out=15 is not a multiple of num_heads=4"),
        (lambda: blocks.BottleneckAttention(16, 15, num_heads=4), "dim_out=15 is not a multiple of num_heads=4"),
        (lambda: blocks.WindowAttention(16, 2, local_encoding="keys"), "local_encoding='keys' must be \"values\""),
        (lambda: blocks.NeighborhoodAttention(16, 2, 0), "kernel_size=0 must be one positive number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "layer",
)
def test_arguments_that_do_not_fit_are_refused_by_name(build: Callable[[], nn.Module], message: str):
    with pytest.raises(ValueError, match=message):
        build()
