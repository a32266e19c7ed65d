"""The compiled operators that MMCV wants, on torchvision's.

``pip install onedl-mmcv`` builds none (pip's isolated build has no torch), and without the module ``mmcv._ext`` neither
``mmcv.ops`` nor ``mmdet.models`` can be imported. :func:`install` offers a stand-in for that module at the end of
Python's search, so that a compiled one, where present, is found first.

Every function below has the name and the arguments of the compiled one, computes at least in float32, and works on
every device that torchvision supports. Gradients come from running the operation again under autograd, because MMCV's
autograd functions hand over the inputs. The other operators raise NotImplementedError when they are called.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops

from ..blocks.deformable import deform_conv2d

MODULE = "mmcv._ext"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes (N, 4) that stay, best first; ``offset`` 1 counts a box's last pixel."""
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return ops.nms(_wide(boxes), _wide(scores), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int = 0,
) -> Tensor:
    """Soft-NMS (arXiv:1704.04503): decays the scores of boxes that overlap a better one.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5), filled with the boxes that stay and their decayed scores, best first.
        method: 0 for plain NMS, 1 for linear and 2 for Gaussian decay.

    Returns:
        Indices of the boxes that stay.
    """
    overlaps = _pairwise_iou(boxes, offset)
    scores = scores.clone()
    left = torch.ones_like(scores, dtype=torch.bool)
    kept: list[Tensor] = []
    while left.any():
        best = scores.masked_fill(~left, -torch.inf).argmax()
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left[best] = False
        decay = _soft_nms_decay(overlaps[best], iou_threshold, sigma, method)
        scores = torch.where(left, scores * decay, scores)
        left &= scores >= min_score
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long)


def _pairwise_iou(boxes: Tensor, offset: int) -> Tensor:
    return ops.box_iou(*[boxes + boxes.new_tensor([0, 0, offset, offset])] * 2)


