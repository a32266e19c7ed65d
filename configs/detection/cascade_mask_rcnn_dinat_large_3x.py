# DiNAT-Large, Cascade Mask R-CNN, 3x, multi-scale, batch 16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 55.3, mask AP 47.8.
# From ImageNet-22K weights. In float32: the authors saw float16 diverge.
_base_ = "cascade_mask_rcnn_dinat_mini_3x.py"
model = dict(backbone=dict(model="dinat_large_21k", drop_path_rate=0.6), neck=dict(in_channels=[192, 384, 768, 1536]))
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=7.5e-5))
