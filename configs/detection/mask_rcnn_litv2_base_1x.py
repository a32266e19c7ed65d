# LITv2-Base, Mask R-CNN, 1x, single scale, batch 16, float16.
# Published (ziplab/LITv2): box AP 47.3, mask AP 42.6; with window_sizes=(0, 0, 4, 1): 46.8, 42.3.
_base_ = "mask_rcnn_litv2_small_1x.py"
model = dict(
    backbone=dict(model="litv2_base", drop_path_rate=0.3, grad_checkpointing=True),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
