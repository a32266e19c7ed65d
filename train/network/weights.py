"""Weights on their way into a network: found, read, and held against it, so that nothing is left as it was drawn."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model, is_model_pretrained
from torch import Tensor, nn

from ...checkpoints import load
from ...checkpoints.files import CONFIG_NAME, WEIGHTS_NAME
from ...checkpoints.fit import belongs_to, describe_misfit
from ...errors import UserError, first_line
from ..run.folder import TRAINER_STATE, find_best


def locate_weights(weights: str) -> dict[str, Any]:
    """The entries of timm's pretrained_cfg that load a run, a checkpoint's folder, a file, or a model's release.

    Args:
        weights: what ``--weights`` says.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    path = Path(weights)
    if path.is_dir():
        folder = path if (path / WEIGHTS_NAME).is_file() else find_best(path)[0]
        if folder is None or not (folder / WEIGHTS_NAME).is_file():
            raise UserError(f"--weights {weights}: holds no {WEIGHTS_NAME}; give a run, or one of its checkpoints")
        if (folder / CONFIG_NAME).exists():
            read_model_config(folder, f"--weights {weights}")
        path = folder / WEIGHTS_NAME
    if path.is_file():
        try:
            load(path)
        except ValueError as error:
            raise UserError(f"--weights {weights}: {first_line(error)}") from error
        return {"file": str(path)}
    if is_model(weights) and is_model_pretrained(weights):
        cfg = get_pretrained_cfg(weights)
        return {key: getattr(cfg, key) for key in ("url", "file", "hf_hub_id", "hf_hub_filename")}
    raise UserError(f"--weights {weights}: no file, no folder of a run or a checkpoint, and no model with weights")


def read_model_config(folder: Path, whose: str) -> dict[str, Any]:
    """The ``config.json`` of a saved model.

    Args:
        folder: of the model.
        whose: how a message calls it.

    Raises:
        UserError: it is missing, or does not describe a model.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{whose}: cannot read {path}: {first_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{whose}: {path} describes no model: it has no architecture")
    for key, kind in {"num_classes": int, "pretrained_cfg": dict, "model_args": dict}.items():
        if not isinstance(config.get(key, kind()), kind):
            raise UserError(f"{whose}: {path}: {key} is {config[key]!r}, expected {kind.__name__}")
    return config


def check_model_folder(folder: Path, whose: str) -> None:
    """Refuse a folder that timm would build a model from in part, or with other weights than the model's.

    Raises:
        UserError: see above.
    """
    read_model_config(folder, whose)
    # Here timm would take any other file of weights, such as those under training where there is an average.
    if (folder / TRAINER_STATE).is_file() and not (folder / WEIGHTS_NAME).is_file():
        raise UserError(f"{whose}: {folder} holds no {WEIGHTS_NAME}")


@contextmanager
def strict_loading(whose: str, complete: bool = False) -> Iterator[None]:
    """Have ``timm.create_model`` load all of the weights that it is given, into all of the network.

    timm drops the classifier where the number of classes differs, and with it every check: a file that shares no
    name with the network leaves it as it was drawn. Its loader takes no other rule, so the module's own is replaced
    while it works. Inside, ``num_classes`` of the pretrained_cfg must be the network's, lest timm drop something.

    Args:
        whose: how a message calls the weights, such as ``--weights runs/a``.
        complete: whether the classifier must fit too; else one that is missing, or has another number of classes,
            stays as it was drawn, and the network's ``weights_note`` says so.

    Raises:
        UserError: a tensor is missing, left over, or of another shape.
    """
    original = nn.Module.load_state_dict

    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        return original(module, _fit(module, state_dict, whose, complete), strict=True, assign=assign)

    nn.Module.load_state_dict = load_state_dict
    try:
        yield
    finally:
        nn.Module.load_state_dict = original


def _fit(module: nn.Module, given: Mapping[str, Any], whose: str, complete: bool) -> dict[str, Tensor]:
    cfg, expected = getattr(module, "pretrained_cfg", {}), module.state_dict()
    name = cfg.get("architecture", type(module).__name__)
    classifiers = cfg.get("classifier") or ()
    fresh: dict[str, Tensor] = {}
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        own = {key: value for key, value in expected.items() if belongs_to(key, classifier)}
        if not complete and (reason := _reason_for_new_classifier(own, given)):
            fresh.update(own)
            module.weights_note = f"{whose}: {reason}: the classifier is a new one"
    fitted = {**given, **fresh}
    problems = describe_misfit(fitted, expected)
    if problems:
        raise UserError(f"{whose}: not the weights of this {name}: {problems}")
    return fitted


def _reason_for_new_classifier(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> str | None:
    theirs = {key: given[key] for key in own if isinstance(given.get(key), Tensor)}
    if own and not theirs:
        return "they have no classifier"
    if theirs.keys() != own.keys() or any(theirs[key].shape[1:] != own[key].shape[1:] for key in own):
        return None
    counts = {(len(theirs[key]), len(own[key])) for key in own}
    if len(counts) == 1 and (count := counts.pop())[0] != count[1]:
        return f"{count[0]} classes, and {count[1]} in the data"
    return None


def describe_classes(given: Sequence[str], expected: Sequence[str]) -> str:
    """How two lists of class names differ: the number, or the first place."""
    if len(given) != len(expected):
        return f"{len(given)} classes, not {len(expected)}"
    place = next(place for place, names in enumerate(zip(given, expected, strict=True)) if names[0] != names[1])
    return f"class {place} is {given[place]!r}, not {expected[place]!r}"
