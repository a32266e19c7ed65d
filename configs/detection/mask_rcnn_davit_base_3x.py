# DaViT-Base, Mask R-CNN, 3x, multi-scale, batch 16.
# Published (dingmyu/davit): box AP 49.9, mask AP 44.6.
# The drop-path rate of this size is not published; this is the Tiny one's.
_base_ = "mask_rcnn_davit_tiny_3x.py"
model = dict(backbone=dict(model="davit_base_vicinal"), neck=dict(in_channels=[128, 256, 512, 1024]))
