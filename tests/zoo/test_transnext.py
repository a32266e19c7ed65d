"""TransNeXt's own parts against torch's pooling and against their definition, pair by pair."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

import vicinal.zoo  # noqa: F401
from vicinal.zoo.blocks.pooling import pool_average
from vicinal.zoo.blocks.position import ContinuousPositionBias


@pytest.mark.parametrize(("size", "reduction"), [((8, 12), 4), ((9, 13), 4), ((3, 5), 8), ((7, 7), 1)], ids=str)
def test_pooling_is_torchs_adaptive_pooling(size: tuple[int, int], reduction: int):
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    cells = tuple(max(1, side // reduction) for side in size)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool_average(x, reduction), expected)


@pytest.mark.parametrize(("size", "reduction"), [((8, 6), 2), ((7, 9), 2), ((4, 5), 1)], ids=str)
def test_position_bias_is_the_network_of_every_distance(size: tuple[int, int], reduction: int):
    bias = ContinuousPositionBias(2, reduction, pretrain_size=5, dtype=torch.float64)
    axes = [torch.arange(side, dtype=torch.float64) for side in size]
    centres = [F.adaptive_avg_pool1d(axis[None], max(1, len(axis) // reduction))[0] for axis in axes]
    rows, columns = ((axis[:, None] - cells) / 4 * 8 for axis, cells in zip(axes, centres, strict=True))
    pairs = torch.stack(torch.broadcast_tensors(rows[:, None, :, None], columns[None, :, None, :]), -1)
    coordinates = pairs.sign() * (pairs.abs() + 1).log2() / math.log2(8)
    expected = bias.fc2(F.relu(bias.fc1(coordinates))).flatten(2, 3).flatten(0, 1).permute(2, 0, 1)
    torch.testing.assert_close(bias(torch.empty(1, *size, 6, dtype=torch.float64)), expected)


def test_an_unknown_position_bias_is_refused():
    with pytest.raises(ValueError, match="position_bias='resized' must be one of recomputed, interpolated"):
        timm.create_model("transnext_pico", position_bias="resized")
