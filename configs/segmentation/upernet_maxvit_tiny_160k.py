# MaxViT-Tiny, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Not published by the authors: the usual schedule; nobody has measured it.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(model="maxvit_tiny", drop_path_rate=0.2, output_norm="layer"),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias=no_decay, norm=no_decay)),
)
