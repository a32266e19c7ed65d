# TransNeXt-Small, DINO with 5 scales, 12 epochs, batch 16 (8 GPUs, 1 image each, 2 steps accumulated), float32.
# Published (DaiShiResearch/TransNeXt): box AP 56.6.
_base_ = "dino_5scale_transnext_tiny_12e.py"
model = dict(backbone=dict(model="transnext_small", drop_path_rate=0.5))
