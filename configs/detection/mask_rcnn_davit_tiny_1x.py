# DaViT-Tiny, Mask R-CNN, 1x, multi-scale, batch 16.
# Published (dingmyu/davit): box AP 45.0, mask AP 41.1.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance_multiscale.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="davit_tiny_vicinal", drop_path_rate=0.1, output_norm="layer"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
