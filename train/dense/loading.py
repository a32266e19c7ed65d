"""The transform that loads images in pipelines of MMDetection and MMSegmentation."""

from typing import Any

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import TRANSFORMS

from .images import annotated_size, read_image, to_bgr


@TRANSFORMS.register_module()
class LoadDecodedImage(LoadImageFromFile):
    """MMCV's LoadImageFromFile for color images, decoded as everywhere in the package.

    Orientation is applied, wide integers and fractions are scaled, transparent pixels composed; OpenCV clips the former
    and shows the hidden color of the latter.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``img``, blue first, (H, W, 3), and its shape."""
        image = to_bgr(read_image(results["img_path"], annotated_size(results)))
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results
