"""Configs: found by name, and changed by the command's options."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config, ConfigDict
from timm.models import get_pretrained_cfg, is_model, model_entrypoint

from ...errors import UserError, first_line, nearest
from ...zoo.mmlab.backbone import VicinalBackbone
from .coco import read_categories
from .entries import set_entries
from .labels import pair_files, read_class_names
from .options import DenseData, DenseModel, DenseRun, DenseTrain

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = {"detect": "detection", "segment": "segmentation"}
SCHEDULE_COUNTERS = ("begin", "end", "T_max")
LENGTHS = {"iterations": "max_iters", "epochs": "max_epochs"}
TRAINING, MEASURING = ("train_dataloader",), ("val_dataloader", "test_dataloader")
NEEDED = ("model", *TRAINING, *MEASURING, "val_evaluator", "test_evaluator", "train_cfg", "optim_wrapper")


def prepare(task: str, options: DenseTrain) -> Config:
    """The complete config of a run.

    Raises:
        UserError: a config, file or model that does not exist, or an option that the config has no place for.
    """
    cfg = read_config(task, options.config)
    set_data(cfg, task, options.data, TRAINING + MEASURING)
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
        cfg = Config.fromfile(str(path))
    # A config is a program, and may fail in every way that one can.
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {first_line(error)}") from error
    missing = [key for key in NEEDED if cfg.get(key) is None]
    if missing:
        raise UserError(f"config {path}: it has no {', '.join(missing)}, which a config of {FOLDERS[task]} needs")
    return cfg


def set_data(
    cfg: Config, task: str, data: DenseData, loaders: Sequence[str], classes: Sequence[str] | None = None
) -> None:
    """Point the config's loaders and evaluators to the data, and the heads to its classes.

    Args:
        loaders: those of the config that are wanted.
        classes: of a model that is trained already; not given: the data's.
    """
    if task == "detect" and data.val:
        set_own_coco(cfg, data, loaders, classes)
    elif task == "detect" and data.data:
        set_coco(cfg, Path(data.data), loaders)
    elif data.data:
        set_segmentation_folder(cfg, Path(data.data), loaders, classes)
    elif data.val:
        raise UserError("--train, --val and --images are COCO files for vicinal detect; segment takes --data FOLDER")


def set_coco(cfg: Config, root: Path, loaders: Sequence[str]) -> None:
    """COCO 2017 as it is distributed."""
    for loader in loaders:
        dataset = cfg[loader].dataset
        if Path(dataset.ann_file).is_absolute():
            raise UserError(
                f"--data {root} is for COCO's own layout, and the run has COCO files of its own, such as "
                f"{dataset.ann_file}: give others by --val and --images"
            )
        _require_file(root / dataset.ann_file, "--data")
        dataset.data_root = str(root)
    for evaluator in ("val_evaluator", "test_evaluator"):
        cfg[evaluator].ann_file = str(root / cfg.val_dataloader.dataset.ann_file)


def set_own_coco(cfg: Config, data: DenseData, loaders: Sequence[str], classes: Sequence[str] | None) -> None:
    """COCO files of the user's own, with their own classes."""
    if not Path(data.images).is_dir():
        raise UserError(f"--images {data.images}: no such folder")
    if classes is None and data.train is None:
        raise UserError("--val needs --train beside it here: its categories are the classes, in its order")
    names = read_categories(data.train) if classes is None else tuple(classes)
    for flag, file in (("--train", data.train), ("--val", data.val)):
        surplus = sorted(set(read_categories(file)) - set(names)) if file else []
        if surplus:
            owner = "--train lacks" if classes is None else f"the model was not trained on ({', '.join(names)})"
            raise UserError(f"{flag} {file} has categories that {owner}: {', '.join(surplus)}")
    for loader in loaders:
        file = data.train if loader in TRAINING else data.val
        cfg[loader].dataset.update(
            data_root="",
            ann_file=str(Path(file).resolve()),
            data_prefix={"img": str(Path(data.images).resolve())},
            metainfo={"classes": names},
        )
    for evaluator in ("val_evaluator", "test_evaluator"):
        cfg[evaluator].ann_file = str(Path(data.val).resolve())
    set_num_classes(cfg.model, len(names))


def set_segmentation_folder(cfg: Config, root: Path, loaders: Sequence[str], classes: Sequence[str] | None) -> None:
    """Images and label maps in ADE20K's folders; classes.txt names the labels 0, 1... of other data."""
    listing = root / "classes.txt"
    names = read_class_names(listing) if listing.is_file() else ()
    if names and classes is not None and tuple(classes) != names:
        raise UserError(
            f"{listing} names {', '.join(names)}, and the model was trained on {', '.join(classes)}: a label must mean "
            "the same class in both"
        )
    for loader in loaders:
        dataset = cfg[loader].dataset
        dataset.data_root = str(root)
        prefix = dataset.data_prefix
        image, labels = pair_files(root / prefix.img_path, root / prefix.seg_map_path, f"--data {root}: ").pairs[0]
        dataset.update(img_suffix=image.suffix, seg_map_suffix=labels.suffix)
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
    if options.backbone:
        set_backbone(cfg, options.backbone, **options.backbone_kwargs)
    elif options.backbone_kwargs:
        before = describe_backbone(cfg.model.backbone)
        cfg.model.backbone.update(options.backbone_kwargs)
        after = describe_backbone(cfg.model.backbone, "--backbone-kwargs")
        if before["channels"] != after["channels"]:
            set_channels(cfg.model, after["channels"])
    weights = options.backbone_weights
    if weights is not None:
        cfg.model.backbone.pretrained = {"none": False, "released": True}.get(weights, weights)


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


def describe_backbone(backbone: dict, flag: str = "--backbone") -> dict[str, list[int]]:
    """Channels and reductions of a backbone's maps, without making its weights."""
    name = backbone.get("model")
    if not isinstance(name, str) or not is_model(name):
        hint = nearest(str(name), timm.list_models())
        raise UserError(f"{flag} {name}: no such model; {hint or 'vicinal models lists ours'}")
    options = {key: value for key, value in backbone.items() if key not in ("type", "pretrained")}
    try:
        with torch.device("meta"):
            built = VicinalBackbone(**options)
    # An option of a wrong kind may fail anywhere in the model.
    except Exception as error:
        raise UserError(f"{flag} {name} ({model_entrypoint(name).__module__}): {first_line(error)}") from error
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
    run = _length_from_entries(run)
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
    set_entries(cfg, run.set)


def _length_from_entries(run: DenseRun) -> DenseRun:
    """``--set train_cfg.max_iters=N`` is ``--iterations N``: schedules are scaled to it too."""
    for flag, key in LENGTHS.items():
        value = run.set.get(f"train_cfg.{key}")
        if value is None:
            continue
        if not isinstance(value, int) or getattr(run, flag) not in (None, value):
            raise UserError(f"--set train_cfg.{key}={value}: use --{flag} alone, with a whole number")
        rest = {name: entry for name, entry in run.set.items() if name != f"train_cfg.{key}"}
        run = dataclasses.replace(run, set=rest, **{flag: value})
    return run


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
    flag, other = ("epochs", "iterations") if by_epoch else ("iterations", "epochs")
    key = LENGTHS[flag]
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
