# DaViT-Small, Mask R-CNN, 1x, multi-scale, batch 16.
# Published (dingmyu/davit): box AP 47.7, mask AP 42.9.
# The drop-path rate of this size is not published; this is the Tiny one's.
_base_ = "mask_rcnn_davit_tiny_1x.py"
model = dict(backbone=dict(model="davit_small_vicinal"))
