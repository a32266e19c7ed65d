# DiNAT_s-Tiny, Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 46.6, mask AP 42.1.
_base_ = [
    "_base_/runtime.py",
    "_base_/mask_rcnn.py",
    "_base_/coco_instance_multiscale.py",
    "_base_/schedule_3x.py",
]
model = dict(
    backbone=dict(
        model="dinat_s_tiny",
        drop_path_rate=0.2,
        output_norm="layer",
        dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias=no_decay, norm=no_decay)),
)
