"""Data of ``vicinal segment``: MMSegmentation's own, on the files that lie there, with labels that are checked."""

from ...zoo import mmlab  # noqa: F401  first: it offers the operators that mmseg imports

# isort: split
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS

from .labels import check_labels, pair_files, read_labels


class PairedFiles:
    """The part of a data set that finds its files: images of any format, each with the label map of its name."""

    def load_data_list(self) -> list[dict]:
        """Entries as BaseSegDataset makes them."""
        if self.ann_file:
            return super().load_data_list()
        shared = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        shared["num_classes"] = len(self.METAINFO.get("classes") or self.metainfo["classes"])
        pairs = pair_files(self.data_prefix["img_path"], self.data_prefix["seg_map_path"]).pairs
        return [
            {"img_path": str(image), "seg_map_path": str(labels), "seg_fields": [], **shared} for image, labels in pairs
        ]


@DATASETS.register_module()
class PairedSegDataset(PairedFiles, BaseSegDataset):
    """MMSegmentation's BaseSegDataset, of all images in its folder."""


@DATASETS.register_module()
class PairedADE20KDataset(PairedFiles, ADE20KDataset):
    """MMSegmentation's ADE20KDataset, of all images in its folder."""


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(LoadAnnotations):
    """MMSegmentation's LoadAnnotations, of integers of any width; a label that no class has is an error."""

    def _load_seg_map(self, results: dict) -> None:
        path, reduce = results["seg_map_path"], results["reduce_zero_label"]
        if "num_classes" not in results or results.get("label_map") is not None:
            super()._load_seg_map(results)
            return
        results["gt_seg_map"] = check_labels(read_labels(path), path, results["num_classes"], bool(reduce))
        results["seg_fields"].append("gt_seg_map")
