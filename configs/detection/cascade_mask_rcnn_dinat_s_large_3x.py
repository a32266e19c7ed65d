# DiNAT_s-Large, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 54.8, mask AP 47.2.
# From ImageNet-22K weights.
_base_ = "cascade_mask_rcnn_dinat_s_tiny_3x.py"
model = dict(backbone=dict(model="dinat_s_large_21k", drop_path_rate=0.6), neck=dict(in_channels=[192, 384, 768, 1536]))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
