# TransNeXt-Tiny, DINO with 5 scales, 12 epochs, batch 16 (8 GPUs, 1 image each, 2 steps accumulated), float32.
# Published (DaiShiResearch/TransNeXt): box AP 55.7.
_base_ = "_base_/dino_5scale.py"
model = dict(
    backbone=dict(model="transnext_tiny", drop_path_rate=0.3),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(accumulative_counts=2)
