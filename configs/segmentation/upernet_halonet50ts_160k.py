# HaloNet-50ts, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Not published by the authors: the usual schedule; nobody has measured it.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(model="halonet50ts_vicinal", drop_path_rate=0.2),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(norm=no_decay, height_rel=no_decay, width_rel=no_decay)),
)
