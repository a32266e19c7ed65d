# LITv2-Base, Semantic FPN, ADE20K, 80k iterations, crop 512, batch 16.
# Published (ziplab/LITv2): mIoU 47.2.
_base_ = "semantic_fpn_litv2_small_80k.py"
model = dict(backbone=dict(model="litv2_base", drop_path_rate=0.3), neck=dict(in_channels=[128, 256, 512, 1024]))
