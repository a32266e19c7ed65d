# SHViT-S4, Mask R-CNN, 1x, single scale, batch 16.
# Published (ysj9909/SHViT): box AP 39.0, mask AP 35.9.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="shvit_s4_vicinal"),
    neck=dict(
        _delete_=True, type="ExtendedFPN", in_channels=[224, 336, 448], out_channels=256, num_outs=5, num_finer=2
    ),
)
