# BiFormer-Small, Mask R-CNN, 1x, single scale, batch 16, float16.
# Published (rayleizhu/BiFormer): box AP 47.8, mask AP 43.2 in the paper; 48.1, 43.6 in the authors' second run.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="biformer_small", drop_path_rate=0.2, output_norm="layer", grid=16),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    paramwise_cfg=dict(custom_keys=dict(norm=no_decay)),
)
