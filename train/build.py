"""Everything that a run computes with, built from its configuration: network, task, optimizer, schedule and batches.

Every name is checked before any work is done, and nothing is written.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TokenDistillationTask, TrainingTask
from torch import nn

from ..errors import UserError, find_shortage, first_line, nearest
from .config import ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from .data.images import open_images
from .data.loader import Batches, UnreadableCounter
from .data.transforms import InputSpec, Preprocess, check_augmentation, eval_batches, train_batches
from .network.check import check_forward
from .network.create import build_model, create_model
from .network.weights import describe_classes
from .rates import scale_rates
from .run.fsdp import ShardedTask, is_whole_on_meta
from .run.randomness import seed_all, stream_seed
from .run.state import TrainState
from .run.world import World


def build_models(config: TrainConfig, num_classes: int, world: World) -> tuple[nn.Module, nn.Module | None]:
    """The network to train and, where that is only a plan on the meta device, the first process's complete one.

    To shard a network without room for all of it in each process, only the first one builds it, on the CPU. A network
    that cannot be built on the meta device is built completely by each.
    """
    if config.run.parallel == "ddp":
        return _prepare(build_model(config.model, config.data.img_size, num_classes), config.run, world), None
    complete = build_model(config.model, config.data.img_size, num_classes) if world.is_primary else None
    plan = replace(config.model, pretrained=False, weights=None)
    try:
        with torch.device("meta"):
            model = build_model(plan, config.data.img_size, num_classes)
        is_complete = is_whole_on_meta(model)
    except (UserError, NotImplementedError):
        is_complete = False
    if is_complete:
        model.weights_note = getattr(complete, "weights_note", None)
        return _prepare(model, config.run, world), complete
    seed_all(stream_seed("weights", config.run.seed))
    return _prepare(build_model(config.model, config.data.img_size, num_classes), config.run, world), None


def _prepare(model: nn.Module, config: RunConfig, world: World) -> nn.Module:
    if config.sync_bn:
        if world.device.type != "cuda":
            raise UserError(f"--sync-bn: torch has SyncBatchNorm for CUDA only, not for {world.device.type}")
        model = convert_sync_batchnorm(model)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"--grad-checkpointing: {type(model).__name__} does not support it") from error
    return model


def _build_whole_task(model: nn.Module, config: TrainConfig, loss: dict[str, Any], world: World) -> TrainingTask:
    options = {"criterion_kwargs": loss, "device": world.device, "verbose": False}
    if config.model.teacher is None:
        return ClassificationTask(model, **options)
    if not getattr(model, "distilled", getattr(getattr(model, "head", None), "distilled", False)):
        raise UserError(
            f"--teacher: {config.model.name} has no second classifier to learn from it; SHViT has one with "
            "--model-kwargs distilled=true"
        )
    teacher = _build_teacher(config.model.teacher, model).to(world.device).requires_grad_(False)
    weight = config.model.teacher_weight
    weights = {"task_loss_weight": 1 - weight, "distill_loss_weight": weight}
    return TokenDistillationTask(model, teacher, distill_type="hard", **weights, **options)


def _build_teacher(name: str, student: nn.Module) -> nn.Module:
    """The teacher with its weights, classifier included: one that was drawn would teach noise."""
    wanted = ModelConfig(name=name, pretrained=True)
    teacher = create_model(wanted, None, student.num_classes, f"--teacher {name}", complete=True)
    classes, taught = (model.pretrained_cfg.get("label_names") for model in (student, teacher))
    if classes and taught and list(classes) != list(taught):
        raise UserError(f"--teacher {name}: {describe_classes(taught, classes)}; it needs those of --data, in order")
    return teacher


def build_task(model: nn.Module, source: nn.Module | None, config: TrainConfig, world: World) -> TrainingTask:
    """Model and loss as a timm task on the device, with average, compilation and DDP or FSDP2 as configured."""
    run = config.run
    soft = config.augmentation.mixes
    # Mixup smooths the targets itself, when it makes them soft.
    loss = {"soft_targets": True} if soft else {"smoothing": config.optimizer.label_smoothing}
    if config.optimizer.loss == "bce":
        loss |= {"loss_type": "bce", "bce_target_thresh": config.optimizer.bce_threshold}
    if run.parallel == "fsdp":
        if not next(model.parameters()).is_meta:
            model.to(world.device)
        task = ShardedTask(model, source, world, criterion_kwargs=loss)
    else:
        model.to(world.device, memory_format=memory_format(run))
        task = _build_whole_task(model, config, loss, world)
    if run.ema_decay is not None:
        task.setup_ema(decay=run.ema_decay, use_warmup=run.ema_warmup)
    if run.compile:
        task.compile()
    if world.is_distributed or run.parallel == "fsdp":
        task.prepare_distributed(device_ids=[world.local_rank] if world.device.type == "cuda" else None)
    return task


def memory_format(config: RunConfig) -> torch.memory_format:
    """The layout of images, and of convolution weights except under FSDP, which takes contiguous ones only."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters, grouped by weight decay, layer and the model's own factors."""
    if config.optimizer not in list_optimizers():
        hint = nearest(config.optimizer, list_optimizers()) or "timm.optim.list_optimizers() lists them"
        raise UserError(f"--optimizer {config.optimizer}: no such optimizer; {hint}")
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **config.optimizer_kwargs,
        )
    except Exception as error:  # an optimizer raises whatever its options or a missing package make it
        if find_shortage(error):
            raise
        raise UserError(f"--optimizer {config.optimizer}: {first_line(error)}; see --optimizer-kwargs") from error
    _scale_learning_rates(optimizer, model)
    return optimizer


