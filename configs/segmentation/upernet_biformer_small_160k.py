# BiFormer-Small, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16 with a loss scale of 512.
# Published (rayleizhu/BiFormer): mIoU 49.8, 50.8 multi-scale with flips.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(model="biformer_small", drop_path_rate=0.3, output_norm="layer", grid=8),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    loss_scale=512.0,
    paramwise_cfg=dict(custom_keys=dict(norm=no_decay)),
)
