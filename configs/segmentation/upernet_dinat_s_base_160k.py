# DiNAT_s-Base, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 49.4, 50.2 multi-scale with flips.
_base_ = "upernet_dinat_s_tiny_160k.py"
model = dict(
    backbone=dict(model="dinat_s_base"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
