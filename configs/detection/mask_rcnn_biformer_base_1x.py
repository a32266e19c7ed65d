# BiFormer-Base, Mask R-CNN, 1x, single scale, batch 16, float16.
# Published (rayleizhu/BiFormer): box AP 48.6, mask AP 43.7.
_base_ = "mask_rcnn_biformer_small_1x.py"
model = dict(backbone=dict(model="biformer_base", drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))
