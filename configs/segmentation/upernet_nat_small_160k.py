# NAT-Small, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 48.0, 49.5 multi-scale with flips.
_base_ = "upernet_nat_mini_160k.py"
model = dict(
    backbone=dict(model="nat_small", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
