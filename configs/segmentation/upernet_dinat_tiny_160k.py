# DiNAT-Tiny, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 47.8, 48.8 multi-scale with flips.
_base_ = "upernet_dinat_mini_160k.py"
model = dict(backbone=dict(model="dinat_tiny", drop_path_rate=0.3))
