# NAT-Small, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 52.0, mask AP 44.9.
_base_ = "cascade_mask_rcnn_nat_mini_3x.py"
model = dict(backbone=dict(model="nat_small", drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))
