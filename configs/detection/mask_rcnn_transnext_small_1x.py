# TransNeXt-Small, Mask R-CNN, 1x, single scale, batch 16.
# Published (DaiShiResearch/TransNeXt): box AP 51.1, mask AP 45.5.
_base_ = "mask_rcnn_transnext_tiny_1x.py"
model = dict(backbone=dict(model="transnext_small", drop_path_rate=0.6))
