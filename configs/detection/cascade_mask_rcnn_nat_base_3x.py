# NAT-Base, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 52.3, mask AP 45.1.
_base_ = "cascade_mask_rcnn_nat_mini_3x.py"
model = dict(backbone=dict(model="nat_base", drop_path_rate=0.5), neck=dict(in_channels=[128, 256, 512, 1024]))
