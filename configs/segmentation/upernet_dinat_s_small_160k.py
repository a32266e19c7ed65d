# DiNAT_s-Small, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 48.6, 49.9 multi-scale with flips.
_base_ = "upernet_dinat_s_tiny_160k.py"
model = dict(backbone=dict(model="dinat_s_small"))
