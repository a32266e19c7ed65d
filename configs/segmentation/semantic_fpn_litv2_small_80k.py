# LITv2-Small, Semantic FPN, ADE20K, 80k iterations, crop 512, batch 16.
# Published (ziplab/LITv2): mIoU 44.3.
_base_ = ["_base_/runtime.py", "_base_/semantic_fpn.py", "_base_/ade20k.py", "_base_/schedule_80k_poly.py"]
model = dict(
    backbone=dict(
        model="litv2_small", drop_path_rate=0.2, output_norm=[None, "layer", "layer", "layer"], input_multiple=32
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
