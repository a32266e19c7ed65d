# DiNAT-Mini, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 45.8, 47.2 multi-scale with flips.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        model="dinat_mini",
        drop_path_rate=0.2,
        output_norm="layer",
        dilations=[[1, 16], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2]],
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias=no_decay, norm=no_decay)),
)
