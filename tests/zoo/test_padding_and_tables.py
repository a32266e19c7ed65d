"""Where padding lies, and by which interpolation tables and embeddings follow the size of a map."""

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.nn import functional as F

import vicinal.zoo  # noqa: F401
from vicinal.zoo.blocks.attention import WindowAttention
from vicinal.zoo.blocks.base import expand_table
from vicinal.zoo.blocks.bottleneck import resize_relative_table
from vicinal.zoo.blocks.padding import crop, pad_by_edge, pad_same, pad_to_minimum, pad_to_multiple
from vicinal.zoo.blocks.position import ContinuousPositionBias


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("pad", "size"),
    [
        (lambda x: pad_to_multiple(x, [4, 3]), (4, 6)),
        (lambda x: pad_to_multiple(x, [1, 5]), (3, 5)),
        (lambda x: pad_to_minimum(x, [5, 2]), (5, 5)),
        (lambda x: pad_to_minimum(x, [2, 8]), (3, 8)),
    ],
)
def test_zeros_lie_below_and_to_the_right(pad, size: tuple[int, int]):
    x = tokens(2, 3, 5, 4)
    padded = pad(x)
    assert padded.shape == (2, *size, 4)
    assert torch.equal(padded[:, :3, :5], x)
    assert not padded[:, 3:].any()
    assert not padded[:, :, 5:].any()
    assert torch.equal(crop(padded, 3, 5), x)


@pytest.mark.parametrize(
    ("size", "pads"), [((4, 6), (0, 1, 0, 1)), ((5, 7), (1, 1, 1, 1)), ((4, 7), (1, 1, 0, 1))], ids=str
)
def test_same_padding_has_its_odd_pixel_last(size: tuple[int, int], pads: tuple[int, ...]):
    """(left, right, top, bottom), as TensorFlow has them for a kernel of 3 and a stride of 2."""
    x = tokens(1, 2, *size)
    assert torch.equal(pad_same(x, 3, 2), F.pad(x, pads))


def test_an_edge_is_repeated_at_the_end():
    x = tokens(1, 2, 3, 5)
    padded = pad_by_edge(x, 2)
    assert torch.equal(padded[:, :, :3, :5], x)
    assert torch.equal(padded[:, :, 3, :5], x[:, :, 2])
    assert torch.equal(padded[..., 5], padded[..., 4])
    assert padded.shape == (1, 2, 4, 6)


@pytest.mark.parametrize("grid", [(2, 3), (4, 2)], ids=str)
def test_a_table_of_pairs_is_read_at_key_minus_query_and_resized_bicubically(grid: tuple[int, int]):
    height, width = grid
    table = tokens(2, 3, 5)  # of a map of 2 x 3
    sides = 2 * height - 1, 2 * width - 1
    resized = F.interpolate(table[None], sides, mode="bicubic", align_corners=False)[0]
    bias = expand_table(table, list(grid))
    positions = [(row, column) for row in range(height) for column in range(width)]
    for query, (row, column) in enumerate(positions):
        for key, (other_row, other_column) in enumerate(positions):
            place = other_row - row + height - 1, other_column - column + width - 1
            torch.testing.assert_close(bias[:, query, key], resized[(slice(None), *place)])


def test_a_table_of_an_axis_is_resized_bicubically():
    table = tokens(7, 4)  # of an axis of 4
    assert torch.equal(resize_relative_table(table, 4), table)
    expected = F.interpolate(table.t()[None, :, :, None], (11, 1), mode="bicubic", align_corners=False)[0, :, :, 0].t()
    assert torch.equal(resize_relative_table(table, 6), expected)


def test_tables_of_global_attention_are_resized_bicubically_on_loading():
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    small, large = (timm.create_model("vitrpb_small", img_size=size, **options) for size in ((64, 96), (96, 80)))
    key = "stages.0.blocks.0.attn.relative_position_bias"
    table = small.state_dict()[key]
    assert table.shape == (2, 7, 11)
    expected = F.interpolate(table[None], (11, 9), mode="bicubic", align_corners=False)[0]
    assert torch.equal(large.adapt_state_dict(small.state_dict())[key], expected)


def test_tables_of_bottleneck_attention_are_resized_bicubically_on_loading():
    small, large = (timm.create_model("lamhalobotnet_pico", img_size=size) for size in (64, (96, 128)))
    adapted = large.adapt_state_dict(small.state_dict())
    for axis, length in (("height", 2 * 6 - 1), ("width", 2 * 8 - 1)):
        key = f"stages.3.blocks.0.self_attn.pos_embed.{axis}_rel"
        table = small.state_dict()[key].t()[None, :, :, None]
        expected = F.interpolate(table, (length, 1), mode="bicubic", align_corners=False)[0, :, :, 0].t()
        assert torch.equal(adapted[key], expected)


def test_tables_of_windows_are_resized_as_timm_resizes_them():
    attention = WindowAttention(8, 2, (2, 3))
    nn.init.normal_(attention.relative_position_bias)
    table = attention.relative_position_bias.detach().clone()
    attention.set_window_size((4, 3))
    expected = resize_rel_pos_bias_table(table, (4, 3), (2, 7, 5))
    assert torch.equal(attention.relative_position_bias, expected)
    # by splines over distances that grow geometrically, unlike plain interpolation
    assert (F.interpolate(table[None], (7, 5), mode="bicubic")[0] - expected).abs().max() > 0.01


@torch.no_grad()
def test_an_interpolated_position_bias_is_resized_bilinearly_first_over_keys_then_over_queries():
    at_home = ContinuousPositionBias(2, 2, 4)
    elsewhere = ContinuousPositionBias(2, 2, 4, interpolated=True)
    elsewhere.load_state_dict(at_home.state_dict())
    bias = at_home(tokens(1, 4, 4, 3)).unflatten(2, (2, 2)).flatten(0, 1)[None]  # (1, heads * queries, rows, columns)
    bias = F.interpolate(bias, (3, 2), mode="bilinear", align_corners=False)[0].unflatten(0, (2, 4, 4))
    bias = bias.flatten(3).permute(0, 3, 1, 2)  # (heads, keys, rows, columns)
    expected = F.interpolate(bias, (6, 5), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(elsewhere(tokens(1, 6, 5, 3)), expected)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)], ids=str)
@torch.no_grad()
def test_position_embeddings_are_resized_bicubically_in_the_forward_pass(grid: tuple[int, int]):
    stem = timm.create_model("convit_pico_vicinal").stem
    image = tokens(1, 3, *(16 * side for side in grid))
    patches = stem.conv(image).permute(0, 2, 3, 1)
    embedding = F.interpolate(stem.pos_embed.permute(0, 3, 1, 2), grid, mode="bicubic", align_corners=False)
    # one sum in float32
    torch.testing.assert_close(stem(image), patches + embedding.permute(0, 2, 3, 1))
