"""Everything that a run computes with, built from its configuration; nothing is written."""

import math
from dataclasses import dataclass

import torch
from timm.scheduler.scheduler import Scheduler

from .build import (
    build_models,
    build_optimizer,
    build_scheduler,
    build_task,
    memory_format,
    record_input,
    resolve_precision,
)
from .config import TrainConfig
from .data.images import open_images
from .data.loader import Batches, BrokenImages
from .data.transforms import InputSpec, Preprocess, check_augmentation, eval_batches, train_batches
from .rates import scale_rates
from .run.randomness import seed_all, stream_seed
from .run.state import TrainState
from .run.world import World
from .trial import check_forward


@dataclass(frozen=True)
class Components:
    """The parts of a run.

    Attributes:
        spec: the input that the network takes.
        batches, val_batches: this process's share of the training and of the held-out images.
        preprocess, val_preprocess: their last steps, on the device.
        state: what the run changes.
        scheduler: learning rate by update.
        updates_per_epoch: of a whole epoch on these processes.
        broken: images that could not be read.
    """

    spec: InputSpec
    batches: Batches
    val_batches: Batches
    preprocess: Preprocess
    val_preprocess: Preprocess
    state: TrainState
    scheduler: Scheduler
    updates_per_epoch: int
    broken: BrokenImages


def build_components(config: TrainConfig, world: World) -> Components:
    """Build the parts of a run.

    Raises:
        UserError: the model, the data or the optimizer cannot be used.
    """
    config = scale_rates(config, world.size)
    check_augmentation(config.augmentation)
    seed_all(stream_seed("weights", config.run.seed))
    train_images, val_images = open_images(config.data)
    num_classes = len(train_images.classes)
    model, source = build_models(config, num_classes, world)
    spec = InputSpec.resolve(config.data, model.pretrained_cfg)
    record_input(model, spec, train_images.classes)
    check_forward(model, spec, num_classes, config)
    broken = BrokenImages(config.data.max_broken)
    batches = train_batches(train_images, config.data, config.augmentation, spec, config.run.seed, world, broken)
    layout, smoothing = memory_format(config.run), config.optimizer.label_smoothing
    task = build_task(model, source, config, world)
    optimizer = build_optimizer(model, config.optimizer)
    is_scaled = resolve_precision(config.run, world.device) == "float16"
    state = TrainState(task, optimizer, torch.amp.GradScaler(world.device.type) if is_scaled else None)
    updates_per_epoch = math.ceil(batches.sampler.per_epoch / config.optimizer.accumulation)
    return Components(
        spec=spec,
        batches=batches,
        val_batches=eval_batches(val_images, config.data, spec, world, broken),
        preprocess=Preprocess(spec, world.device, num_classes, smoothing, config.augmentation, layout),
        val_preprocess=Preprocess(spec, world.device, num_classes, memory_format=layout),
        state=state,
        scheduler=build_scheduler(optimizer, config.schedule, updates_per_epoch),
        updates_per_epoch=updates_per_epoch,
        broken=broken,
    )
