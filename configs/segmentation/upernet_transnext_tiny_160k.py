# TransNeXt-Tiny, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Published (DaiShiResearch/TransNeXt): mIoU 51.1; multi-scale 51.5 with interpolated position bias, 51.7 extrapolated.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(model="transnext_tiny", drop_path_rate=0.4),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys=dict(query_embedding=no_decay, position_bias=no_decay, temperature=no_decay, norm=no_decay)
    ),
)
