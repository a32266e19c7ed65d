# DiNAT_s-Large, UPerNet, ADE20K, 160k iterations, crop 512, batch 16, float16.
# Published (SHI-Labs/Neighborhood-Attention-Transformer): mIoU 53.4, 54.6 multi-scale with flips.
# From ImageNet-22K weights. The authors call it 640 x 640, but their config trains at 512, as this one does.
_base_ = "upernet_dinat_s_tiny_160k.py"
model = dict(
    backbone=dict(
        model="dinat_s_large_21k",
        dilations=[[1, 20], [1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2]],
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
