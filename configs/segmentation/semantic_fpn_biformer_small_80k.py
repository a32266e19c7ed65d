# BiFormer-Small, Semantic FPN, ADE20K, 80k iterations, crop 512, batch 32, float16 with a loss scale of 512.
# Published (rayleizhu/BiFormer): mIoU 48.9.
_base_ = ["_base_/runtime.py", "_base_/semantic_fpn.py", "_base_/ade20k.py", "_base_/schedule_80k_cosine.py"]
model = dict(
    backbone=dict(model="biformer_small", drop_path_rate=0.15, output_norm="layer", grid=8),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(lr=2e-4),
)
