# TransNeXt-Small, Mask2Former, ADE20K, 160k iterations, crop 512, batch 16.
# Published (DaiShiResearch/TransNeXt): mIoU 54.1.
_base_ = "mask2former_transnext_tiny_160k.py"
model = dict(backbone=dict(model="transnext_small", drop_path_rate=0.5))
