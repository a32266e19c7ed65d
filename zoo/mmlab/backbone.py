"""Any timm model as a backbone of MMDetection and MMSegmentation."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from mmengine.model import BaseModule, initialize
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d, convert_sync_batchnorm
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.nn import functional as F

from ...checkpoints import load
from ...timm_internals import group_with_matcher
from ...torch_internals import BatchNorm
from ..backbone import Backbone

OUTPUT_NORMS = {"layer": partial(LayerNorm2d, eps=1e-5)}


@MODELS.register_module()
class VicinalBackbone(BaseModule):
    """A timm model, ours or timm's own, that returns the maps of its stages.

    Args:
        model: name for ``timm.create_model``.
        out_indices: stages whose maps are returned; None for all of a pyramid (of ResNets, the last four).
        pretrained: weights that ``init_weights`` loads: False for none, True for the released ones, a tag of them such
            as ``"shi_in1k"``, or a file or folder that :func:`vicinal.checkpoints.load` reads, in our layout or the
            original one, of a classifier or of a detector.
        output_norm: "layer" for a layer norm on each map, as the dense-task code of NAT, DaViT and BiFormer has it; or
            one entry for each map, as LITv2's, which leaves the first map alone.
        frozen_stages: -1 trains everything, 0 freezes the stem, n also the first n stages.
        norm_eval: keep batch norms at their running statistics.
        sync_bn: let batch norms share their statistics over the processes of a distributed run.
        grad_checkpointing: recompute the activations of each block in the backward pass.
        input_multiple: pad images at the right and the bottom to multiples of this, and crop the maps again.
        init_cfg: as for every module of MMEngine.
        **model_args: options of the model, such as ``drop_path_rate``.

    Attributes:
        channels: of each map returned.
        reductions: stride of each map.

    Shape:
        Images (B, 3, H, W) to a tuple of maps (B, C_i, ceil(H / stride_i), ceil(W / stride_i)).

    Raises:
        ValueError: a stage that the model lacks, a model without ``forward_intermediates``, an unknown option.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] | None = None,
        pretrained: bool | str = False,
        output_norm: str | Sequence[str | None] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        sync_bn: bool = False,
        grad_checkpointing: bool = False,
        input_multiple: int = 1,
        init_cfg: dict | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg)
        self.name, self.model_args, self.pretrained = model, model_args, pretrained
        self.norm_eval, self.input_multiple = norm_eval, input_multiple
        self.model = cast(Any, timm.create_model(model, num_classes=0, **model_args))
        self.out_indices = choose_stages(model, self.model, out_indices)
        levels = [self.model.feature_info[index] for index in self.out_indices]
        self.channels = [level["num_chs"] for level in levels]
        self.reductions = [level["reduction"] for level in levels]
        # a norm that no output passes would have no gradient, which stops distributed training
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        self.output_norms = build_output_norms(output_norm, self.channels)
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        if sync_bn and torch.distributed.is_initialized():
            # torch's own conversion, which MMEngine uses, would lose the activations inside timm's batch norms
            self.model = convert_sync_batchnorm(self.model)
        self._freeze(frozen_stages)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.input_multiple, 0, -height % self.input_multiple))
        # timm's own models return the maps in the order of the stages, whatever the order asked for
        stages = sorted(set(self.out_indices))
        found = self.model.forward_intermediates(
            x, indices=stages, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        maps = [found[stages.index(index)] for index in self.out_indices]
        if self.input_multiple > 1:
            strides = self.reductions
            maps = [m[:, :, : -(-height // s), : -(-width // s)] for m, s in zip(maps, strides, strict=True)]
        return tuple(norm(m).contiguous() for norm, m in zip(self.output_norms, maps, strict=True))

    def init_weights(self) -> None:
        """Load the weights of ``pretrained``; without them, apply ``init_cfg`` or keep what the constructor drew.

        Raises:
            ValueError: a file that does not fit, with every missing and surplus entry.
        """
        self._is_init = True
        if not self.pretrained:
            if self.init_cfg:
                initialize(self, self.init_cfg)
            return
        if is_weight_file(self.pretrained):
            state_dict = convert_backbone(self.name, load(str(self.pretrained)), self)
            self.load_state_dict({**self.state_dict(), **state_dict})
            return
        name = self.name if self.pretrained is True else f"{self.name}.{self.pretrained}"
        state_dict = timm.create_model(name, pretrained=True, num_classes=0, **self.model_args).state_dict()
        self.model.load_state_dict({key: state_dict[key] for key in self.model.state_dict()})

    def train(self, mode: bool = True) -> "VicinalBackbone":
        """As for every module, but frozen stages, and batch norms under ``norm_eval``, stay in evaluation mode."""
        super().train(mode)
        for module in self.model.modules():
            parameters = list(module.parameters())
            is_frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
            if is_frozen or (self.norm_eval and isinstance(module, BatchNorm)):
                module.eval()
        return self

    def _freeze(self, frozen_stages: int) -> None:
        if frozen_stages < 0:
            return
        for name, layer in stage_of_parameters(self.model).items():
            if layer <= frozen_stages:
                self.model.get_parameter(name).requires_grad_(False)


def is_weight_file(pretrained: bool | str) -> bool:
    """Whether the weights asked for are a file or a folder; else they are a tag of released ones, or all or none."""
    if isinstance(pretrained, bool):
        return False
    path = Path(pretrained)
    return len(path.parts) > 1 or path.suffix in (".pth", ".pt", ".bin", ".safetensors") or path.is_dir()


def choose_stages(name: str, model: Any, out_indices: Sequence[int] | None) -> tuple[int, ...]:
    """Non-negative indices of the stages wanted; None takes the last four, or all of fewer."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"model={name!r} has no forward_intermediates: timm gives no maps of its stages")
    count = len(model.feature_info)
    if out_indices is None:
        return tuple(range(max(0, count - 4), count))
    wrong = [index for index in out_indices if not -count <= index < count]
    if wrong:
        raise ValueError(f"out_indices={tuple(out_indices)}: {name} has {count} stages, 0 to {count - 1}")
    return tuple(index % count for index in out_indices)


def build_output_norms(kinds: str | Sequence[str | None] | None, channels: Sequence[int]) -> nn.ModuleList:
    """One norm for each map; a single kind is for all of them, None for none."""
    kinds = [kinds] * len(channels) if kinds is None or isinstance(kinds, str) else kinds
    unknown = [kind for kind in kinds if kind is not None and kind not in OUTPUT_NORMS]
    if unknown or len(kinds) != len(channels):
        raise ValueError(f"output_norm={kinds} must be None or layer, for all or for each of {len(channels)} maps")
    return nn.ModuleList(
        nn.Identity() if kind is None else OUTPUT_NORMS[kind](width)
        for kind, width in zip(kinds, channels, strict=True)
    )


def stage_of_parameters(model: Any, coarse: bool = True) -> dict[str, int]:
    """Parameter name -> 0 for the stem, 1... for the stages (or, with ``coarse`` False, the blocks) after it."""
    matcher = model.group_matcher(coarse=coarse)
    layers = group_with_matcher(model.named_parameters(), matcher, reverse=True)
    first = min(layers.values(), default=0)
    return {name: layer - first for name, layer in layers.items()}


def convert_backbone(name: str, state_dict: dict[str, Tensor], backbone: VicinalBackbone) -> dict[str, Tensor]:
    """A state dict of a classifier, or the backbone's part of a detector's, as an adapter of the model takes it.

    Args:
        name: registered model name.
        state_dict: in our layout, or in any that the model's own loading knows.
        backbone: the adapter to fit; pruned stages are left out.

    Returns:
        Entries for ``load_state_dict``; output norms only if the file has them.

    Raises:
        ValueError: entries that are missing, or left over besides the classifier.
    """
    prefix = "backbone."
    if any(key.startswith(prefix) for key in state_dict):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    norms, rest = _split_output_norms(state_dict, backbone)
    rest = {key.removeprefix("model."): value for key, value in rest.items()}
    full = timm.create_model(name, num_classes=0, **backbone.model_args)
    if isinstance(full, Backbone):
        rest = full.adapt_state_dict(rest)  # what fits is held against the pruned network below
    elif adapt := getattr(sys.modules[model_entrypoint(name).__module__], "checkpoint_filter_fn", None):
        rest = adapt(rest, full)
    wanted = backbone.model.state_dict()
    # files of old or of exported networks lack the counters of batch norms
    rest = {**{key: value for key, value in wanted.items() if key.endswith(".num_batches_tracked")}, **rest}
    problems = [f"missing: {key}" for key in wanted if key not in rest]
    problems += [f"left over: {key}" for key in rest if key not in full.state_dict() and not _is_head(key, full)]
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise ValueError(f"{name}: the weights do not fit ({len(problems)} entries): {shown}")
    return {**norms, **{f"model.{key}": rest[key] for key in wanted}}


def _is_head(key: str, model: Any) -> bool:
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return key.startswith(("head.", *classifiers))


def _split_output_norms(state_dict: dict[str, Tensor], backbone: VicinalBackbone) -> tuple[dict, dict]:
    """Output norms under our names, and the rest; the originals call them ``norm0``... or ``extra_norms.0``..."""
    norms, rest = {}, {}
    places = {
        index: place
        for place, index in enumerate(backbone.out_indices)
        if not isinstance(backbone.output_norms[place], nn.Identity)
    }
    for key, value in state_dict.items():
        parts = key.replace("extra_norms.", "norm").split(".")
        stage = parts[0].removeprefix("norm")
        if key.startswith("output_norms."):
            norms[key] = value
        elif parts[0].startswith("norm") and stage.isdigit() and int(stage) in places:
            norms[f"output_norms.{places[int(stage)]}.{parts[1]}"] = value
        else:
            rest[key] = value
    return norms, rest
