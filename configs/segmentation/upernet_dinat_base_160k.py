# DiNAT-Base, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 49.6, 50.4 multi-scale with flips.
_base_ = "upernet_dinat_mini_160k.py"
model = dict(
    backbone=dict(model="dinat_base", drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
