# DiNAT-Tiny, Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 48.6, mask AP 43.5.
_base_ = "mask_rcnn_dinat_mini_3x.py"
model = dict(backbone=dict(model="dinat_tiny"))
