# DaViT-Small, Mask R-CNN, 3x, multi-scale, batch 16.
# Published (dingmyu/davit): box AP 49.5, mask AP 44.3.
# The drop-path rate of this size is not published; this is the Tiny one's.
_base_ = "mask_rcnn_davit_tiny_3x.py"
model = dict(backbone=dict(model="davit_small_vicinal"))
