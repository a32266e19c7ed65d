# HaloNet-50ts, Mask R-CNN, 1x, single scale, batch 16.
# Not published by the authors: the usual schedule of the family's size; nobody has measured it.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="halonet50ts_vicinal", drop_path_rate=0.1, norm_eval=True),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(norm=no_decay, height_rel=no_decay, width_rel=no_decay)),
)
