# DINO (arXiv:2203.03605) with four scales, from the last three maps; 12 epochs, learning rate / 10 at 11, no warm-up.
_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = dict(imports=["vicinal.zoo.mmlab", "vicinal.zoo.mmlab.roi"], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
model = dict(backbone=dict(_delete_=True, type="VicinalBackbone", pretrained=True, out_indices=(1, 2, 3)))
optim_wrapper = dict(
    constructor="BackboneOptimWrapperConstructor",
    optimizer=dict(weight_decay=0.05),
    # no decay of biases, norms and flat parameters anywhere, nor of what the model exempts
    paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0, flat_decay_mult=0.0, model_no_decay=True),
)
