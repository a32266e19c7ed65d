# LITv2-Small, RetinaNet, 1x, single scale, batch 16, float16.
# Published (ziplab/LITv2): box AP 44.0; with window_sizes=(0, 0, 4, 1): 43.7.
_base_ = [
    "_base_/runtime.py",
    "_base_/retinanet.py",
    "_base_/coco_box.py",
    "_base_/schedule_1x.py",
]
model = dict(
    backbone=dict(model="litv2_small", drop_path_rate=0.2, output_norm="layer", input_multiple=32),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    optimizer=dict(weight_decay=1e-4),
)
