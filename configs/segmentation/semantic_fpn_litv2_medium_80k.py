# LITv2-Medium, Semantic FPN, ADE20K, 80k iterations, crop 512, batch 16.
# Published (ziplab/LITv2): mIoU 45.7.
_base_ = "semantic_fpn_litv2_small_80k.py"
model = dict(backbone=dict(model="litv2_medium"))
