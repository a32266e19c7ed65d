"""A look at the data before any work: what a run could not use is refused, what is left out or changed is said."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ...errors import UserError, nearest
from .coco import CocoFile, check_coco_images, read_coco
from .labels import check_label_maps, pair_files

COCO_DATASETS = ("CocoDataset", "CheckedCocoDataset")
SEGMENTATION_DATASETS = ("BaseSegDataset", "ADE20KDataset")


@dataclass
class Findings:
    """What is known of a run's data.

    Attributes:
        notes: what was completed, changed or left out, in sentences.
        images: by loader, as many as it yields.
    """

    notes: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)


def check_data(cfg: Config, task: str, loaders: Sequence[str]) -> Findings:
    """Check the data that the loaders of a config read, as far as it is COCO's or lies in ADE20K's folders.

    Raises:
        UserError: data that the run cannot use.
    """
    findings = Findings()
    for loader in loaders:
        for dataset in find_datasets(cfg[loader].dataset, COCO_DATASETS if task == "detect" else SEGMENTATION_DATASETS):
            look = _check_coco_dataset if task == "detect" else _check_segmentation_dataset
            notes, count = look(cfg, loader, dataset)
            findings.notes += [note for note in notes if note not in findings.notes]
            findings.images[loader] = findings.images.get(loader, 0) + count
    return findings


def find_datasets(node: Any, kinds: Sequence[str]) -> Iterator[ConfigDict]:
    """The data sets of some types inside a loader's, which may be wrapped or joined."""
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from find_datasets(child, kinds)
    elif isinstance(node, dict):
        if str(node.get("type")).rpartition(".")[2] in kinds:
            yield node
        for child in node.values():
            yield from find_datasets(child, kinds)


def dataset_classes(dataset: ConfigDict) -> tuple[str, ...]:
    """Names of the classes: the config's own, or those that the data set's type has."""
    classes = (dataset.get("metainfo") or {}).get("classes")
    if classes:
        return tuple(classes)
    if dataset.type.rpartition(".")[2] == "ADE20KDataset":
        from .maps import ADE20KDataset as kind
    else:
        from .boxes import CocoDataset as kind
    return tuple(kind.METAINFO["classes"])


def needs_masks(cfg: Config, loader: str, dataset: ConfigDict) -> bool:
    """Whether the pipeline of a data set, or the measure, takes segmentations."""
    steps = find_datasets(dataset.get("pipeline", []), ("LoadAnnotations",))
    measures = find_datasets(cfg.get(loader.replace("dataloader", "evaluator")), ("CocoMetric", "CheckedCocoMetric"))
    return any(step.get("with_mask") for step in steps) or any("segm" in each.get("metric", ()) for each in measures)


def dataset_paths(dataset: ConfigDict, *prefixes: str) -> list[Path]:
    """The annotation file and the folders of a data set, below its root."""
    root = Path(dataset.get("data_root") or "")
    folders = dataset.get("data_prefix", {})
    return [root / dataset.get("ann_file", ""), *(root / folders.get(prefix, "") for prefix in prefixes)]


def _check_coco_dataset(cfg: Config, loader: str, dataset: ConfigDict) -> tuple[list[str], int]:
    file, folder = dataset_paths(dataset, "img")
    masks = needs_masks(cfg, loader, dataset)
    coco = read_coco(file, dataset_classes(dataset), masks)
    notes = coco.notes + check_coco_images(coco, folder)
    if masks:
        refuse_missing_masks(coco, Path(cfg.filename or "").stem)
    usable = coco.usable_images()
    if not usable:
        raise UserError(f"{file}: no image has an object that can be {_purpose(loader)}{_because(coco.notes)}")
    is_filtered = loader == "train_dataloader" and (dataset.get("filter_cfg") or {}).get("filter_empty_gt")
    return notes, usable if is_filtered else len(coco.images)


def _purpose(loader: str) -> str:
    return "learned" if loader == "train_dataloader" else "measured"


def _because(notes: Sequence[str]) -> str:
    return ": " + "; ".join(note.partition(": ")[2] for note in notes) if notes else ""


