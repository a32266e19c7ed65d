"""Probing: a new head on a network that stays as it is."""

import timm
from torch import nn

from ...errors import UserError, first_line


def attach_attentive_head(backbone: nn.Module, num_classes: int, num_queries: int) -> nn.Module:
    """A network and a head of queries as one timm model, which a saved checkpoint rebuilds.

    Args:
        backbone: made by ``timm.create_model``; its classifier goes.
    """
    backbone.reset_classifier(0)
    cfg = dict(backbone.pretrained_cfg)
    options = {key: value for key, value in getattr(backbone, "_model_args", {}).items() if key != "num_classes"}
    try:
        model = timm.create_model(
            "attentive_probe",
            backbone=cfg["architecture"],
            num_classes=num_classes,
            num_queries=num_queries,
            backbone_args=options,
        )
    except ValueError as error:
        raise UserError(f"--probe-queries {num_queries}: {first_line(error)}") from error
    model.backbone = backbone
    model.pretrained_cfg = {**cfg, **{key: model.pretrained_cfg[key] for key in ("architecture", "tag", "classifier")}}
    return model


def freeze(model: nn.Module) -> None:
    """Leave only the classifier to be trained."""
    model.requires_grad_(False)
    classifier = model.get_classifier()
    for module in classifier if isinstance(classifier, (tuple, list)) else (classifier,):
        module.requires_grad_(True)


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but for what is frozen: its norms keep their statistics, and nothing of it is dropped."""
    model.train()
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
