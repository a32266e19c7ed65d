"""What a checkpoint was written under, and what of it may be different when its run goes on."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...command import flag_of
from ...errors import UserError
from ..config import SECTIONS, TrainConfig
from ..data.decode import UnreadableImage
from ..data.images import Images
from ..data.streams import StreamImages
from ..network.weights import describe_classes
from ..recipe import as_plain

# Where and how the run computes, and what it leaves behind: they decide no result.
FREE = {
    "data": ("data_dir", "download", "workers", "max_unreadable"),
    "run": (
        *("output", "resume", "device", "threads", "channels_last", "compile", "grad_checkpointing", "deterministic"),
        *("parallel", "save_interval", "save_epochs", "keep", "sharded_checkpoints", "log_interval", "tensorboard"),
        *("wandb", "profile", "report"),
    ),
}
# What the run reads anew before each update: it holds from the checkpoint on.
EFFECTIVE = {
    "model": ("drop_path_rate", "teacher_weight"),
    "data": ("batch_size",),
    "augmentation": (
        *("crop", "scale", "shift", "hflip", "color_jitter", "auto_augment", "random_erasing", "erasing_mode"),
        *("mixup", "cutmix", "mixup_prob", "mixup_switch_prob"),
    ),
    "optimizer": (
        *("lr", "lr_base_size", "weight_decay", "optimizer_kwargs", "loss", "bce_threshold", "label_smoothing"),
        *("clip_grad", "clip_mode", "accumulation", "max_skips"),
    ),
    "schedule": ("epochs", "schedule", "warmup_epochs", "warmup_lr", "cooldown_epochs", "min_lr", "scale_all"),
    "run": ("precision", "sync_bn", "ema_decay", "ema_warmup"),
}
# What the checkpoint is made of: with another value it would be another run's.
FIXED = {
    "model": ("name", "pretrained", "weights", "probe", "probe_queries", "teacher", "model_kwargs"),
    "data": (
        *("img_size", "val_fraction", "split_seed", "mean", "std", "interpolation", "crop_pct", "num_classes"),
        *("stream_lanes", "shuffle_buffer"),
    ),
    "augmentation": ("repeats",),
    "optimizer": ("optimizer", "layer_decay"),
    "run": ("seed",),
}
# The name of the data is none of them: what counts is which images lie there.


def describe_settings(config: TrainConfig, train: Images, val: Images) -> dict[str, Any]:
    """The configuration of a run and what its data holds, as plain values."""
    return {
        "config": as_plain(dataclasses.asdict(config)),
        "classes": [str(name) for name in train.classes],
        "training images": _describe_images(train),
        "val images": _describe_images(val),
    }


def _describe_images(images: Images) -> dict[str, Any]:
    """Number, a digest of the labels, and one of the pixels of three images, which tells data sets apart."""
    count = len(images.targets)
    labels = None
    if not isinstance(images, StreamImages):  # whose labels lie among the images, and would all have to be read
        labels = hashlib.sha256(np.asarray(images.targets, dtype="<i8").tobytes()).hexdigest()
    pixels = hashlib.sha256()
    for index in sorted({0, count // 2, count - 1}) if count else ():
        try:
            image = images.load(index)
            pixels.update(repr(image.size).encode() + image.tobytes())
        except UnreadableImage:
            pixels.update(b"unreadable")
    return {"count": count, "labels": labels, "pixels": pixels.hexdigest()}


def hold_against(saved: Mapping[str, Any], own: Mapping[str, Any], where: str) -> list[str]:
    """Compare the settings of a checkpoint with those of the run that goes on from it.

    Args:
        saved, own: what :func:`describe_settings` returns.
        where: how messages call the checkpoint.

    Returns:
        What to say: the options that are different from here on.

    Raises:
        UserError: a difference would make it another run.
    """
    try:
        refused = [*_compare_fixed(saved, own), *_compare_data(saved, own)]
        changed = describe_changes(saved["config"], own["config"], EFFECTIVE)
        was, now = saved["config"]["data"]["name"], own["config"]["data"]["name"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: its settings are not those of a run: {type(error).__name__}: {error}") from error
    if refused:
        raise UserError(
            f"{where}: does not fit this model, data and settings: {'; '.join(refused)}; give what it was started "
            "with, or start a new run from its weights: --weights"
        )
    moved = [f"--data {now} (was {was}; the same images)"] if was != now else []
    return [f"from here on: {', '.join([*moved, *changed])}"] if moved or changed else []


def _compare_fixed(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    refused = describe_changes(saved["config"], own["config"], FIXED)
    was, now = (each["config"]["optimizer"] for each in (saved, own))
    # Without weight decay, all weights are in one group.
    if (was["weight_decay"] == 0) != (now["weight_decay"] == 0):
        refused.append(f"--weight-decay {now['weight_decay']} (was {was['weight_decay']}) groups the weights otherwise")
    for key in changed_options(saved, own):
        if any(isinstance(each["optimizer_kwargs"].get(key), (bool, str)) for each in (was, now)):
            refused.append(f"--optimizer-kwargs {key} changes what the optimizer keeps")
    return refused


def changed_options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The names of the optimizer's further options that are different now."""
    was, now = (each["config"]["optimizer"]["optimizer_kwargs"] for each in (saved, own))
    return [key for key in {**was, **now} if was.get(key) != now.get(key)]


def _compare_data(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    if saved["classes"] != own["classes"]:
        return [f"--data has {describe_classes(own['classes'], saved['classes'])}"]
    was, now = (each["config"]["data"]["name"] for each in (saved, own))
    for part in ("training images", "val images"):
        if saved[part]["count"] != own[part]["count"]:
            return [f"--data has {own[part]['count']} {part} (was {saved[part]['count']})"]
        if (saved[part]["labels"] is None) != (own[part]["labels"] is None):
            return [f"--data {now} (was {was}): a stream has an order of its own"]
        if saved[part]["labels"] != own[part]["labels"]:
            return [f"--data has {part} of other classes than before, or in another order"]
        if was != now and saved[part]["pixels"] != own[part]["pixels"]:
            return [f"--data {now} has other {part} than {was}"]
    return []


def describe_changes(was: Mapping[str, Any], now: Mapping[str, Any], fields: Mapping[str, Sequence[str]]) -> list[str]:
    """``--flag VALUE (was VALUE)`` for the fields, by section, in which two configurations differ."""
    return [
        f"{flag_of(SECTIONS[section], name)} {now[section][name]} (was {was[section][name]})"
        for section, names in fields.items()
        for name in names
        if now[section][name] != was[section][name]
    ]
