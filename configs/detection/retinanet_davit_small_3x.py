# DaViT-Small, RetinaNet, 3x, multi-scale, batch 16.
# Published (dingmyu/davit): box AP 48.2.
# The drop-path rate of this size is not published; this is the Tiny one's.
_base_ = "retinanet_davit_tiny_3x.py"
model = dict(backbone=dict(model="davit_small_vicinal"))
