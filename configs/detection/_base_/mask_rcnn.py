# Mask R-CNN (arXiv:1703.06870) with FPN-256, as in MMDetection.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
model = dict(
    backbone=dict(_delete_=True, type="VicinalBackbone", pretrained=True),
    roi_head=dict(
        bbox_roi_extractor=dict(type="Float32RoIExtractor"),
        mask_roi_extractor=dict(type="Float32RoIExtractor"),
    ),
)
