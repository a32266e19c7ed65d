# DiNAT-Base, Cascade Mask R-CNN, 3x, multi-scale, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): box AP 53.4, mask AP 46.2.
_base_ = "cascade_mask_rcnn_dinat_mini_3x.py"
model = dict(backbone=dict(model="dinat_base", drop_path_rate=0.6), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
