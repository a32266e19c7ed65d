# DiNAT-Small, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 52.9, mask AP 45.8.
_base_ = "cascade_mask_rcnn_dinat_mini_3x.py"
model = dict(backbone=dict(model="dinat_small", drop_path_rate=0.5), neck=dict(in_channels=[96, 192, 384, 768]))
