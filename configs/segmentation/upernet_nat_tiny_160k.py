# NAT-Tiny, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 47.1, 48.4 multi-scale with flips.
_base_ = "upernet_nat_mini_160k.py"
model = dict(backbone=dict(model="nat_tiny", drop_path_rate=0.3))
