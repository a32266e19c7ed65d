# 12 epochs, learning rate / 10 at 8 and 11, linear warm-up over 500 iterations.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
