"""The network that a configuration names; names, options and weights are refused here, each in one line."""

import inspect
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, is_model, is_model_pretrained, model_entrypoint, parse_model_name
from torch import nn

from ... import zoo  # noqa: F401  registers our models with timm
from ...errors import UserError, find_shortage, first_line, nearest
from ..config import ModelConfig
from .probe import attach_attentive_head, freeze
from .weights import check_model_folder, locate_weights, strict_loading


def build_model(config: ModelConfig, img_size: int | None, num_classes: int) -> nn.Module:
    """Create the network, with the head and what is frozen under ``probe``.

    Raises:
        UserError: unknown name, unknown option, an option's value that the model refuses, or weights that are missing
            or another model's.
    """
    model = create_model(config, img_size, num_classes, f"--model {config.name}")
    if config.probe == "attentive":
        note = getattr(model, "weights_note", None)
        model = attach_attentive_head(model, num_classes, config.probe_queries)
        model.weights_note = note
    if config.probe is not None:
        freeze(model)
    return model


def create_model(
    config: ModelConfig, img_size: int | None, num_classes: int, flag: str, complete: bool = False
) -> nn.Module:
    """Create the network that a configuration names, with its weights where it asks for some.

    Args:
        flag: how a message calls the model, such as ``--model nat_pico``.
        complete: whether the weights must bring the classifier too.
    """
    try:
        source, name = parse_model_name(config.name)
    except ValueError as error:
        raise UserError(f"{flag}: {first_line(error)}") from error
    if not source:
        _check_model_name(name, config.pretrained, flag)
    options: dict[str, Any] = {"drop_path_rate": config.drop_path_rate, **config.model_kwargs}
    if img_size is not None and not source and get_pretrained_cfg(name).fixed_input_size:
        options.setdefault("img_size", img_size)
    is_loaded = config.pretrained or config.weights is not None
    if is_loaded:
        located = {} if config.weights is None else locate_weights(config.weights)
        options["pretrained_cfg_overlay"] = {**located, "num_classes": num_classes}
    if source == "local-dir":
        check_model_folder(Path(name), flag)
    whose = flag if config.weights is None else f"--weights {config.weights}"
    try:
        with strict_loading(whose, complete) if is_loaded else nullcontext():
            model = timm.create_model(config.name, pretrained=is_loaded, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"{flag}: {_explain_option(error, name)}") from error
    except Exception as error:  # timm raises whatever its readers and the networks do
        if isinstance(error, UserError) or find_shortage(error):
            raise
        raise UserError(f"{whose if is_loaded else flag}: {first_line(error)}") from error
    if source and not is_loaded:
        model.weights_note = f"{flag}: starts from fresh weights; --pretrained takes those that lie there"
    return model


def _check_model_name(name: str, pretrained: bool, flag: str) -> None:
    if not is_model(name):
        hint = nearest(name.partition(".")[0], timm.list_models()) or "timm.list_models() lists them"
        raise UserError(f"{flag}: no such model; {hint}")
    # timm only warns here, and would train from scratch.
    if pretrained and not is_model_pretrained(name):
        raise UserError(f"{flag}: no released weights are known; leave out --pretrained")


def _explain_option(error: TypeError, name: str) -> str:
    """Name the unknown option and the nearest one that the model's class takes."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found:
        return first_line(error)
    class_name, option = found.groups()
    owner = getattr(sys.modules[model_entrypoint(name).__module__], class_name, None) if is_model(name) else None
    allowed = list(inspect.signature(owner).parameters) if owner else []
    hint = nearest(option, allowed) or f"options: {', '.join(allowed) or 'see the model'}"
    return f"unknown option {option!r} in --model-kwargs; {hint}"