def _scale_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give the parameters that ``model.learning_rate_scales`` names groups of their own.

    timm's schedulers multiply the learning rate by a group's ``lr_scale``, as they do for layer decay.
    """
    for name, scale in getattr(model, "learning_rate_scales", dict)().items():
        parameter = model.get_parameter(name)
        if not parameter.requires_grad:
            continue
        group = next(group for group in optimizer.param_groups if any(other is parameter for other in group["params"]))
        group["params"] = [other for other in group["params"] if other is not parameter]
        optimizer.add_param_group({**group, "params": [parameter], "lr_scale": scale * group.get("lr_scale", 1.0)})


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Scheduler:
    """The learning rate as a function of the number of updates done; it holds no state of its own."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # Polynomial decay of power 1 is linear.
        sched="poly" if config.schedule == "linear" else config.schedule,
        decay_rate=1.0,
        num_epochs=config.epochs - config.cooldown_epochs,
        cooldown_epochs=config.cooldown_epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The autocast context of the configured precision; does nothing for float32."""
    dtype = getattr(torch, resolve_precision(config, device))
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def resolve_precision(config: RunConfig, device: torch.device) -> str:
    """The precision meant by ``auto``, or the one given."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device.type == "cuda" else "float32"


def record_input(model: nn.Module, spec: InputSpec, classes: list[str]) -> None:
    """Note on the model how its images are prepared and its classes named; a saved model carries both."""
    model.pretrained_cfg.update(
        **spec.as_pretrained_cfg(), num_classes=len(classes), label_names=list(classes), test_input_size=None
    )


@dataclass(frozen=True)
class Components:
    """The parts of a run.

    Attributes:
        spec: the input that the network takes.
        batches, val_batches: this process's part of the training and of the val images.
        preprocess, val_preprocess: their last steps, on the device.
        state: what the run changes.
        scheduler: learning rate by update.
        updates_per_epoch: of a whole epoch on these processes.
        unreadable: images that could not be read.
    """

    spec: InputSpec
    batches: Batches
    val_batches: Batches
    preprocess: Preprocess
    val_preprocess: Preprocess
    state: TrainState
    scheduler: Scheduler
    updates_per_epoch: int
    unreadable: UnreadableCounter


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
    unreadable = UnreadableCounter(config.data.max_unreadable)
    batches = train_batches(train_images, config.data, config.augmentation, spec, config.run.seed, world, unreadable)
    layout, smoothing = memory_format(config.run), config.optimizer.label_smoothing
    task = build_task(model, source, config, world)
    optimizer = build_optimizer(model, config.optimizer)
    is_scaled = resolve_precision(config.run, world.device) == "float16"
    state = TrainState(task, optimizer, torch.amp.GradScaler(world.device.type) if is_scaled else None)
    updates_per_epoch = math.ceil(batches.sampler.per_epoch / config.optimizer.accumulation)
    return Components(
        spec=spec,
        batches=batches,
        val_batches=eval_batches(val_images, config.data, spec, world, unreadable),
        preprocess=Preprocess(spec, world.device, num_classes, smoothing, config.augmentation, layout),
        val_preprocess=Preprocess(spec, world.device, num_classes, memory_format=layout),
        state=state,
        scheduler=build_scheduler(optimizer, config.schedule, updates_per_epoch),
        updates_per_epoch=updates_per_epoch,
        unreadable=unreadable,
    )
