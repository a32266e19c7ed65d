# ConViT-Small, Mask R-CNN, 1x, single scale, batch 16.
# Not published by the authors: the usual schedule of the family's size; nobody has measured it.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance.py",
    "_base_/schedule_1x.py",
]
fpn = dict(type="FPN", in_channels=[432, 432, 432, 432], out_channels=256, num_outs=5)
model = dict(
    backbone=dict(model="convit_small_vicinal", drop_path_rate=0.1, out_indices=(2, 5, 8, 11)),
    neck=[dict(type="RescaledPyramid", channels=432), fpn],
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(pos_embed=no_decay, cls_token=no_decay, norm=no_decay)),
)
