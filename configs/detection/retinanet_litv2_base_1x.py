# LITv2-Base, RetinaNet, 1x, single scale, batch 16, float16.
# Published (ziplab/LITv2): box AP 46.7; with window_sizes=(0, 0, 4, 1): 46.3.
_base_ = "retinanet_litv2_small_1x.py"
model = dict(
    backbone=dict(model="litv2_base", drop_path_rate=0.3, grad_checkpointing=True),
    neck=dict(in_channels=[256, 512, 1024]),
)
