# RetinaNet (arXiv:1708.02002) with FPN-256, as in MMDetection. The first map, which it does not use, is not asked for.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
model = dict(
    backbone=dict(_delete_=True, type="VicinalBackbone", pretrained=True, out_indices=(1, 2, 3)),
    neck=dict(start_level=0),
)
