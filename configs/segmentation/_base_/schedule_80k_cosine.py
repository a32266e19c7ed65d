# 80k iterations of AdamW: linear warm-up over 1000 iterations from a tenth, then cosine decay to almost nothing.
_base_ = "schedule_80k_poly.py"
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, by_epoch=False, begin=1000, end=80000),
]
