# ConViT-Small, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Not published by the authors: the usual schedule; nobody has measured it.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(model="convit_small_vicinal", drop_path_rate=0.2, out_indices=(2, 5, 8, 11)),
    neck=dict(type="RescaledPyramid", channels=432),
    decode_head=dict(in_channels=[432] * 4),
    auxiliary_head=dict(in_channels=432),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(pos_embed=no_decay, cls_token=no_decay, norm=no_decay)),
)
