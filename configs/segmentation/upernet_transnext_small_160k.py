# TransNeXt-Small, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Published (DaiShiResearch/TransNeXt): mIoU 52.2; multi-scale 52.5 with interpolated position bias, 52.8 extrapolated.
_base_ = "upernet_transnext_tiny_160k.py"
model = dict(backbone=dict(model="transnext_small", drop_path_rate=0.6))
