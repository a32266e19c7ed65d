# DiNAT-Large, UPerNet, ADE20K, 160k iterations, crop 512, batch 16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 54.0, 54.9 multi-scale with flips.
# From ImageNet-22K weights. The authors call it 640 x 640, but their config trains at 512, as this one does.
_base_ = "upernet_dinat_mini_160k.py"
model = dict(
    backbone=dict(
        model="dinat_large_21k",
        drop_path_rate=0.3,
        dilations=[[1, 20], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2]],
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(type="OptimWrapper")
