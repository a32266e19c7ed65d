"""Mixed precision on any device, and parameter groups by the backbone's own rules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import nn

from .backbone import VicinalBackbone, stage_of_parameters

PRECISIONS = ("float16", "bfloat16")


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(AmpOptimWrapper):
    """MMEngine's AmpOptimWrapper, on CPU too, and with a loss scale only where float16 needs one.

    Args:
        dtype: "float16" or "bfloat16".
        loss_scale: "dynamic", or a fixed factor.
        **kwargs: as for ``OptimWrapper``.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: str = "float16", loss_scale: str | float = "dynamic", **kwargs) -> None:
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(PRECISIONS)}; OptimWrapper is for float32")
        OptimWrapper.__init__(self, **kwargs)
        self.device_type = self.optimizer.param_groups[0]["params"][0].device.type
        self.cast_dtype = getattr(torch, dtype)
        self._scale_update_param = None if loss_scale == "dynamic" else float(loss_scale)
        start: dict[str, Any] = {} if loss_scale == "dynamic" else {"init_scale": float(loss_scale)}
        self.loss_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == "float16", **start)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with OptimWrapper.optim_context(self, model), torch.autocast(self.device_type, self.cast_dtype):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's parameter groups, with two more entries of ``paramwise_cfg`` that the backbone's model fills in.

    ``layer_decay``: factor of the learning rate from each block to the block below it, down to the stem; the heads keep
    the full rate. ``model_no_decay``: no weight decay for what the model exempts (position biases, temperatures) and
    for its one-dimensional parameters. Both multiply what the other entries say, as do the factors of the learning rate
    that the model gives single parameters.

    Raises:
        ValueError: a detector whose backbone is not a VicinalBackbone, or a factor outside (0, 1].
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """MMEngine's groups, one for each parameter, and then the backbone's factors on them."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        layer_decay = self.paramwise_cfg.get("layer_decay", 1.0)
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay={layer_decay} must lie in (0, 1]")
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, VicinalBackbone):
            raise ValueError(
                f"the backbone is a {type(backbone).__name__}: these parameter groups need VicinalBackbone"
            )
        layers = stage_of_parameters(backbone.model, coarse=False)
        top = max(layers.values()) + 1
        exempt = _exempt_parameters(backbone.model) if self.paramwise_cfg.get("model_no_decay") else set()
        scales: dict[str, float] = getattr(backbone.model, "learning_rate_scales", dict)()
        groups = {id(parameter): group for group in params for parameter in group["params"]}
        for name, parameter in backbone.model.named_parameters():
            group = groups[id(parameter)]
            scale = scales.get(name, 1.0) * layer_decay ** (top - layers[name])
            group["lr"] = group.get("lr", self.base_lr) * scale
            if name in exempt:
                group["weight_decay"] = 0.0


def _exempt_parameters(model: Any) -> set[str]:
    named = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    return named | {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
