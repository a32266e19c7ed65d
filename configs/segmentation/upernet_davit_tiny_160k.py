# DaViT-Tiny, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Published (dingmyu/davit): mIoU 46.3.
_base_ = ["_base_/runtime.py", "_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(model="davit_tiny_vicinal", drop_path_rate=0.3, output_norm="layer"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
