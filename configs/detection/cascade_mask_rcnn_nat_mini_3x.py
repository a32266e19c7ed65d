# NAT-Mini, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 50.3, mask AP 43.6.
_base_ = [
    "_base_/runtime.py",
    "_base_/cascade_mask_rcnn.py",
    "_base_/coco_instance_multiscale.py",
    "_base_/schedule_3x.py",
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
