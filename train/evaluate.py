"""Accuracy over held-out images, every image counted once."""

import torch
from timm.task import ClassificationEvaluator
from torch import nn

from .data import Batches, Preprocess
from .distributed import World


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, preprocess: Preprocess, autocast: torch.autocast, world: World
) -> dict[str, float | int]:
    """Run the model over this process's share and sum over all processes.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes); put into evaluation mode.

    Returns:
        ``loss`` (cross-entropy, mean over images), ``top1`` and ``top5`` in percent, ``images`` counted.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=world.device, max_samples=batches.sampler.num_valid)
    for images, targets in batches:
        inputs, labels = preprocess(images, targets)
        with autocast:
            logits = model(inputs)
        evaluator.update(logits, labels)
    metrics = evaluator.compute(distributed=world.is_distributed)
    return {**metrics, "images": world.sum(evaluator.num_samples)}
