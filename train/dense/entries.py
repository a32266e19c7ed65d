"""``--set``: entries of a config by their path, refused where the config has no place for them."""

import inspect
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry, init_default_scope

from ...errors import UserError, nearest
from ...zoo.mmlab.backbone import VicinalBackbone
from .record import registered_only

# What MMEngine takes beside the arguments of a component that a mapping describes.
EXTRA = {
    "": ("load_from", "auto_scale_lr", "custom_hooks", "visualizer", "compile", "find_unused_parameters"),
    "optim_wrapper": ("constructor", "paramwise_cfg"),
    "optim_wrapper.paramwise_cfg": (
        *("custom_keys", "norm_decay_mult", "bias_decay_mult", "flat_decay_mult", "dwconv_decay_mult"),
        *("bias_lr_mult", "dcn_offset_lr_mult", "bypass_duplicate", "layer_decay", "model_no_decay"),
    ),
    "optim_wrapper.clip_grad": ("max_norm", "norm_type", "type", "clip_value", "error_if_nonfinite"),
    "randomness": ("diff_rank_seed", "deterministic"),
}
# As DataLoader has them.
LOADER = ("batch_size", "num_workers", "persistent_workers", "pin_memory", "drop_last", "prefetch_factor", "timeout")


def set_entries(cfg: Config, entries: dict[str, Any]) -> None:
    """Change entries of a config.

    Args:
        entries: dotted path -> value; numbers in a path are places in a list.

    Raises:
        UserError: a path that the config does not have and no component takes, or a value of another kind.
    """
    for path, value in entries.items():
        _check_entry(cfg, path, value)
        try:
            cfg.merge_from_dict({path: value})
        except (KeyError, TypeError, IndexError, AssertionError) as error:
            raise UserError(f"--set {path}={value}: the config has no such entry") from error


def _check_entry(cfg: Config, path: str, value: Any) -> None:
    if path in ("resume", "work_dir"):
        raise UserError(f"--set {path}: use --{'output' if path == 'work_dir' else 'resume'}")
    node: Any = cfg._cfg_dict
    parts = path.split(".")
    for depth, part in enumerate(parts):
        place = ".".join(parts[:depth])
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"--set {path}: {place} is a list of {len(node)}, counted from 0")
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, dict):
            _check_new(cfg, node, place, part, path)
            return
        elif node is None:  # for example clip_grad=None: what lies below is new
            return
        else:
            raise UserError(f"--set {path}: {place} is {node!r}, and has no entries")
    _check_kind(node, value, path)
    if parts[-1] == "type" and find_component(cfg, str(value)) is None:
        raise UserError(f"--set {path}={value}: no component of this name is registered")


def _check_new(cfg: Config, node: dict, place: str, part: str, path: str) -> None:
    allowed = {*node, *EXTRA.get(place, ())}
    if place.endswith("_dataloader"):
        allowed |= {*LOADER}
    if isinstance(node.get("type"), str):
        arguments = component_arguments(cfg, node["type"])
        if arguments is None:
            return
        allowed |= arguments
    if part not in allowed:
        raise UserError(
            f"--set {path}: {place or 'the config'} has no entry {part}; "
            f"{nearest(part, allowed) or 'it has ' + ', '.join(sorted(map(str, allowed)))}"
        )


def find_component(cfg: Config, name: str) -> Any:
    """What is registered under a name, with MMEngine or the config's library; None if nothing is."""
    init_default_scope(cfg.get("default_scope", "mmengine"))
    with registered_only():
        registries = [registry for registry in vars(mmengine.registry).values() if isinstance(registry, Registry)]
        return next((found for registry in registries if (found := _find(registry, name)) is not None), None)


def component_arguments(cfg: Config, name: str) -> set[str] | None:
    """Names that the constructor of a registered component takes; None where it takes any, or is not known."""
    component = find_component(cfg, name)
    if not inspect.isclass(component) or component is VicinalBackbone:
        # the backbone hands options on to the model, which is asked for them later
        return None
    names: set[str] = set()
    for base in component.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        names |= {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            return names - {"self"}
    return None


def _find(registry: Registry, name: str) -> Any:
    try:
        return registry.get(name)
    except (RuntimeError, KeyError):
        return None


def _check_kind(old: Any, new: Any, path: str) -> None:
    is_number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if is_number and isinstance(new, (str, bool)):
        raise UserError(f"--set {path}={new}: it is a number, {old}, in the config")
    if isinstance(old, bool) and isinstance(new, (str, float)):
        raise UserError(f"--set {path}={new}: it is true or false, {str(old).lower()}, in the config")
    if isinstance(old, dict) and new is not None and not isinstance(new, dict):
        raise UserError(f"--set {path}={new}: it has entries of its own: {', '.join(map(str, old))}")
