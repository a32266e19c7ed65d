# LITv2-Small, Mask R-CNN, 1x, single scale, batch 16, float16.
# Published (ziplab/LITv2): box AP 44.9, mask AP 40.8; with window_sizes=(0, 0, 4, 1): 44.7, 40.7.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(
        model="litv2_small", drop_path_rate=0.2, output_norm=[None, "layer", "layer", "layer"], input_multiple=32
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    optimizer=dict(lr=0.0002, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys=dict(norm=no_decay)),
)
