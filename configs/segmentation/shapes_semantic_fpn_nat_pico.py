# First light for segmentation: a small NAT and the head of Semantic FPN, on a pyramid with a path up and one down
# (arXiv:1803.01534), learn synthetic scenes of three shapes from random weights.
#
#   vicinal shapes runs/scenes
#   vicinal segment train shapes_semantic_fpn_nat_pico --data runs/scenes --output runs/shapes_maps
#
# Cost: 6 CPU-minutes in one thread. Result, measured once: mean IoU 84.6 %, pixel accuracy 97.9 %.
_base_ = ["_base_/runtime.py", "_base_/semantic_fpn.py", "_base_/ade20k.py"]

width = 64
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(model="nat_pico", pretrained=False, output_norm="layer"),
    # NAT's stem and downsampling are linear, so that convolutions with activations in the neck are what tells shapes
    # apart. Mean IoU after 1500 iterations: 85 % with this neck, 68 % with an FPN of the same layers.
    neck=dict(
        type="mmdet.PAFPN",
        in_channels=[32, 64, 128, 256],
        out_channels=width,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        act_cfg=dict(type="ReLU"),
    ),
    decode_head=dict(
        in_channels=[width] * 4,
        channels=width,
        num_classes=4,
        dropout_ratio=0.0,
        # nine tenths of the pixels are background, and a triangle has least of the others
        loss_decode=dict(class_weight=[0.2, 1.0, 1.0, 1.3]),
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
in_process = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=4, **in_process, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=10, **in_process, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters, warmup, lr = 2000, 200, 2e-3
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=500)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=warmup, end=max_iters, eta_min=0.01 * lr),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=100))
