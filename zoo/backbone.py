"""The contract of a timm model, written once: stem, stages, norm and head, and everything that timm asks of them.

A family builds its parts and hands them to :class:`Backbone`; what it inherits is classification, feature extraction
(``features_only``, ``forward_intermediates``, pruning), activation checkpointing, parameter groups, re-initialisation
after ``to_empty`` and loading of every layout that :mod:`vicinal.checkpoints` knows.
"""

from collections.abc import Sequence
from typing import Any, List, Optional, Tuple, Union

import torch
from timm.layers import ClassifierHead, ClNormMlpClassifierHead, NormMlpClassifierHead, get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from ..checkpoints import rename_keys
from ..checkpoints.files import unwrap

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
        feature_info: one entry a stage, for timm's feature extraction.
        num_features: channels of ``forward_features``.
        head_hidden_size: channels that enter the classifier.
    """

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
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{index}"}
            for index, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.init_weights(needs_reset=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the last map, normed and unpooled, in ``output_fmt``."""
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
            indices: the last n stages if int, all if None, else the stages listed.
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
        intermediates = []
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
                intermediates.append(self._to_format(self.as_map(tapped, first), output_fmt))
        if intermediates_only:
            return intermediates
        if index == last_index:
            x = self.norm(x)
        return x, intermediates

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
        for stage in self.stages:
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
        elif needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @torch.jit.ignore
    def adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """A state dict of any layout that the family's key map knows, as this network takes it."""
        return rename_keys(type(self).__module__.rpartition(".")[2], unwrap(state_dict))


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
    """timm's hook for weights of a foreign layout; ours, with or without the classifier, pass as they are."""
    return model.adapt_state_dict(state_dict)


class FeatureNet(FeatureGetterNet):
    """What ``features_only=True`` returns: NCHW maps whatever the layout inside, and activation checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`Backbone.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)


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
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": feature_levels, "feature_cls": FeatureNet},
        **kwargs,
    )
