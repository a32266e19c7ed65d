"""A warm-up that fits into the run, once the number of images is known."""

import math

from mmengine.config import Config, ConfigDict

from ...errors import UserError

SHARE = 0.1
"""Largest share of a run that a warm-up takes which nobody asked for."""


def count_iterations(cfg: Config, images: int | None, processes: int) -> int | None:
    """Iterations of the whole run; None where it counts epochs of data that is not known."""
    if "max_iters" in cfg.train_cfg:
        return cfg.train_cfg.max_iters
    if not images:
        return None
    per_epoch = math.ceil(math.ceil(images / processes) / cfg.train_dataloader.get("batch_size", 1))
    return cfg.train_cfg.max_epochs * per_epoch


def fit_warmup(cfg: Config, iterations: int | None, entries: dict) -> list[str]:
    """Shorten a warm-up in iterations to a tenth of the run where it is longer; returns what is to be said.

    Args:
        iterations: of the run, if known.
        entries: of ``--set``; a warm-up that is named there stays as it is.

    Raises:
        UserError: a warm-up that was asked for, and is as long as the run.
    """
    notes = []
    if iterations is None:
        return notes
    allowed = max(1, int(SHARE * iterations))
    for place, scheduler in enumerate(cfg.get("param_scheduler") or []):
        length = scheduler.get("end")
        if not _is_warmup(scheduler) or length is None or length <= allowed:
            continue
        if f"param_scheduler.{place}.end" in entries or "param_scheduler" in entries:
            if length >= iterations:
                raise UserError(
                    f"--set param_scheduler.{place}.end={length}: a warm-up of {length} iterations in a run of "
                    f"{iterations}; lower it, or train longer"
                )
            continue
        scheduler.end = allowed
        for other in cfg.param_scheduler:
            if not other.get("by_epoch", True) and other.get("begin") == length:
                other.begin = allowed
        notes.append(
            f"warm-up of {allowed} iterations in place of {length}: the run has {iterations} "
            f"(--set param_scheduler.{place}.end=N gives another)"
        )
    return notes


def _is_warmup(scheduler: ConfigDict) -> bool:
    by_iteration = not scheduler.get("by_epoch", True)
    return by_iteration and scheduler.get("begin", 0) == 0 and scheduler.type in ("LinearLR", "ConstantLR")
