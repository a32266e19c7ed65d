# DINO with five scales, from all four maps.
_base_ = "dino_4scale.py"
levels = 5
model = dict(
    num_feature_levels=levels,
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=dict(num_outs=levels),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=levels))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=levels))),
)