def refuse_missing_masks(coco: CocoFile, config: str) -> None:
    """Refuse objects without a segmentation, which a head that learns masks cannot use."""
    missing = [entry for entry in coco.annotations if "segmentation" not in entry]
    if not missing:
        return
    from .configs import CONFIGS

    boxes_only = sorted(path.stem for path in (CONFIGS / "detection").glob("*.py") if "mask" not in path.stem)
    family = nearest(config.replace("cascade_", "").replace("mask_rcnn", "retinanet"), boxes_only, 1)
    raise UserError(
        f"{coco.path}: {len(missing)} of {len(coco.annotations)} annotations have no segmentation (the first is "
        f"{missing[0]['id']}), and {config or 'the config'} learns masks: use a config of boxes alone, such as "
        f"{family.removeprefix('did you mean ').removesuffix('?') or boxes_only[0]}"
    )


def _check_segmentation_dataset(cfg: Config, loader: str, dataset: ConfigDict) -> tuple[list[str], int]:
    if not is_paired(dataset):
        return [], 0
    _, images, maps = dataset_paths(dataset, "img_path", "seg_map_path")
    is_ade = dataset.type.rpartition(".")[2] == "ADE20KDataset"
    classes = dataset_classes(dataset)
    _compare_heads(cfg, classes, Path(dataset.get("data_root") or ""))
    reduce = bool(dataset.get("reduce_zero_label", is_ade))
    labelled = pair_files(images, maps)
    is_learned = loader == "train_dataloader"
    _, notes = check_label_maps(labelled.pairs, classes, reduce, maps, is_learned)
    return labelled.notes + notes, len(labelled.pairs)


def is_paired(dataset: ConfigDict) -> bool:
    """Whether images and label maps have the same names; a config's list of files or endings of its own say others."""
    endings = [dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png")]
    return not dataset.get("ann_file") and all(ending.startswith(".") for ending in endings)


def _compare_heads(cfg: Config, classes: Sequence[str], root: Path) -> None:
    head = cfg.model.get("decode_head")
    head = head[-1] if isinstance(head, (list, tuple)) else head
    count = (head or {}).get("num_classes", len(classes))
    if count != len(classes):
        raise UserError(
            f"the config's head has {count} classes and the data {len(classes)}: name the classes of your own labels "
            f"in {root / 'classes.txt'}, one a line"
        )


def adapt_config(cfg: Config, task: str) -> Config:
    """A copy of a config with our readers in the place of MMDetection's, MMSegmentation's and MMCV's."""
    cfg = copy.deepcopy(cfg)
    adapt = _adapt_detection if task == "detect" else _adapt_segmentation
    adapt(cfg)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for step in find_datasets(cfg[loader].dataset, ("LoadImageFromFile",)):
            if step.get("color_type", "color") == "color":
                step.type = "LoadDecodedImage"
    from . import loading  # noqa: F401 (registers the transform)

    return cfg


def _adapt_detection(cfg: Config) -> None:
    from . import boxes  # noqa: F401 (registers data set and measure)

    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for dataset in find_datasets(cfg[loader].dataset, ("CocoDataset",)):
            metainfo = {**(dataset.get("metainfo") or {}), "classes": dataset_classes(dataset)}
            dataset.update(type="CheckedCocoDataset", masks=needs_masks(cfg, loader, dataset), metainfo=metainfo)
    for kind in ("val", "test"):
        datasets = list(find_datasets(cfg[f"{kind}_dataloader"].dataset, COCO_DATASETS))
        for evaluator in find_datasets(cfg[f"{kind}_evaluator"], ("CocoMetric",)):
            if datasets and evaluator.get("ann_file"):
                evaluator.update(type="CheckedCocoMetric", classes=dataset_classes(datasets[0]))


def _adapt_segmentation(cfg: Config) -> None:
    from . import maps  # noqa: F401 (registers the data sets)

    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for dataset in find_datasets(cfg[loader].dataset, SEGMENTATION_DATASETS):
            if not is_paired(dataset):
                continue
            dataset.type = f"Paired{dataset.type.rpartition('.')[2].removeprefix('Base')}"
            for step in find_datasets(dataset.get("pipeline", []), ("LoadAnnotations",)):
                step.type = "LoadCheckedAnnotations"
    head = cfg.model.get("decode_head")
    if isinstance(head, dict) and head.get("num_classes") == 1:
        # MMSegmentation takes one channel for the foreground of two classes, and calls it class 1
        head.threshold = 1.0
