"""Pictures of detections and segmentations: the image, the annotation where there is one, and the prediction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ...train.dense.images import read_image

# shortest side of a panel in pixels: small images are enlarged so that labels can be read
PANEL = 320
GAP = 8


def draw_predictions(samples: Sequence[Any], classes: Sequence[str], score: float) -> Image.Image:
    """One row for each image: annotation (if any) and prediction.

    Args:
        samples: data samples of MMDetection or MMSegmentation after prediction, with ``img_path``.
        classes: their names.
        score: least score of a detection that is drawn.
    """
    return _stack([_draw_row(sample, classes, score) for sample in samples])


def _draw_row(sample: Any, classes: Sequence[str], score: float) -> list[Image.Image]:
    # in the frame of the prediction, which an annotation may have chosen
    image = torch.from_numpy(np.array(read_image(sample.img_path, sample.ori_shape[1::-1]))).permute(2, 0, 1)
    scale = max(1.0, PANEL / min(image.shape[1:]))
    image = _resize(image, scale, "bilinear")
    if "pred_sem_seg" in sample:
        maps = [sample.gt_sem_seg] if "gt_sem_seg" in sample else []
        return [_draw_map(image, each.data[0], len(classes)) for each in (*maps, sample.pred_sem_seg)]
    annotated = [sample.gt_instances] if "gt_instances" in sample and len(sample.gt_instances) else []
    predicted = sample.pred_instances[sample.pred_instances.scores >= score]
    return [_draw_instances(image, each, classes, scale) for each in (*annotated, predicted)]


def _draw_instances(image: Tensor, instances: Any, classes: Sequence[str], scale: float) -> Image.Image:
    colors = [_color(int(label)) for label in instances.labels]
    names = [classes[int(label)] for label in instances.labels]
    if "scores" in instances:
        names = [f"{name} {value:.2f}" for name, value in zip(names, instances.scores.tolist(), strict=True)]
    if len(instances) and "masks" in instances:
        masks = instances.masks
        masks = torch.from_numpy(masks.to_ndarray()) if hasattr(masks, "to_ndarray") else masks.cpu()
        image = draw_segmentation_masks(image, _resize(masks, scale, "nearest").bool(), 0.45, colors)
    if len(instances):
        boxes = instances.bboxes
        boxes = getattr(boxes, "tensor", boxes).cpu() * scale
        image = draw_bounding_boxes(image, boxes, names, colors, width=2)
    return _as_image(image)


def _draw_map(image: Tensor, labels: Tensor, num_classes: int) -> Image.Image:
    labels = F.interpolate(labels[None, None].cpu().float(), size=image.shape[1:], mode="nearest")[0, 0].long()
    masks = torch.stack([labels == label for label in range(num_classes)])
    present = masks.flatten(1).any(1)
    colors = [_color(label) for label in range(num_classes) if present[label]]
    return _as_image(draw_segmentation_masks(image, masks[present], 0.55, colors) if present.any() else image)


def _resize(x: Tensor, scale: float, mode: str) -> Tensor:
    size = [round(side * scale) for side in x.shape[1:]]
    kwargs = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(x[None].float(), size=size, mode=mode, **kwargs)[0].to(torch.uint8)


def _color(label: int) -> tuple[int, int, int]:
    """A colour far from those of the neighbouring labels: hues by the golden angle."""
    hue = Image.new("HSV", (1, 1), (int(label * 0.618034 * 256) % 256, 220, 240))
    return hue.convert("RGB").getpixel((0, 0))


def _as_image(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _stack(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    widths = [sum(panel.width + GAP for panel in row) + GAP for row in rows]
    heights = [max(panel.height for panel in row) + GAP for row in rows]
    sheet = Image.new("RGB", (max(widths), sum(heights) + GAP), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for panel in row:
            sheet.paste(panel, (left, top))
            left += panel.width + GAP
        top += height
    return sheet
