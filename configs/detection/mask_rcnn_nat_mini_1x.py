# NAT-Mini, Mask R-CNN, 1x, single scale, batch 16, float16.
# Not published by the authors: the usual schedule of the family's size; nobody has measured it.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="nat_mini", drop_path_rate=0.2, output_norm="layer"),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias=no_decay, norm=no_decay)),
)
