# BiFormer-Base, RetinaNet, 1x, single scale, batch 16, float16 with a loss scale of 512.
# Published (rayleizhu/BiFormer): box AP 47.1.
_base_ = "retinanet_biformer_small_1x.py"
model = dict(backbone=dict(model="biformer_base", drop_path_rate=0.3), neck=dict(in_channels=[192, 384, 768]))
