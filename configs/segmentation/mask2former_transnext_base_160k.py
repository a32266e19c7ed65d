# TransNeXt-Base, Mask2Former, ADE20K, 160k iterations, crop 512, batch 16.
# Published (DaiShiResearch/TransNeXt): mIoU 54.7.
_base_ = "mask2former_transnext_tiny_160k.py"
model = dict(
    backbone=dict(model="transnext_base", drop_path_rate=0.6), decode_head=dict(in_channels=[96, 192, 384, 768])
)
