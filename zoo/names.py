"""Registration of a family's table with timm: entry points, pretrained configurations, released weights.

The registered names stand literally in each family's table. A name that timm owns, or that belongs to a family of
timm's, ends in ``_vicinal`` there: registering timm's own name would delete the weights that timm lists for it.
"""

import fnmatch
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, is_model, model_entrypoint, register_model
from torch import nn

from ..checkpoints import ReleasedWeights

_REGISTERED: dict[str, dict[str, None]] = {}
"""Names of each family's module, in the order of its tables."""


@dataclass(frozen=True)
class Variant:
    """One row of a family's table.

    Attributes:
        model_args: arguments of the network's constructor.
        cfg: entries of timm's pretrained configuration that differ from the family's.
    """

    model_args: Mapping[str, Any]
    cfg: Mapping[str, Any] = field(default_factory=dict)


def default_cfgs_of(
    variants: Mapping[str, Variant], released: Mapping[str, ReleasedWeights] = MappingProxyType({}), **family_cfg: Any
) -> dict:
    """timm's ``default_cfgs`` of a family: every variant, with each of its released weights as a tag.

    Args:
        variants: the family's table, by registered name.
        released: the family's released weights by ``name.tag``.
        **family_cfg: entries of timm's pretrained configuration that hold for the whole family.

    Raises:
        ValueError: released weights of a name that is not in the table.
    """
    foreign = [key for key in released if key.split(".")[0] not in variants]
    if foreign:
        raise ValueError(f"released weights {foreign} are of no variant of the table: {list(variants)}")
    return generate_default_cfgs(
        {
            key: _base_cfg(**{**family_cfg, **variant.cfg, **weights})
            for name, variant in variants.items()
            for key, weights in _tagged_weights(name, released)
        }
    )


def register_variants(
    module: str, variants: Mapping[str, Variant], build: Callable[..., nn.Module]
) -> dict[str, Callable[..., nn.Module]]:
    """Register every variant with timm.

    Args:
        module: ``__name__`` of the family's module, which holds ``default_cfgs``.
        variants: the family's table, by registered name.
        build: called with ``(registered name, pretrained, **model_args)``.

    Returns:
        The entry points by registered name.

    Raises:
        ValueError: a name that another module registered, with what to do; none of the table is registered then.
    """
    for name in variants:
        if is_model(name) and model_entrypoint(name).__module__ != module:
            raise ValueError(
                f"{name!r} of {module} is registered already, by {model_entrypoint(name).__module__}: install the timm "
                f"that this version was tested with (pip install 'timm<1.1'), or give the variant another name in "
                f"{module}, such as {name}_vicinal"
            )
    _REGISTERED.setdefault(module, {}).update(dict.fromkeys(variants))
    entry_points = {
        name: register_model(_entry_point(module, name, variant, build)) for name, variant in variants.items()
    }
    vars(sys.modules[module]).update(entry_points)
    return entry_points


def families() -> list[str]:
    """Names of this package's families, which are those of their modules, sorted."""
    package = f"{__package__}."
    return sorted(module.removeprefix(package) for module in _REGISTERED if module.startswith(package))


def variants(pattern: str = "*", family: str | None = None) -> list[str]:
    """Registered names of a family, or of all of this package's, in the order of the tables.

    Args:
        pattern: shell pattern of the names, as for ``timm.list_models``; "*_pico*" for the debug-sized ones.
        family: one of :func:`families`, or the module of a family from elsewhere.

    Raises:
        ValueError: there is no such family.
    """
    tables = {module.removeprefix(f"{__package__}."): names for module, names in _REGISTERED.items()}
    if family is not None and family not in tables:
        raise ValueError(f"family={family!r} is not registered; there are {', '.join(tables)}")
    names = [name for key in ([family] if family else families()) for name in tables[key]]
    return fnmatch.filter(names, pattern)


def _entry_point(module: str, name: str, variant: Variant, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, **{**variant.model_args, **kwargs})

    # timm registers a function under its name and looks up default_cfgs in its module.
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"``{name}``: {dict(variant.model_args)}"
    return entry_point


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


def _tagged_weights(name: str, released: Mapping[str, ReleasedWeights]) -> list[tuple[str, dict[str, Any]]]:
    released = {key: weights for key, weights in released.items() if key.split(".")[0] == name}
    if not released:
        return [(f"{name}.untrained", {})]
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
