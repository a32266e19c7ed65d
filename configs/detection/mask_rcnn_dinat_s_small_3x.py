# DiNAT_s-Small, Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 48.6, mask AP 43.5.
_base_ = "mask_rcnn_dinat_s_tiny_3x.py"
model = dict(backbone=dict(model="dinat_s_small", drop_path_rate=0.35))
