# NAT-Tiny, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 51.4, mask AP 44.5.
_base_ = "cascade_mask_rcnn_nat_mini_3x.py"
model = dict(backbone=dict(model="nat_tiny", drop_path_rate=0.3))
