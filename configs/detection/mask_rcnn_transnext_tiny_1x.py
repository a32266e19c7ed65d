# TransNeXt-Tiny, Mask R-CNN, 1x, single scale, batch 16.
# Published (DaiShiResearch/TransNeXt): box AP 49.9, mask AP 44.6.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="transnext_tiny", drop_path_rate=0.4),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(query_embedding=no_decay, position_bias=no_decay, temperature=no_decay, norm=no_decay)
    ),
)
