"""The operators against MMCV's compiled ones, where those are present: docs/detection.md says how to build them."""

import importlib
from collections.abc import Callable

import pytest
import torch
from dense_samples import mmlab
from torch import Tensor

from mmcv import ops  # isort: skip

COMPILED = importlib.import_module(mmlab.operators.MODULE)
pytestmark = pytest.mark.skipif(
    COMPILED.nms is mmlab.operators.nms, reason="this MMCV has no compiled operators (docs/detection.md builds them)"
)


def random_boxes(count: int) -> Tensor:
    corners = torch.rand(count, 2) * 80
    return torch.cat([corners, corners + 5 + torch.rand(count, 2) * 40], dim=1)


def nms() -> Callable[[], list[Tensor]]:
    boxes, scores, offset = random_boxes(60), torch.rand(60), int(torch.randint(2, ()))
    return lambda: list(ops.nms(boxes, scores, 0.4, offset=offset))


def soft_nms() -> Callable[[], list[Tensor]]:
    boxes, scores = random_boxes(30), torch.rand(30)
    method = ("naive", "linear", "gaussian")[int(torch.randint(3, ()))]
    return lambda: list(ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method))


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], list[Tensor]]:
    """The output, and the gradient of each input for one incoming gradient."""
    grad = torch.randn_like(function(*inputs))

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return run


def roi_align() -> Callable[[], list[Tensor]]:
    rois = torch.cat([torch.randint(0, 2, (12, 1)).float(), random_boxes(12)], dim=1)
    ratio, aligned = int(torch.randint(3, ())), bool(torch.randint(2, ()))
    layer = ops.RoIAlign((5, 7), spatial_scale=0.25, sampling_ratio=ratio, aligned=aligned)
    return with_gradients(lambda x: layer(x, rois), torch.randn(2, 3, 20, 30))


def geometry() -> tuple[int, int, int, int, int, int]:
    """Stride, padding, dilation and deformable groups, and the output's height and width for an image of 11 x 13."""
    stride, padding, dilation, groups = [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1)][int(torch.randint(3, ()))]
    height, width = ((side + 2 * padding - 2 * dilation - 1) // stride + 1 for side in (11, 13))
    return stride, padding, dilation, groups, height, width


def deform_conv() -> Callable[[], list[Tensor]]:
    stride, padding, dilation, groups, height, width = geometry()
    inputs = torch.randn(2, 4, 11, 13), torch.randn(2, 18 * groups, height, width), torch.randn(6, 4, 3, 3)
    return with_gradients(lambda *x: ops.deform_conv2d(*x, stride, padding, dilation, 1, groups), *inputs)


def modulated_deform_conv() -> Callable[[], list[Tensor]]:
    stride, padding, dilation, groups, height, width = geometry()
    inputs = torch.randn(2, 4, 11, 13), torch.randn(2, 18 * groups, height, width)
    inputs += torch.rand(2, 9 * groups, height, width), torch.randn(6, 4, 3, 3), torch.randn(6)
    return with_gradients(lambda *x: ops.modulated_deform_conv2d(*x, stride, padding, dilation, 1, groups), *inputs)


@pytest.mark.parametrize("draw", [nms, soft_nms, roi_align, deform_conv, modulated_deform_conv])
def test_values_and_gradients_equal_those_of_the_compiled_operator(draw: Callable, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    cases = [draw() for _ in range(50)]
    expected = [case() for case in cases]
    for name, function in mmlab.operators.OPERATORS.items():
        monkeypatch.setattr(COMPILED, name, function)
    for case, wanted in zip(cases, expected, strict=True):
        for found, exact in zip(case(), wanted, strict=True):
            # float32 sums of at most 200 products in another order
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
