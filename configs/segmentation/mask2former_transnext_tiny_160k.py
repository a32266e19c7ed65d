# TransNeXt-Tiny, Mask2Former, ADE20K, 160k iterations, crop 512, batch 16.
# Published (DaiShiResearch/TransNeXt): mIoU 53.4.
_base_ = "_base_/mask2former.py"
model = dict(
    backbone=dict(model="transnext_tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
)
