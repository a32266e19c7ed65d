# BiFormer-Small, RetinaNet, 1x, single scale, batch 16, float16 with a loss scale of 512.
# Published (rayleizhu/BiFormer): box AP 45.9 in the paper, 47.3 in the authors' second run.
_base_ = [
    "_base_/runtime.py",
    "_base_/retinanet.py",
    "_base_/coco_box.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="biformer_small", drop_path_rate=0.2, output_norm="layer", grid=16),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(weight_decay=1e-4),
)
