"""Two small images with boxes, masks and label maps, at sizes that no stride divides."""

import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope

from vicinal.train.dense.configs import describe_backbone, read_config, set_num_classes, walk
from vicinal.zoo import mmlab  # noqa: F401  first: it offers the operators that mmdet and mmseg import

SIZES = ((100, 135), (90, 121))


def detection_batch(num_classes=3):
    """A batch as MMDetection's loaders make it."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(0)
    batch = {"inputs": [], "data_samples": []}
    for height, width in SIZES:
        boxes = torch.tensor([[10.0, 12, 60, 50], [40, 30, width - 5, height - 8]])
        masks = np.zeros((2, height, width), np.uint8)
        for mask, box in zip(masks, boxes.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        sample = DetDataSample(
            metainfo={
                "img_shape": (height, width),
                "ori_shape": (height, width),
                "scale_factor": (1.0, 1.0),
                "img_id": 0,
            }
        )
        labels = torch.arange(2) % num_classes
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(boxes), labels=labels, masks=BitmapMasks(masks, height, width)
        )
        batch["inputs"].append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        batch["data_samples"].append(sample)
    return batch


def segmentation_batch(num_classes=3, size=None):
    """A batch as MMSegmentation's loaders make it."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    batch = {"inputs": [], "data_samples": []}
    for height, width in [size] * 2 if size else SIZES:
        sample = SegDataSample(metainfo={"img_shape": (height, width), "ori_shape": (height, width)})
        labels = torch.randint(0, num_classes, (1, height, width), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
        batch["inputs"].append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        batch["data_samples"].append(sample)
    return batch


SMALL = {
    "transnext": "transnext_pico",
    "litv2": "litv2_pico",
    "davit": "davit_pico_vicinal",
    "maxvit": "maxvit_pico",
    "shvit": "shvit_pico_vicinal",
    "convit": "convit_pico_vicinal",
    "halonet50ts": "halonet_pico",
    "biformer": "biformer_pico",
}


def small_model(name: str) -> str:
    family = name.split("_", maxsplit=1)[0]
    return SMALL.get(family, "dinat_pico" if family == "dinat" else "nat_pico")


NECKS_AND_HEADS = ("FPN", "ExtendedFPN", "ChannelMapper", "RescaledPyramid", "UPerHead", "FCNHead", "Mask2FormerHead")


FEWER = {"nms_pre": 100, "max_per_img": 20, "num": 32, "num_queries": 100}


def build_small(task: str, name: str):
    """A config's model on a debug-sized backbone of the same family with three classes, and the config."""
    cfg = shrink(read_config(task, name))
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model), cfg


def shrink(cfg):
    """The same config on a debug-sized backbone of the family, with three classes."""
    backbone = cfg.model.backbone
    before = describe_backbone(backbone)
    backbone.model = small_model(backbone.model)
    backbone.pretrained = False
    if backbone.model == "convit_pico_vicinal":
        backbone.out_indices = (0, 1, 3, 5)
    channels = dict(zip(before["channels"], describe_backbone(backbone)["channels"], strict=True))
    for node in walk(cfg.model):
        if node.get("type") in NECKS_AND_HEADS:
            key = "channels" if node.type == "RescaledPyramid" else "in_channels"
            widths = node[key]
            node[key] = (
                [channels.get(x, x) for x in widths] if isinstance(widths, list) else channels.get(widths, widths)
            )
    if "size" in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.size = (128, 160)
    set_num_classes(cfg.model, 3)
    for node in walk(cfg.model):
        if node.get("type") == "SyncBN":
            node.type = "BN"
        # a thousand proposals for two objects would be most of the cost, and 900 queries need 900 pixels
        for key, most in FEWER.items():
            if isinstance(node.get(key), int):
                node[key] = min(node[key], most)
    return cfg
