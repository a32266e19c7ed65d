# LITv2-Medium, RetinaNet, 1x, single scale, batch 16, float16.
# Published (ziplab/LITv2): box AP 46.0; with window_sizes=(0, 0, 4, 1): 45.8.
_base_ = "retinanet_litv2_small_1x.py"
model = dict(backbone=dict(model="litv2_medium"))
