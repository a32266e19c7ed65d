# Cascade Mask R-CNN (arXiv:1906.09756) with FPN-256 and the box heads of the published NAT and DiNAT runs: four
# convolutions with synchronised batch norm and one linear layer, a GIoU loss on decoded boxes.
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"
box_heads = [
    dict(
        type="ConvFCBBoxHead",
        num_shared_convs=4,
        num_shared_fcs=1,
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[x, x, 2 * x, 2 * x]),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    )
    for x in (0.1, 0.05, 0.033)
]
# the published third stage rounds twice 0.033 up
box_heads[2]["bbox_coder"]["target_stds"] = [0.033, 0.033, 0.067, 0.067]
model = dict(
    backbone=dict(_delete_=True, type="VicinalBackbone", pretrained=True),
    roi_head=dict(
        bbox_roi_extractor=dict(type="Float32RoIExtractor"),
        mask_roi_extractor=dict(type="Float32RoIExtractor"),
        bbox_head=box_heads,
    ),
)
