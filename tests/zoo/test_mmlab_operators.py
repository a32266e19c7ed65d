"""The operators under MMCV's functions, against plain formulas, on the CPU and on a GPU where one is present."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from dense_samples import mmlab
from torch.nn import functional as F

from mmcv import ops  # isort: skip

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# products of float32 numbers summed over at most some hundred terms
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    corners = torch.rand(count, 2, generator=generator) * 80
    return torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def overlap(a: list[float], b: list[float], offset: int = 0) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_the_definition_keeps(device: str, offset: int, generator: torch.Generator):
    boxes, scores = random_boxes(60, generator), torch.rand(60, generator=generator)
    _, kept = ops.nms(boxes.to(device), scores.to(device), 0.4, offset=offset)
    expected: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[index].tolist(), boxes[other].tolist(), offset) <= 0.4 for other in expected):
            expected.append(index)
    assert kept.tolist() == expected


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_decays_by_the_definition(device: str, method: str, generator: torch.Generator):
    boxes, scores = random_boxes(30, generator), torch.rand(30, generator=generator)
    found, kept = ops.soft_nms(boxes.to(device), scores.to(device), 0.3, sigma=0.5, min_score=0.05, method=method)
    left, expected = {index: float(score) for index, score in enumerate(scores)}, []
    while left:
        best = max(left, key=left.get)
        expected.append((best, left.pop(best)))
        for other in list(left):
            iou = overlap(boxes[best].tolist(), boxes[other].tolist())
            decays = {
                "naive": float(iou < 0.3),
                "linear": 1 - iou if iou >= 0.3 else 1.0,
                "gaussian": float(torch.exp(torch.tensor(-(iou**2) / 0.5))),
            }
            left[other] *= decays[method]
            if left[other] < 0.05:
                del left[other]
    assert kept.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(found[:, 4].cpu(), torch.tensor([score for _, score in expected]), **FLOAT32)


@pytest.mark.parametrize("method", ["naive", "linear"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms_at_exactly_the_threshold_and_with_an_offset(device: str, method: str, offset: int):
    """Boxes of 4, 2 and 1 columns, whose last pixels an offset of 1 counts: IoU 1/2, 1/4 and 1/2."""
    high = 4 - offset
    boxes = torch.tensor(
        [[0.0, 0, 4 - offset, high], [0, 0, 2 - offset, high], [0, 0, 1 - offset, high]], device=device
    )
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    found, kept = ops.soft_nms(boxes, scores, 0.5, min_score=0.01, method=method, offset=offset)
    # at the threshold a score is decayed: the first halves that of the second, and the third halves it once more
    expected = {"naive": [(0, 0.9), (2, 0.7)], "linear": [(0, 0.9), (2, 0.7), (1, 0.8 * 0.5 * 0.5)]}
    assert kept.tolist() == [index for index, _ in expected[method]]
    torch.testing.assert_close(found[:, 4].cpu(), torch.tensor([score for _, score in expected[method]]), **FLOAT32)
    # the boxes come back as they were given, whatever is counted
    assert torch.equal(found[:, :4], boxes[kept])


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_a_box_at_exactly_the_threshold(device: str, offset: int):
    boxes = torch.tensor([[0.0, 0, 4 - offset, 4 - offset], [0, 0, 2 - offset, 4 - offset]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    for threshold, kept in ((0.5, [0, 1]), (0.49, [0])):
        assert ops.nms(boxes, scores, threshold, offset=offset)[1].tolist() == kept


def test_roi_align_of_a_ramp_is_the_ramp_at_the_bins(device: str):
    # bilinear interpolation is exact on a linear function, and so is the mean over a symmetric bin
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    ramp = torch.stack([x, y])[None].to(device)
    rois = torch.tensor([[0, 8.0, 4.0, 40.0, 28.0]], device=device)
    out = ops.RoIAlign((3, 4), spatial_scale=0.5, sampling_ratio=2, aligned=True)(ramp, rois)
    centres_x = 8 * 0.5 - 0.5 + (torch.arange(4) + 0.5) * (32 * 0.5 / 4)
    centres_y = 4 * 0.5 - 0.5 + (torch.arange(3) + 0.5) * (24 * 0.5 / 3)
    torch.testing.assert_close(out[0, 0].cpu(), centres_x.expand(3, 4), **FLOAT32)
    torch.testing.assert_close(out[0, 1].cpu(), centres_y[:, None].expand(3, 4), **FLOAT32)


def test_roi_align_has_the_gradient_of_its_differences(device: str, generator: torch.Generator):
    maps = torch.rand(1, 2, 8, 9, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    rois = torch.tensor([[0, 1.3, 0.7, 6.1, 5.9]], device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.RoIAlign((2, 3), sampling_ratio=2), (maps, rois))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_of_a_box_that_is_no_number(
    device: str, sampling_ratio: int, number: float, generator: torch.Generator
):
    """Its values are NaN; the other boxes and the gradient of the map know nothing of it."""
    maps = torch.rand(1, 3, 8, 9, generator=generator).to(device).requires_grad_()
    rois = torch.tensor([[0, 1.3, 0.7, 6.1, 5.9], [0, 1.0, 1.0, 5.0, 4.0]], device=device)
    align = ops.RoIAlign((2, 3), sampling_ratio=sampling_ratio)
    expected = align(maps, rois[:1])
    rois = rois.clone()
    rois[1, 3] = number
    out = align(maps, rois)
    assert torch.equal(out[:1], expected)
    assert out[1].isnan().all()
    gradients = [torch.autograd.grad(result.nan_to_num().sum(), maps)[0] for result in (out, expected)]
    torch.testing.assert_close(*gradients, **FLOAT32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_deform_convs_at_an_offset_that_is_no_number(device: str, number: float, generator: torch.Generator):
    maps, weight = torch.rand(2, 4, 5, 6, generator=generator), torch.rand(3, 4, 3, 3, generator=generator)
    offset, mask = torch.rand(2, 18, 5, 6, generator=generator), torch.rand(2, 9, 5, 6, generator=generator)
    offset[1, 7, 2, 3] = number
    lost = torch.zeros(2, 3, 5, 6, dtype=torch.bool)
    lost[1, :, 2, 3] = True
    maps, offset, mask, weight = (tensor.to(device) for tensor in (maps, offset, mask, weight))
    for out in (
        ops.deform_conv2d(maps, offset, weight, 1, 1),
        ops.modulated_deform_conv2d(maps, offset, mask, weight, None, 1, 1),
    ):
        assert torch.equal(out.isnan().cpu(), lost)


def test_deformable_attention_at_a_place_that_is_no_number(device: str, generator: torch.Generator):
    shapes = torch.tensor([[4, 5], [2, 3]], device=device)
    value, weights = torch.rand(1, 26, 2, 4, generator=generator), torch.rand(1, 3, 2, 2, 2, generator=generator)
    places = torch.rand(1, 3, 2, 2, 2, 2, generator=generator)
    places[0, 1, 1, 0, 1, 0] = float("nan")
    starts = torch.tensor([0, 20], device=device)
    apply = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    out = apply(value.to(device), shapes, starts, places.to(device), weights.to(device), 64)
    lost = torch.zeros(1, 3, 8, dtype=torch.bool)
    lost[0, 1, 4:] = True  # the second head of the second query
    assert torch.equal(out.isnan().cpu(), lost)


def test_deform_conv_with_whole_offsets_is_a_shifted_convolution(device: str, generator: torch.Generator):
    maps = torch.rand(2, 4, 9, 10, generator=generator).to(device)
    weight = torch.rand(6, 4, 3, 3, generator=generator).to(device)
    offset = torch.zeros(2, 18, 9, 10, device=device)
    offset[:, 1::2] = 1  # x of each tap
    shifted = F.pad(maps, (0, 1))[..., 1:]
    expected = F.conv2d(F.pad(shifted, (1, 1, 1, 1)), weight)
    out = ops.deform_conv2d(maps, offset, weight, 1, 1)
    # the last column looks beyond the shifted map, where the padding differs
    torch.testing.assert_close(out[..., 1:-2], expected[..., 1:-2], **FLOAT32)


def test_modulated_deform_conv_scales_by_its_mask(device: str, generator: torch.Generator):
    maps = torch.rand(2, 4, 9, 10, generator=generator).to(device)
    weight, bias = torch.rand(6, 4, 3, 3, generator=generator).to(device), torch.rand(6, generator=generator).to(device)
    offset, mask = torch.zeros(2, 18, 9, 10, device=device), torch.full((2, 9, 9, 10), 0.25, device=device)
    out = ops.modulated_deform_conv2d(maps, offset, mask, weight, bias, 1, 1)
    expected = F.conv2d(maps, 0.25 * weight, bias, padding=1)
    torch.testing.assert_close(out, expected, **FLOAT32)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1)},
        {"stride": (1, 3), "padding": (0, 2), "dilation": (1, 1)},
        {"stride": (1, 1), "padding": (2, 0), "dilation": (1, 2)},
        {"stride": (2, 1), "padding": (0, 3), "dilation": (3, 1)},
    ],
)
def test_deform_convs_without_offsets_are_convolutions(
    device: str, modulated: bool, geometry: dict, generator: torch.Generator
):
    maps = torch.rand(2, 4, 12, 13, generator=generator).to(device).requires_grad_()
    weight = torch.rand(6, 4, 3, 2, generator=generator).to(device).requires_grad_()
    expected = F.conv2d(maps, weight, **geometry)
    offset = torch.zeros(2, 12, *expected.shape[2:], device=device)
    options = (geometry["stride"], geometry["padding"], geometry["dilation"])
    if modulated:
        # one bias for each channel, so that an order of arguments shows
        bias = torch.arange(6.0, device=device)
        expected = expected + bias[:, None, None]
        out = ops.modulated_deform_conv2d(maps, offset, torch.ones_like(offset[:, :6]), weight, bias, *options)
    else:
        out = ops.deform_conv2d(maps, offset, weight, *options)
    torch.testing.assert_close(out, expected, **FLOAT32)
    grad = torch.rand(out.shape, generator=generator).to(device)
    for found, wanted in zip(*[torch.autograd.grad(x, (maps, weight), grad) for x in (out, expected)], strict=True):
        # sums of a few hundred float32 products below 1
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_deform_convs_have_the_gradients_of_their_differences(device: str, generator: torch.Generator):
    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(device)

    maps, weight, bias = draw(1, 2, 5, 6), draw(2, 2, 2, 2), draw(2)
    # away from the corners of bilinear interpolation, where there is no gradient
    offset, mask = 0.2 + 0.6 * draw(1, 8, 4, 5), draw(1, 4, 4, 5)
    leaves = [x.requires_grad_() for x in (maps, offset, weight)]
    assert torch.autograd.gradcheck(lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 0), leaves)
    leaves = [x.requires_grad_() for x in (maps, offset, mask, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, o, m, w, b: ops.modulated_deform_conv2d(x, o, m, w, b, 1, 0), leaves)


def attention_inputs(generator: torch.Generator, dtype: torch.dtype, device: str):
    shapes = torch.tensor([[4, 5], [2, 3]])
    value = torch.rand(2, 26, 2, 4, generator=generator, dtype=dtype)
    locations = torch.rand(2, 3, 2, 2, 2, 2, generator=generator, dtype=dtype)
    weights = torch.rand(2, 3, 2, 4, generator=generator, dtype=dtype).softmax(-1).unflatten(-1, (2, 2))
    starts = torch.tensor([0, 20])
    return [x.to(device) for x in (value, shapes, starts, locations, weights)]


def test_deformable_attention_equals_mmcvs_own_formula(device: str, generator: torch.Generator):
    value, shapes, starts, locations, weights = attention_inputs(generator, torch.float64, device)
    apply = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    out = apply(value, shapes, starts, locations, weights, 64)
    expected = ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_deformable_attention_has_the_gradients_of_its_differences(device: str, generator: torch.Generator):
    value, shapes, starts, locations, weights = attention_inputs(generator, torch.float64, device)
    apply = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, s, w: apply(v, shapes, starts, s, w, 64), leaves)


def test_deformable_attention_in_half_precision_keeps_the_dtype(device: str, generator: torch.Generator):
    value, shapes, starts, locations, weights = attention_inputs(generator, torch.float32, device)
    apply = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    out = apply(value.half(), shapes, starts, locations.half(), weights.half(), 64)
    exact = apply(value, shapes, starts, locations, weights, 64)
    assert out.dtype == torch.float16
    # locations rounded to 2**-11 move samples of maps 5 wide, with values below 1, by at most 5 * 2**-11
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=8 * 2**-11)


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_and_its_gradient_follow_the_formula(device: str, weighted: bool, generator: torch.Generator):
    logits = torch.randn(7, 4, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 4, 1], device=device)  # 4: background
    weight = torch.rand(4, generator=generator, dtype=torch.float64).to(device) if weighted else None
    loss = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    hit = F.one_hot(target, 5)[:, :4].bool()
    probability = logits.sigmoid()
    positive = -0.25 * (1 - probability) ** 2 * probability.log()
    negative = -0.75 * probability**2 * (1 - probability).log()
    expected = torch.where(hit, positive, negative)
    if weighted:
        expected = expected * weight[target.clamp(max=3)][:, None]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    found = torch.autograd.grad(ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "sum"), logits)
    wanted = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_point_sample_reads_the_map_at_the_points(device: str):
    ramp = torch.arange(10.0, device=device).expand(1, 1, 8, 10)
    points = torch.tensor([[[0.25, 0.5], [0.75, 0.5]]], device=device)
    sampled = ops.point_sample(ramp, points, align_corners=False)
    torch.testing.assert_close(sampled[0, 0], torch.tensor([2.0, 7.0], device=device), **FLOAT32)


def test_an_operator_without_counterpart_says_so_when_called(device: str):
    maps, rois = torch.rand(1, 2, 8, 8, device=device), torch.tensor([[0, 0, 0, 4.0, 4.0]], device=device)
    with pytest.raises(NotImplementedError, match=r"roi_pool_forward.*no counterpart in torchvision"):
        ops.RoIPool(2)(maps, rois)
    with pytest.raises(NotImplementedError, match="max"):
        ops.RoIAlign(2, pool_mode="max")(maps, rois)


def test_a_compiled_module_is_found_first(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mmcv_stand_in").mkdir()
    (tmp_path / "mmcv_stand_in" / "__init__.py").touch()
    (tmp_path / "mmcv_stand_in" / "_ext.py").write_text("compiled = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(mmlab.operators, "MODULE", "mmcv_stand_in._ext")
    mmlab.operators.install()
    assert importlib.import_module("mmcv_stand_in._ext").compiled
    (tmp_path / "mmcv_stand_in" / "_ext.py").unlink()
    sys.modules.pop("mmcv_stand_in._ext")
    importlib.invalidate_caches()
    assert importlib.import_module("mmcv_stand_in._ext").nms is mmlab.operators.nms
    assert importlib.util.find_spec("mmcv_stand_in._other") is None
