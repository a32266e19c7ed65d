# NAT-Tiny, Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 47.7, mask AP 42.6.
_base_ = "mask_rcnn_nat_mini_3x.py"
model = dict(backbone=dict(model="nat_tiny"))
