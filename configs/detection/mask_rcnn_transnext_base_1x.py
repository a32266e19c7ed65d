# TransNeXt-Base, Mask R-CNN, 1x, single scale, batch 16, float16 with a loss scale of 512.
# Published (DaiShiResearch/TransNeXt): box AP 51.7, mask AP 45.9.
_base_ = "mask_rcnn_transnext_tiny_1x.py"
model = dict(backbone=dict(model="transnext_base", drop_path_rate=0.7), neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(type="AutocastOptimWrapper", loss_scale=512.0)