def _soft_nms_decay(overlap: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == 0:
        return (overlap < iou_threshold).to(overlap)
    if method == 1:
        return torch.where(overlap >= iou_threshold, 1 - overlap, 1.0)
    return torch.exp(-overlap.square() / sigma)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of a map (N, C, H, W) at rois (R, 5), written to output (R, C, aligned_height, aligned_width)."""
    if pool_mode != 1:
        raise NotImplementedError('RoIAlign with pool_mode="max" needs a compiled mmcv; use pool_mode="avg"')
    size = (aligned_height, aligned_width)
    output.copy_(_roi_align(_wide(input), _wide(rois), size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` to its map, written to ``grad_input``."""
    size = (aligned_height, aligned_width)

    def align(x: Tensor) -> Tensor:
        return _roi_align(x, _wide(rois), size, spatial_scale, sampling_ratio, aligned)

    # linear in the map: its gradient is the same at any value, and MMCV does not keep the map
    _write([grad_input], _gradients(align, [grad_input], grad_output))


def _roi_align(x: Tensor, rois: Tensor, size: tuple[int, int], *options: Any) -> Tensor:
    """torchvision's, for rois that may hold NaN or infinity: their values are NaN, and nothing outside x is read."""
    lost = (rois * 0.0).sum(1)[:, None, None, None]
    # Boxes that are no boxes are read far outside the map, where there are zeros and no gradient.
    nowhere = torch.cat([torch.zeros_like(rois[:, :1]), torch.full_like(rois[:, 1:], -1e6)], 1)
    rois = torch.where(rois.isfinite().all(1, keepdim=True), rois, nowhere)
    return ops.roi_align(x, rois, size, *options) + lost


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **sizes: int
) -> None:
    """Deformable convolution (arXiv:1703.06211), written to ``output``."""
    output.copy_(_deform_conv(input, offset, weight, **_geometry(sizes)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **sizes: int,
) -> None:
    """Gradients of :func:`deform_conv_forward` to map and offsets."""

    def convolve(x: Tensor, shift: Tensor) -> Tensor:
        return _deform_conv(x, shift, weight, **_geometry(sizes))

    _write([grad_input, grad_offset], _gradients(convolve, [input, offset], grad_output))


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1.0,
    **sizes: int,
) -> None:
    """Adds ``scale`` times the gradient of :func:`deform_conv_forward` to the weight."""

    def convolve(weight: Tensor) -> Tensor:
        return _deform_conv(input, offset, weight, **_geometry(sizes))

    # linear in the weight: its gradient is the same at any value
    grad_weight.add_(_gradients(convolve, [grad_weight], grad_output)[0].to(grad_weight), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Modulated deformable convolution (arXiv:1811.11168), written to ``output``."""
    output.copy_(_deform_conv(input, offset, weight, mask, bias if with_bias else None, **_geometry(sizes)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Gradients of :func:`modulated_deform_conv_forward` to all its inputs."""

    def convolve(*inputs: Tensor) -> Tensor:
        return _deform_conv(*inputs, **_geometry(sizes))

    inputs = [input, offset, weight, mask, *([bias] if with_bias else [])]
    targets = [grad_input, grad_offset, grad_weight, grad_mask, *([grad_bias] if with_bias else [])]
    _write(targets, _gradients(convolve, inputs, grad_output))


# how the two versions call height and width of stride, padding and dilation
_SIZE_NAMES = {
    "stride": (("dH", "dW"), ("stride_h", "stride_w")),
    "padding": (("padH", "padW"), ("pad_h", "pad_w")),
    "dilation": (("dilationH", "dilationW"), ("dilation_h", "dilation_w")),
}


def _geometry(sizes: dict[str, int]) -> dict[str, Any]:
    """torchvision's arguments from MMCV's; groups follow from the shapes of the tensors."""
    return {
        argument: next((sizes[height], sizes[width]) for height, width in names if height in sizes)
        for argument, names in _SIZE_NAMES.items()
    }


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **geometry: tuple[int, int],
) -> Tensor:
    mask, bias = (None if value is None else _wide(value) for value in (mask, bias))
    return deform_conv2d(_wide(input), _wide(offset), _wide(weight), bias, mask=mask, **geometry)


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """Multi-scale deformable attention (arXiv:2010.04159, equation 3).

    Args:
        value: (B, sum of H * W over the levels, heads, head_dim).
        spatial_shapes: (levels, 2), height and width of each level.
        sampling_locations: (B, queries, heads, levels, points, 2), x and y from 0 to 1.
        attention_weights: (B, queries, heads, levels, points).

    Returns:
        (B, queries, heads * head_dim), in the dtype of ``value``.
    """
    inputs = (_wide(value), _wide(sampling_locations), _wide(attention_weights))
    return _ms_deform_attn(*inputs, spatial_shapes).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_locations: Tensor,
    grad_attention_weights: Tensor,
    im2col_step: int = 64,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward` to values, locations and weights."""

    def attend(*inputs: Tensor) -> Tensor:
        value, locations, weights = inputs
        return _ms_deform_attn(value, locations, weights, spatial_shapes)

    inputs = [value, sampling_locations, attention_weights]
    _write([grad_value, grad_sampling_locations, grad_attention_weights], _gradients(attend, inputs, grad_output))


def _ms_deform_attn(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Tensor) -> Tensor:
    batch, _, heads, head_dim = value.shape
    sizes = [(int(height), int(width)) for height, width in spatial_shapes]
    levels = value.split([height * width for height, width in sizes], dim=1)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, B * heads, queries, points, 2)
    sampled = []
    for (height, width), level, grid in zip(sizes, levels, grids, strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
        sampled.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    points = torch.stack(sampled, dim=-2).flatten(-2)  # (B * heads, head_dim, queries, levels * points)
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(-2)  # (B * heads, queries, levels * points)
    attended = torch.einsum("bcqp,bqp->bqc", points, weights).unflatten(0, (batch, heads))
    return attended.transpose(1, 2).flatten(2)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv:1708.02002) of logits (N, classes), written to ``output``; class index N is background."""
    output.copy_(_sigmoid_focal_loss(_wide(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient of the summed :func:`sigmoid_focal_loss_forward` to the logits."""

    def loss(logits: Tensor) -> Tensor:
        return _sigmoid_focal_loss(logits, target, weight, gamma, alpha)

    _write([grad_input], _gradients(loss, [input], torch.ones_like(input)))


def _sigmoid_focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    classes = torch.arange(logits.shape[1], device=logits.device)
    one_hot = (target[:, None] == classes).to(logits)
    loss = ops.sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma)
    if weight.numel() == 0:
        return loss
    return loss * weight[target.clamp(max=len(weight) - 1)][:, None]


def get_compiler_version() -> str:
    """What MMCV prints about its build."""
    return "none: operators on torchvision's, by vicinal"


def get_compiling_cuda_version() -> str:
    """See :func:`get_compiler_version`."""
    return get_compiler_version()


def _wide(x: Tensor) -> Tensor:
    """At least float32: torchvision has no bfloat16, and half precision cannot tell the pixels of a large image."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``function(*inputs)`` for an incoming gradient, by computing it again."""
    with torch.enable_grad():
        leaves = [_wide(x.detach()).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, _wide(grad))


def _write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}


class _Operators(types.ModuleType):
    """The stand-in module: what is not among :data:`OPERATORS` exists, and says so when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                f"mmcv's compiled operator {name!r} has no counterpart in torchvision; docs/detection.md says how to "
                "build mmcv's own operators, which take precedence"
            )

        missing.__name__ = name
        return missing


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(MODULE, self, origin=__file__) if fullname == MODULE else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Operators(spec.name, __doc__)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(OPERATORS)


def install() -> None:
    """Make ``mmcv.ops`` importable; call it before the first import of mmcv.ops, mmdet.models or mmseg.models.

    Where MMCV has its compiled operators this changes nothing.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
