# SHViT-S4, RetinaNet, 1x, single scale, batch 16.
# Published (ysj9909/SHViT): box AP 38.8.
_base_ = [
    "_base_/runtime.py",
    "_base_/retinanet.py",
    "_base_/coco_box.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="shvit_s4_vicinal", out_indices=(0, 1, 2)),
    neck=dict(
        _delete_=True,
        type="ExtendedFPN",
        in_channels=[224, 336, 448],
        out_channels=256,
        num_outs=5,
        num_finer=1,
        extra_levels="conv",
    ),
)
