# DiNAT_s-Small, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 52.3, mask AP 45.2.
_base_ = "cascade_mask_rcnn_dinat_s_tiny_3x.py"
model = dict(backbone=dict(model="dinat_s_small", drop_path_rate=0.5))
