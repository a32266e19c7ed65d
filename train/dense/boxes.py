"""Data and measure of ``vicinal detect``: MMDetection's own, on COCO files that are checked and matched by name."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ...zoo import mmlab  # noqa: F401  first: it offers the operators that mmdet imports

# isort: split
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS

from .coco import read_coco


class CheckedCoco(COCO):
    """pycocotools' index of a checked file.

    Args:
        path: of the COCO file.
        classes: of the model; category ``i + 1`` is class ``i``, and one that the file lacks has no objects.
        masks: whether segmentations are kept.
    """

    def __init__(self, path: str, classes: Sequence[str], masks: bool) -> None:
        super().__init__()
        self.dataset = read_coco(path, classes, masks).content
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """MMDetection's CocoDataset with the categories of its file matched to the classes by name.

    Args:
        masks: whether the pipeline takes segmentations.
        **kwargs: as for CocoDataset.
    """

    def __init__(self, *args: Any, masks: bool = True, **kwargs: Any) -> None:
        self.masks = masks
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        """As CocoDataset, of a checked file."""
        self.COCOAPI = partial(CheckedCoco, classes=self.metainfo["classes"], masks=self.masks)
        return super().load_data_list()


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """MMDetection's CocoMetric on a checked file; without a single detection the figures are 0, not absent.

    Args:
        ann_file: COCO file.
        classes: of the model.
        **kwargs: as for CocoMetric.
    """

    def __init__(self, ann_file: str, classes: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._coco_api = CheckedCoco(ann_file, classes, masks="segm" in self.metrics)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Figures by name, from 0 to 1."""
        figures = super().compute_metrics(results)
        wanted = [f"{metric}_mAP{kind}" for metric in self.metrics for kind in ("", "_50", "_75", "_s", "_m", "_l")]
        return figures or dict.fromkeys(wanted, 0.0)
