"""Configs: found by name, and changed by the command's options."""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config, ConfigDict
from timm.models import get_pretrained_cfg, is_model, model_entrypoint

from ...zoo.mmlab.backbone import VicinalBackbone
from ..errors import UserError, first_line, nearest
from .options import DenseData, DenseModel, DenseRun, DenseTrain

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = {"detect": "detection", "segment": "segmentation"}
SCHEDULE_COUNTERS = ("begin", "end", "T_max")


def prepare(task: str, options: DenseTrain) -> Config:
    """The complete config of a run.

    Raises:
        UserError: a config, file or model that does not exist, or an option that the config has no place for.
    """
    cfg = read_config(task, options.config)
    set_data(cfg, task, options.data)
    set_model(cfg, options.model)
    set_run(cfg, options.run)
    name = Path(options.config).stem
    cfg.work_dir = options.run.output or f"runs/{name}"
    return cfg


def read_config(task: str, name: str) -> Config:
    """A config by path, or by its name among those that come with the package."""
    folder = CONFIGS / FOLDERS[task]
    stem = Path(name).name.removesuffix(".py")
    path = next((path for path in (Path(name), folder / f"{stem}.py") if path.is_file()), None)
    if path is None:
        known = sorted(path.stem for path in folder.glob("*.py"))
        raise UserError(f"config {name}: no such file; {nearest(stem, known) or 'names: ' + ', '.join(known)}")
    try:
        return Config.fromfile(str(path))
    except (SyntaxError, KeyError, OSError, TypeError) as error:
        raise UserError(f"config {path}: {type(error).__name__}: {first_line(error)}") from error


def set_data(cfg: Config, task: str, data: DenseData) -> None:
    """Point the config's loaders and evaluators to the data, and the heads to its classes."""
    if task == "detect" and data.train:
        set_own_coco(cfg, data)
    elif task == "detect" and data.data:
        set_coco(cfg, Path(data.data))
    elif data.data:
        set_segmentation_folder(cfg, Path(data.data))
    elif data.train:
        raise UserError("--train, --val and --images are COCO files for vicinal detect; segment takes --data FOLDER")


def set_coco(cfg: Config, root: Path) -> None:
    """COCO 2017 as it is distributed."""
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = cfg[loader].dataset
        _require_file(root / dataset.ann_file, "--data")
        dataset.data_root = str(root)
    for evaluator in ("val_evaluator", "test_evaluator"):
        cfg[evaluator].ann_file = str(root / cfg.val_dataloader.dataset.ann_file)


def set_own_coco(cfg: Config, data: DenseData) -> None:
    """COCO files of the user's own, with their own classes."""
    if not Path(data.images).is_dir():
        raise UserError(f"--images {data.images}: no such folder")
    files = {"train_dataloader": data.train, "val_dataloader": data.val, "test_dataloader": data.val}
    names = read_categories(data.train)
    missing = set(read_categories(data.val)) - set(names)
    if missing:
        raise UserError(f"--val {data.val} has categories that --train lacks: {', '.join(sorted(missing))}")
    for loader, file in files.items():
        cfg[loader].dataset.update(
            data_root="",
            ann_file=str(Path(file).resolve()),
            data_prefix={"img": str(Path(data.images).resolve())},
            metainfo={"classes": names},
        )
    for evaluator in ("val_evaluator", "test_evaluator"):
        cfg[evaluator].ann_file = str(Path(data.val).resolve())
    set_num_classes(cfg.model, len(names))


