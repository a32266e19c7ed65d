# TransNeXt-Base, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Published (DaiShiResearch/TransNeXt): mIoU 53.0; multi-scale 53.5 with interpolated position bias, 53.7 extrapolated.
_base_ = "upernet_transnext_tiny_160k.py"
model = dict(
    backbone=dict(model="transnext_base", drop_path_rate=0.7),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
