"""Where a run goes on from: the checkpoint is found, and compared with what is asked for now."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ...errors import UserError, first_line
from ...zoo.mmlab.weights import read_checkpoint
from .check import COCO_DATASETS, SEGMENTATION_DATASETS, dataset_classes, find_datasets
from .record import read_assignments

DECISIVE = ("model", "optim_wrapper")
"""Entries of a config that a checkpoint's state belongs to: another value would be ignored, or would not fit."""
INDIFFERENT = ("pretrained", "init_cfg", "sync_bn", "threshold")
SHOWN = 4


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        UserError: a folder that is not empty without ``--resume``, or a checkpoint that is not there.
    """
    if resume is None:
        # a run that never began leaves MMEngine's folder of logs behind, named by the time
        if folder.exists() and any(not re.fullmatch(r"\d{8}_\d{6}", path.name) for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty: --resume auto goes on from it, or give another --output")
        return None
    place = folder if resume == "auto" else Path(resume)
    if not place.is_dir():
        return None if resume == "auto" else place
    latest = latest_checkpoint(place)
    if latest is None and resume != "auto":
        raise UserError(f"--resume {resume}: no checkpoint in that folder")
    return latest


def latest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run's folder, which may have been moved since."""
    note = folder / "last_checkpoint"
    named = folder / Path(note.read_text(encoding="utf-8").strip()).name if note.is_file() else None
    if named is not None and named.is_file():
        return named
    numbered = {
        int(match[1]): path for path in folder.glob("*.pth") if (match := re.fullmatch(r"\w+_(\d+)", path.stem))
    }
    return numbered[max(numbered)] if numbered else None


def read_resumable(path: Path) -> dict[str, Any]:
    """A checkpoint with all that a run needs to go on.

    Raises:
        UserError: a file that cannot be read safely, or holds weights only.
    """
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        raise UserError(first_line(error)) from error
    meta = checkpoint.get("meta")
    needed = ("optimizer", "param_schedulers", "message_hub")
    missing = [key for key in needed if key not in checkpoint]
    missing += [key for key in ("epoch", "iter") if not isinstance(meta, dict) or key not in meta]
    if missing:
        raise UserError(
            f"--resume {path}: it has no {', '.join(missing)}, so that no run can go on from it; "
            f"--set load_from={path} starts a new run with its weights"
        )
    return checkpoint


def compare_with_checkpoint(cfg: Config, checkpoint: dict[str, Any], path: Path) -> list[str]:
    """Compare a config with the one that a checkpoint was made by; returns what is to be said.

    The classes take the checkpoint's order, which its head has.

    Raises:
        UserError: other classes, another model or another optimizer.
    """
    meta = checkpoint["meta"]
    notes = _match_classes(cfg, (meta.get("dataset_meta") or {}).get("classes"), path)
    try:
        old = read_assignments(str(meta.get("cfg") or ""))
    except (ValueError, SyntaxError):
        old = {}
    new = cfg.to_dict()
    wrong = [line for key in DECISIVE if key in old for line in _differences(_plain(old[key]), _plain(new[key]), key)]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"--resume {path}: {'; '.join(wrong[:SHOWN])}{more}; a run goes on as it was started, and --set "
            f"load_from={path} starts a new one with the weights"
        )
    seed, asked = meta.get("seed"), (new.get("randomness") or {}).get("seed")
    if seed is not None and asked is not None and seed != asked:
        notes.append(f"seed {asked} from here on; {path} was made with {seed}")
    for key in ("param_scheduler", "train_cfg"):
        changed = list(_differences(_plain(old.get(key)), _plain(new.get(key)), key)) if key in old else []
        if changed:
            notes.append(f"{'; '.join(changed[:SHOWN])}: learning rates go on by the schedule of {path}")
            break
    return notes


def _match_classes(cfg: Config, classes: Any, path: Path) -> list[str]:
    notes: list[str] = []
    if not classes:
        return notes
    classes = tuple(classes)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for dataset in find_datasets(cfg[loader].dataset, (*COCO_DATASETS, *SEGMENTATION_DATASETS)):
            own = dataset_classes(dataset)
            if own == classes:
                continue
            if set(own) != set(classes) or dataset.type.rpartition(".")[2] in SEGMENTATION_DATASETS:
                raise UserError(
                    f"--resume {path}: it was trained on the classes {', '.join(classes)}; "
                    f"the data has {', '.join(own)}"
                )
            dataset.metainfo = {**dataset.metainfo, "classes": classes}
            notes = [f"classes in the order of {path}: {', '.join(classes)}"]
    return notes


def _plain(node: Any) -> Any:
    """Without what does not matter here: kinds of sequences, what depends on the device, where the weights start."""
    if isinstance(node, dict):
        return {
            key: _plain(value)
            for key, value in node.items()
            if key not in ("pretrained", "init_cfg", "sync_bn", "threshold")
        }
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    return "BN" if node == "SyncBN" else node


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(key for key in new if key not in old)):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{path}.{place}")
    elif old != new:
        yield f"{path} is {_short(old)} there and {_short(new)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
