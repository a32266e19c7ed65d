# BiFormer-Base, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16 with a loss scale of 512.
# Published (rayleizhu/BiFormer): mIoU 51.0, 51.7 multi-scale with flips.
_base_ = "upernet_biformer_small_160k.py"
model = dict(
    backbone=dict(model="biformer_base", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
