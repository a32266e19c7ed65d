"""From a released layout to ours: rename by the family's key map, then hold the result against the model."""

from collections.abc import Collection, Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .files import unwrap
from .keys import Layout

_PACKAGE = __package__.rpartition(".")[0]


def rename_keys(layouts: Sequence[Layout], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of one of these layouts; one of none of them, such as ours, comes back unchanged.

    Args:
        layouts: foreign layouts of a family, its ``LAYOUTS`` in :mod:`vicinal.checkpoints.keys`.
        state_dict: tensors by name, in any order, with or without a classifier.
    """
    layout = find_layout(layouts, state_dict)
    return dict(state_dict) if layout is None else layout.rename(state_dict)


def find_layout(layouts: Sequence[Layout], keys: Collection[str]) -> Layout | None:
    """The first of the layouts that has these keys, or None."""
    return next((layout for layout in layouts if layout.matches(keys)), None)


def convert(name: str, state_dict: Mapping[str, object], **model_args: object) -> dict[str, Tensor]:
    """Turn an official state dict, or timm's where timm has the family, into ours, strictly.

    Args:
        name: registered model name; ``import vicinal.zoo`` registers them.
        state_dict: the official state dict, or the training checkpoint around it.
        **model_args: options the model is built with, as for ``timm.create_model``; the class count is read from
            the classifier unless given.

    Returns:
        A state dict that ``load_state_dict(strict=True)`` of the named model takes.

    Raises:
        ValueError: unknown name; or one report of every key that is missing, left over, or of another shape.
    """
    model = _build_on_meta(name, model_args)
    renamed = rename_keys(model.layouts, unwrap(state_dict))
    classifier = renamed.get(f"{model.pretrained_cfg['classifier']}.weight")
    if classifier is not None and "num_classes" not in model_args:
        model = _build_on_meta(name, {"num_classes": len(classifier), **model_args})
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    renamed = {key: _unflatten(value, expected.get(key, ())) for key, value in renamed.items()}
    # files of old or of exported networks lack these counters, with which no batch norm of the families computes
    renamed |= {key: torch.zeros((), dtype=torch.int64) for key in expected if _is_counter(key) and key not in renamed}
    problems = _compare({key: tuple(value.shape) for key, value in renamed.items()}, expected)
    if problems:
        raise ValueError(f"{name}: the state dict does not fit:\n" + "\n".join(problems))
    return renamed


def unflatten_tokens(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, tokens, dim) of a file that does not hold their grid, as (1, height, width, dim).

    As many tokens as a square has are those of a square, as of every released file; others are those of the network's
    ``grid``, if it has as many. What may be either, or neither, comes back as it is.
    """
    if embedding.ndim != 3:
        return embedding
    tokens = embedding.shape[1]
    side, fits = isqrt(tokens), grid[0] * grid[1] == tokens
    if side * side == tokens and (not fits or grid[0] == grid[1]):
        return embedding.unflatten(1, (side, side))
    return embedding.unflatten(1, grid) if fits and side * side != tokens else embedding


def _unflatten(value: Tensor, expected: tuple[int, ...]) -> Tensor:
    return unflatten_tokens(value, expected[1:3]) if value.ndim == 3 and len(expected) == 4 else value


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _build_on_meta(name: str, model_args: Mapping[str, Any]) -> Any:
    """The named model of ours, a Backbone of the zoo, without memory for its weights."""
    from timm import create_model
    from timm.models import is_model

    if not is_model(name):
        raise ValueError(f"unknown model {name!r}: import {_PACKAGE}.zoo first, then see timm.list_models()")
    model = create_model(name, device="meta", **model_args)
    if not hasattr(model, "layouts"):
        ours = f"is {name}_vicinal" if is_model(f"{name}_vicinal") else "has another name"
        raise ValueError(f"{name!r} is timm's own model; ours {ours}")
    return model


def _compare(given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    missing = [f"  missing: {key} {shape}" for key, shape in expected.items() if key not in given]
    left_over = [f"  left over: {key} {shape}" for key, shape in given.items() if key not in expected]
    reshaped = [
        f"  shape: {key} is {shape}, expected {expected[key]}"
        for key, shape in given.items()
        if key in expected and shape != expected[key]
    ]
    return missing + left_over + reshaped
