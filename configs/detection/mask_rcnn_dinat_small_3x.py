# DiNAT-Small, Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 49.3, mask AP 44.0.
_base_ = "mask_rcnn_dinat_mini_3x.py"
model = dict(backbone=dict(model="dinat_small", drop_path_rate=0.35), neck=dict(in_channels=[96, 192, 384, 768]))
