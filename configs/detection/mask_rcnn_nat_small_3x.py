# NAT-Small, Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 48.4, mask AP 43.2.
_base_ = "mask_rcnn_nat_mini_3x.py"
model = dict(backbone=dict(model="nat_small", drop_path_rate=0.35), neck=dict(in_channels=[96, 192, 384, 768]))
