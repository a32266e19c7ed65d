# DiNAT-Tiny, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 52.2, mask AP 45.1.
_base_ = "cascade_mask_rcnn_dinat_mini_3x.py"
model = dict(backbone=dict(model="dinat_tiny", drop_path_rate=0.3))
