# BiFormer-Base, Semantic FPN, ADE20K, 80k iterations, crop 512, batch 32, float16 with a loss scale of 512.
# Published (rayleizhu/BiFormer): mIoU 49.9.
_base_ = "semantic_fpn_biformer_small_80k.py"
model = dict(backbone=dict(model="biformer_base", drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))
