# What every detection config shares: our registrations, logging, checkpoints.
_base_ = "mmdet::_base_/default_runtime.py"
custom_imports = dict(imports=["vicinal.zoo.mmlab", "vicinal.zoo.mmlab.roi"], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
