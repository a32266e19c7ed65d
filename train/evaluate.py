"""Accuracy over val images, every image counted once."""

import torch
from timm.task import ClassificationEvaluator
from torch import nn

from ..errors import UserError
from .data.loader import IGNORED_TARGET, Batches
from .data.transforms import Preprocess
from .run.world import World


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, preprocess: Preprocess, autocast: torch.autocast, world: World
) -> dict[str, float | int]:
    """Run the model over this process's part and sum over all processes; unreadable images count for nothing.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes); put into evaluation mode.

    Returns:
        ``loss`` (cross-entropy, mean over images), ``top1`` and ``top5`` in percent, ``images`` counted.

    Raises:
        UserError: in all processes, where no image at all can be counted.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=world.device)
    left = batches.sampler.num_valid
    for images, targets in batches:
        inputs, labels = preprocess(images, targets)
        with autocast:
            logits = model(inputs)
        # The sampler fills the last batches up by wrapping around.
        logits, labels = logits[:left], labels[:left]
        left -= len(labels)
        readable = targets[: len(labels)] != IGNORED_TARGET
        if not readable.all():
            logits, labels = logits[readable.to(logits.device)], labels[readable.to(labels.device)]
        if len(labels):
            evaluator.update(logits, labels)
    counted = world.sum(evaluator.num_samples)
    if counted == 0:
        raise UserError(
            f"none of the {batches.sampler.num_images} val images can be read, so that there is nothing to "
            "measure: vicinal data check lists them"
        )
    return {**evaluator.compute(distributed=world.is_distributed), "images": counted}
