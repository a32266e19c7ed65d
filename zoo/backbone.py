"""The contract of a timm model, written once: stem, stages, norm and head, and everything that timm asks of them.

A family builds its parts and hands them to :class:`Backbone`; what it inherits is classification, feature extraction
(``features_only``, ``forward_intermediates``, pruning), activation checkpointing, parameter groups, re-initialisation
after ``to_empty`` and loading of every layout that :mod:`vicinal.checkpoints` knows.
"""

import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Union, cast

import torch
from timm.layers import (
    ClassifierHead,
    ClNormMlpClassifierHead,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint_seq, resolve_pretrained_cfg
from torch import Tensor, nn

from ..checkpoints import RELEASED, Layout, fetch, rename_keys
from ..checkpoints.files import unwrap
from ..checkpoints.fit import belongs_to, describe_misfit
from ..timm_internals import FeatureGetterNet, feature_take_indices
from .blocks.tracing import always

Head = Union[ClassifierHead, ClNormMlpClassifierHead, NormMlpClassifierHead]


class Stage(nn.Module):
    """A downsampling step (identity in the first stage), blocks, and a norm if the family has one for each stage."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: Optional[nn.Module] = None,
        norm: Optional[nn.Module] = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.norm(checkpoint_seq(self.blocks, x))
        return self.norm(self.blocks(x))


class Backbone(nn.Module):
    """A network of stem, stages, norm and head, with the interface that timm gives its models.

    Args:
        stem: image (B, in_chans, H, W) to the first map.
        stages: :class:`Stage` modules in order.
        norm: norm after the last stage, before pooling; identity where the head pools first.
        head: one of timm's classifier heads.
        widths: channels after each stage.
        reductions: stride of each stage's map with respect to the image.
        in_chans: channels of the image.
        num_classes: rows of the classifier, 0 for none.
        output_fmt: layout of the maps inside the network, "NHWC" or "NCHW".
        num_features: channels behind ``norm``, where that changes them.

    Attributes:
        layouts: foreign layouts of state dicts that the family loads, from its key map; a subclass inherits them.
        feature_info: one entry a stage, for timm's feature extraction.
        num_features: channels of ``forward_features``.
        head_hidden_size: channels that enter the classifier.
    """

    layouts: ClassVar[tuple[Layout, ...]] = ()
    legacy_onnx: ClassVar[str] = "one size"
    """What ONNX's TorchScript-based exporter can do with the family: "any size", "one size" or "nothing"."""

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Stage],
        norm: nn.Module,
        head: Head,
        widths: Sequence[int],
        reductions: Sequence[int],
        in_chans: int,
        num_classes: int,
        output_fmt: str,
        num_features: Optional[int] = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = head
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.output_fmt = output_fmt
        self.num_features = num_features or widths[-1]
        self.head_hidden_size = head.num_features
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{index}"}
            for index, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.init_weights(needs_reset=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the last map, normed and unpooled, in ``output_fmt``."""
        if not torch.jit.is_scripting():
            self.check_export(x)
        x = self._embed(x)
        x = self.stages(x)
        return self.norm(x)

    def _embed(self, x: Tensor) -> Tensor:
        """The stem's map, of an image whose channels lie together, as depthwise convolutions and norms want them."""
        # torch.func.vmap takes no memory format
        return self.stem(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map to logits (B, num_classes), or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Features with the maps of chosen stages.

        Args:
            x: image (B, in_chans, H, W).
            indices: the last n stages if int, all if None, else the stages listed, in the order of the list.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run the stages after the last one wanted.
            output_fmt: "NCHW" or "NHWC", layout of the maps returned.
            intermediates_only: return the list of maps alone.

        Returns:
            The maps, or the features and the maps.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output shape must be NCHW or NHWC."
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        if not torch.jit.is_scripting():
            self.check_export(x)
        found: Dict[int, Tensor] = {}
        x = first = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 (TorchScript cannot slice a Sequential)
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        index = 0
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take_indices:
                tapped = self.norm(x) if norm and index == last_index else x
                found[index] = self._to_format(self.as_map(tapped, first), output_fmt)
        intermediates = [found[index] for index in take_indices]
        if intermediates_only:
            return intermediates
        if index == last_index:
            x = self.norm(x)
        return x, intermediates

    @torch.jit.unused
    def check_export(self, x: Tensor) -> None:
        """Refuse an export whose file would fail at sizes other than the example's.

        Raises:
            RuntimeError: with what the exporter can do, and what does more.
        """
        if torch.compiler.is_exporting():
            smallest = self.smallest_example()
            for size in (x.shape[2], x.shape[3]):
                # torch takes a map of one row for a constant, which an example cannot show to be dynamic
                if not always(size < smallest) and size < smallest:
                    raise RuntimeError(
                        f"export with dynamic sizes needs an example image of at least {smallest} x {smallest} pixels"
                    )
        elif torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            check_legacy_onnx(type(self).__name__, self.legacy_onnx)

    def smallest_example(self) -> int:
        """Side of the smallest image whose last map has two rows and columns."""
        return self.feature_info[len(self.stages) - 1]["reduction"] + 1

    def as_map(self, x: Tensor, first: Tensor) -> Tensor:
        """The output of a stage as a map, for families whose stages hold other tokens too; first: the stem's map."""
        return x

    def _to_format(self, x: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == self.output_fmt:
            return x
        return x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x.permute(0, 2, 3, 1)

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Drop what comes after the last stage wanted; returns the indices as non-negative numbers."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        ends_early = max_index < len(self.stages) - 1
        features_before = self.num_features
        self.stages = self.stages[: max_index + 1]
        if prune_norm or ends_early:
            # the final norm belongs to the last stage
            self.norm = nn.Identity().train(self.training)
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or self.num_features != features_before or ends_early:
            self._reset_head(0, "", reset_other=True)
        return take_indices

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier: ``num_classes`` 0 removes it, ``global_pool`` None keeps the pooling."""
        self._reset_head(num_classes, global_pool, reset_other=False)

    def _reset_head(self, num_classes: int, global_pool: Optional[str], reset_other: bool) -> None:
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay: stem, stages (coarse) or blocks, final norm."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that their recipe keeps out of weight decay besides one-dimensional ones."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias")}

    @torch.jit.ignore
    def learning_rate_scales(self) -> dict[str, float]:
        """Factors of the learning rate that the recipe gives single parameters, by name."""
        return {}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of storing them."""
        for stage in cast(Iterable[Stage], self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the paper does.

        Args:
            needs_reset: also re-run the initialisation that modules do in their constructors, as is needed after
                ``to_empty``.
        """
        for name, module in self.named_modules():
            self.init_module(module, name, needs_reset)

    def init_module(self, module: nn.Module, name: str, needs_reset: bool) -> None:
        """Initialise one module: linear layers normal with deviation 0.02, the others by their own rule."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif needs_reset:
            reset_parameters(module)

    @torch.jit.ignore
    def adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """A state dict of any layout of :attr:`layouts`, as this network takes it."""
        return rename_keys(self.layouts, unwrap(state_dict))


def reset_parameters(module: nn.Module) -> None:
    """Re-run the initialisation that a module does in its constructor, if it has one."""
    if (reset := getattr(module, "reset_parameters", None)) is not None:
        reset()


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each block of each stage, growing linearly from 0 to ``rate`` at the last one."""
    return cast(list[list[float]], calculate_drop_path_rates(rate, list(depths), stagewise=True))


def check_per_stage(**options: Sequence[Any]) -> None:
    """Refuse options of a network that do not have one entry for each stage.

    Raises:
        ValueError: with every option and its length.
    """
    lengths = {name: len(values) for name, values in options.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"options need one entry for each stage, but {given}")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Backbone) -> dict[str, Tensor]:
    """timm's hook for weights of a foreign layout; ours, with or without the classifier, pass as they are.

    Raises:
        ValueError: names besides the classifier's are missing or left over. timm looks at none of them where the
            number of classes differs, and would leave the network as it was drawn.
    """
    adapted = model.adapt_state_dict(state_dict)
    cfg = getattr(model, "pretrained_cfg", {})
    classifier, ours = cfg.get("classifier", "head.fc"), model.state_dict()
    given, expected = (
        {key: value for key, value in tensors.items() if not belongs_to(key, classifier)} for tensors in (adapted, ours)
    )
    if model.num_classes == 0:
        # A network without a classifier has nothing of what stands before it either, such as SHViT's batch norm.
        given = {key: value for key, value in given.items() if key in ours or not key.startswith("head.")}
    if problems := describe_misfit(dict.fromkeys(given), dict.fromkeys(expected)):
        raise ValueError(f"not the weights of this {cfg.get('architecture', type(model).__name__)}: {problems}")
    return adapted


def check_legacy_onnx(name: str, ability: str) -> None:
    """Refuse what ``torch.onnx.export(dynamo=False)`` would write wrongly without a word.

    Args:
        name: of the network.
        ability: :attr:`Backbone.legacy_onnx`.

    Raises:
        RuntimeError: the exporter cannot do it.
    """
    if ability == "nothing":
        limit = f"cannot export {name}"
    elif ability == "one size" and _legacy_dynamic_axes():
        limit = f"would fix the sizes of {name} at those of the example, against dynamic_axes"
    else:
        return
    raise RuntimeError(f"torch.onnx.export(dynamo=False) {limit}: use dynamo=True, with dynamic_shapes for other sizes")


def _legacy_dynamic_axes() -> object:
    """What the TorchScript-based exporter that is running was given; it tells the model nothing about it."""
    frame: Optional[FrameType] = sys._getframe()
    while frame is not None:
        if "dynamic_axes" in frame.f_locals and frame.f_globals.get("__name__", "").startswith("torch.onnx."):
            return frame.f_locals["dynamic_axes"]
        frame = frame.f_back
    return None


class FeatureNet(FeatureGetterNet):
    """What ``features_only=True`` returns: NCHW maps whatever the layout inside, and activation checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`Backbone.set_grad_checkpointing`."""
        cast(Backbone, self.model).set_grad_checkpointing(enable)


class FeatureDict(FeatureNet):
    """The same maps by the name of their stage, such as "stages.2", in the order of ``out_indices``."""

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        return dict(zip(self.feature_info.module_name(), super().forward(x), strict=True))


FEATURE_NETS = {"getter": FeatureNet, "list": FeatureNet, "dict": FeatureDict}


def choose_feature_net(feature_cls: Union[str, type[nn.Module]]) -> type[nn.Module]:
    """The class for timm's ``feature_cls``: a name, or a class of timm's getters.

    Raises:
        ValueError: timm's others, whose maps are in the layout inside or lie between the layers that they rewrite.
    """
    if isinstance(feature_cls, type) and issubclass(feature_cls, FeatureGetterNet):
        return feature_cls
    if feature_cls not in FEATURE_NETS:
        raise ValueError(
            f"feature_cls={feature_cls!r} must be 'getter' or 'list' (a list of NCHW maps) or 'dict' (by name of stage)"
        )
    return FEATURE_NETS[feature_cls]


def build_backbone(
    model_cls: type[Backbone], variant: str, pretrained: bool = False, *, feature_levels: int = 4, **kwargs: Any
) -> nn.Module:
    """Build a registered variant through timm, with its weights if asked for.

    Args:
        model_cls: the family's network.
        variant: registered name.
        pretrained: load the released weights.
        feature_levels: how many of the last stages ``features_only`` returns unless ``out_indices`` says otherwise.
        **kwargs: arguments of the network and of timm's model factory.
    """
    feature_cls: type[nn.Module] = FeatureNet
    if kwargs.get("features_only"):
        feature_cls = choose_feature_net(kwargs.pop("feature_cls", "getter"))
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = _with_local_file(variant, **kwargs)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": feature_levels, "feature_cls": feature_cls},
        **kwargs,
    )


def _with_local_file(
    variant: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: Optional[dict[str, Any]] = None, **_: Any
) -> Optional[dict[str, Any]]:
    """The overlay of a pretrained_cfg, with the file where it has an address: timm keeps whatever a server sends."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if not isinstance(cfg.url, str) or not cfg.url or cfg.source or cfg.state_dict or cfg.file or cfg.hf_hub_id:
        return pretrained_cfg_overlay
    sha256 = next((weights.sha256 for weights in RELEASED.values() if weights.url == cfg.url), "")
    return {**(pretrained_cfg_overlay or {}), "file": str(fetch(cfg.url, sha256))}
