"""RoI features under autocast. Apart from the other modules because it imports MMDetection."""

import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class Float32RoIExtractor(SingleRoIExtractor):
    """MMDetection's RoI extractor in float32 under autocast.

    MMDetection rounds the boxes to the dtype of the maps: in bfloat16 the column 1333 becomes 1336.
    """

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        with torch.autocast(rois.device.type, enabled=False):
            return super().forward(tuple(x.float() for x in feats), rois.float(), roi_scale_factor)
