# DaViT-Base, Mask R-CNN, 1x, multi-scale, batch 16.
# Published (dingmyu/davit): box AP 48.2, mask AP 43.3.
# The drop-path rate of this size is not published; this is the Tiny one's.
_base_ = "mask_rcnn_davit_tiny_1x.py"
model = dict(backbone=dict(model="davit_base_vicinal"), neck=dict(in_channels=[128, 256, 512, 1024]))