def read_categories(path: str) -> tuple[str, ...]:
    """Names of the categories of a COCO file, in its order."""
    _require_file(Path(path), "COCO file")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return tuple(category["name"] for category in content["categories"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a COCO file with categories: {first_line(error)}") from error


def set_segmentation_folder(cfg: Config, root: Path) -> None:
    """Images and label maps in ADE20K's folders; classes.txt names the labels 0, 1... of other data."""
    listing = root / "classes.txt"
    names = tuple(listing.read_text(encoding="utf-8").split("\n")) if listing.is_file() else ()
    names = tuple(name.strip() for name in names if name.strip())
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = cfg[loader].dataset
        dataset.data_root = str(root)
        images = root / dataset.data_prefix.img_path
        first = next((path for path in sorted(images.glob("*")) if path.is_file()), None)
        if first is None:
            raise UserError(f"--data {root}: no images in {images}; expected ADE20K's folders")
        dataset.img_suffix = first.suffix
        if names:
            dataset.update(type="BaseSegDataset", metainfo={"classes": names}, reduce_zero_label=False)
            for step in dataset.pipeline:
                if step.type == "LoadAnnotations":
                    step.reduce_zero_label = False
    if names:
        set_num_classes(cfg.model, len(names))


def set_num_classes(model: ConfigDict, count: int) -> None:
    """Give every head of a model another number of classes; losses then weigh the classes alike."""
    for head in [node for node in walk(model) if node.get("num_classes", count) != count]:
        for node in walk(head):
            if isinstance(node.get("class_weight"), list):
                # Mask2Former has one more weight, the last, for no object
                node.class_weight = [1.0] * count + node.class_weight[head.num_classes :]
        head.num_classes = count


def set_model(cfg: Config, options: DenseModel) -> None:
    """Change the backbone's model, options and weights."""
    backbone = cfg.model.backbone
    if options.backbone:
        set_backbone(cfg, options.backbone, **options.backbone_kwargs)
    else:
        backbone.update(options.backbone_kwargs)
    weights = options.backbone_weights
    if weights is not None:
        backbone.pretrained = {"none": False, "released": True}.get(weights, weights)


def set_backbone(cfg: Config, name: str, **options: Any) -> None:
    """Put another model into a config: its channels into neck and heads, its pixel statistics into the preprocessor.

    Raises:
        UserError: unknown model, or one whose strides the config's neck is not made for.
    """
    old = cfg.model.backbone
    before = describe_backbone(old)
    options = {key: value for key, value in old.items() if key not in ("model", *_model_options(old))} | options
    options["model"] = name
    after = describe_backbone(options)
    if before["reductions"] != after["reductions"]:
        raise UserError(
            f"--backbone {name} has maps of strides {after['reductions']}, and the config's neck is for "
            f"{before['reductions']}; start from a config of the same family, or choose stages by "
            "--backbone-kwargs out_indices"
        )
    cfg.model.backbone = ConfigDict(options)
    set_channels(cfg.model, after["channels"])
    statistics = get_pretrained_cfg(name)
    cfg.model.data_preprocessor.update(
        mean=[255 * value for value in statistics.mean], std=[255 * value for value in statistics.std]
    )


def _model_options(backbone: dict) -> list[str]:
    """Options for the model itself, which another model may not have; drop_path_rate every one has."""
    adapter = {*inspect.signature(VicinalBackbone.__init__).parameters, "type", "drop_path_rate"}
    return [key for key in backbone if key not in adapter]


def describe_backbone(backbone: dict) -> dict[str, list[int]]:
    """Channels and reductions of a backbone's maps, without making its weights."""
    name = backbone["model"]
    if not is_model(name):
        hint = nearest(name, timm.list_models())
        raise UserError(f"--backbone {name}: no such model; {hint or 'vicinal models lists ours'}")
    options = {key: value for key, value in backbone.items() if key not in ("type", "pretrained")}
    try:
        with torch.device("meta"):
            built = VicinalBackbone(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"--backbone {name} ({model_entrypoint(name).__module__}): {first_line(error)}") from error
    return {"channels": built.channels, "reductions": built.reductions}


def set_channels(model: ConfigDict, channels: list[int]) -> None:
    """Write the backbone's channels where the config states them."""
    neck = model.get("neck")
    if isinstance(neck, list):
        raise UserError("--backbone: the config's neck is a list; copy the config and set its channels")
    if neck is not None:
        neck.in_channels = channels
        return
    for head in (model.decode_head, model.get("auxiliary_head")):
        if head is not None:
            index = head.get("in_index")
            head.in_channels = channels[index] if isinstance(index, int) else channels


def set_run(cfg: Config, run: DenseRun) -> None:
    """Length, batch, precision, seed and the rest of the run."""
    set_length(cfg, run)
    loader = cfg.train_dataloader
    if run.batch_size is not None:
        loader.batch_size = run.batch_size
    if run.workers is not None:
        for each in (loader, cfg.val_dataloader, cfg.test_dataloader):
            each.update(num_workers=run.workers, persistent_workers=run.workers > 0)
    if run.lr is not None:
        cfg.optim_wrapper.optimizer.lr = run.lr
    if run.precision is not None:
        set_precision(cfg, run.precision)
    if run.sync_bn:
        cfg.model.backbone.sync_bn = True
    cfg.randomness = {"seed": run.seed}
    cfg.merge_from_dict(run.set)


def set_precision(cfg: Config, precision: str) -> None:
    """Autocast in a dtype, or none."""
    wrapper = cfg.optim_wrapper
    for key in ("type", "dtype", "loss_scale"):
        wrapper.pop(key, None)
    wrapper.update(
        {"type": "OptimWrapper"} if precision == "float32" else {"type": "AutocastOptimWrapper", "dtype": precision}
    )


def set_length(cfg: Config, run: DenseRun) -> None:
    """Another number of iterations or epochs; what schedules count in the same unit is scaled."""
    by_epoch = "max_epochs" in cfg.train_cfg
    key, flag, other = ("max_epochs", "epochs", "iterations") if by_epoch else ("max_iters", "iterations", "epochs")
    if getattr(run, other) is not None:
        raise UserError(f"--{other}: the config counts {flag}; use --{flag}")
    length = getattr(run, flag)
    if length is None:
        return
    factor = length / cfg.train_cfg[key]
    cfg.train_cfg[key] = length
    cfg.train_cfg.val_interval = max(1, min(length, round(cfg.train_cfg.get("val_interval", 1) * factor)))
    checkpoint = cfg.default_hooks.checkpoint
    checkpoint.interval = max(1, min(length, checkpoint.interval))
    for scheduler in cfg.param_scheduler:
        if scheduler.get("by_epoch", True) == by_epoch:
            _scale_schedule(scheduler, lambda value: max(1, round(value * factor)) if value else value)


def _scale_schedule(scheduler: ConfigDict, scale: Callable[[int], int]) -> None:
    for counter in SCHEDULE_COUNTERS:
        if counter in scheduler:
            scheduler[counter] = scale(scheduler[counter])
    if "end" in scheduler:
        # MMEngine refuses a phase of no length
        scheduler.end = max(scheduler.end, scheduler.get("begin", 0) + 1)
    if "milestones" in scheduler:
        scheduler.milestones = [scale(milestone) for milestone in scheduler.milestones]


def walk(node: Any) -> Iterator[ConfigDict]:
    """Every mapping inside a config, itself first."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(child)


def _require_file(path: Path, flag: str) -> None:
    if not path.is_file():
        raise UserError(f"{flag}: no file {path}")
