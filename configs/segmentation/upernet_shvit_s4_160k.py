# SHViT-S4, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Not published by the authors: the usual schedule; nobody has measured it.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(model="shvit_s4_vicinal"),
    neck=dict(type="ExtendedFPN", in_channels=[224, 336, 448], out_channels=256, num_outs=5, num_finer=2),
    decode_head=dict(in_index=[0, 1, 2, 3, 4], in_channels=[256] * 5),
    auxiliary_head=dict(in_channels=256),
)
