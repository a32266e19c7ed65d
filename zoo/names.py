"""Names: how a variant is called in timm's registry, which weights it has, and its registration."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, is_model, model_entrypoint, register_model
from torch import nn

from ..checkpoints import RELEASED

_PACKAGE = __package__.partition(".")[0]
# Families that timm has as a whole: a size that timm lacks today may be timm's tomorrow.
_TIMM_FAMILIES = ("davit_", "convit_", "shvit_")


@dataclass(frozen=True)
class Variant:
    """One row of a family's table.

    Attributes:
        model_args: arguments of the network's constructor.
        cfg: entries of timm's pretrained configuration that differ from the family's.
    """

    model_args: Mapping[str, Any]
    cfg: Mapping[str, Any] = field(default_factory=dict)


def registered_name(name: str) -> str:
    """The name that a variant is registered under: its own, with ``_vicinal`` where timm has the name or the family.

    Registering a name of timm's would delete the pretrained weights that timm lists for it.
    """
    taken_by_timm = is_model(name) and not _is_ours(name)
    return f"{name}_vicinal" if taken_by_timm or name.startswith(_TIMM_FAMILIES) else name


def default_cfgs_of(variants: Mapping[str, Variant], **family_cfg: Any) -> dict:
    """timm's ``default_cfgs`` of a family: every variant, with each of its released weights as a tag."""
    return generate_default_cfgs(
        {
            key: _base_cfg(**{**family_cfg, **variant.cfg, **weights})
            for name, variant in variants.items()
            for key, weights in _tagged_weights(registered_name(name))
        }
    )


def register_variants(
    module: str, variants: Mapping[str, Variant], build: Callable[..., nn.Module]
) -> dict[str, Callable[..., nn.Module]]:
    """Register every variant with timm.

    Args:
        module: ``__name__`` of the family's module, which holds ``default_cfgs``.
        variants: the family's table.
        build: called with ``(registered name, pretrained, **model_args)``.

    Returns:
        The entry points by registered name.

    Raises:
        ValueError: a name that somebody else registered.
    """
    entry_points = {}
    for name, variant in variants.items():
        public_name = registered_name(name)
        if is_model(public_name) and not _is_ours(public_name):
            raise ValueError(f"{public_name!r} is registered by {model_entrypoint(public_name).__module__}")
        entry_points[public_name] = register_model(_entry_point(module, public_name, variant, build))
    vars(sys.modules[module]).update(entry_points)
    return entry_points


def _entry_point(module: str, name: str, variant: Variant, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, **{**variant.model_args, **kwargs})

    # timm registers a function under its name and looks up default_cfgs in its module.
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"``{name}``: {dict(variant.model_args)}"
    return entry_point


def _is_ours(name: str) -> bool:
    return model_entrypoint(name).__module__.startswith(f"{_PACKAGE}.")


def _base_cfg(**overrides: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        "license": "apache-2.0",
        **overrides,
    }


def _tagged_weights(public_name: str) -> list[tuple[str, dict[str, Any]]]:
    released = {key: weights for key, weights in RELEASED.items() if key.split(".")[0] == public_name}
    if not released:
        return [(f"{public_name}.untrained", {})]
    return [
        (
            key,
            {
                "url": weights.url,
                "hf_hub_id": weights.hf_hub_id or None,
                "num_classes": weights.num_classes,
                "license": weights.license,
                "origin_url": weights.origin,
                **weights.cfg,
            },
        )
        for key, weights in released.items()
    ]
