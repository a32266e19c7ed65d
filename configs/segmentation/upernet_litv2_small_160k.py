# LITv2-Small, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Not published by the authors: the usual schedule; nobody has measured it.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        model="litv2_small", drop_path_rate=0.2, output_norm=[None, "layer", "layer", "layer"], input_multiple=32
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
