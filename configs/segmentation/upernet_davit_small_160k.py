# DaViT-Small, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Published (dingmyu/davit): mIoU 48.8.
# The drop-path rate of this size is not published; this is the Tiny one's.
_base_ = "upernet_davit_tiny_160k.py"
model = dict(backbone=dict(model="davit_small_vicinal"))
