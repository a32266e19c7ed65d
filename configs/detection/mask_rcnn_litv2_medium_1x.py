# LITv2-Medium, Mask R-CNN, 1x, single scale, batch 16, float16.
# Published (ziplab/LITv2): box AP 46.8, mask AP 42.3; with window_sizes=(0, 0, 4, 1): 46.5, 42.0.
_base_ = "mask_rcnn_litv2_small_1x.py"
model = dict(backbone=dict(model="litv2_medium"))
