"""What to look at before a long run; nothing here writes into the folder of the run.

``--dry-run`` builds everything and makes one update; ``--overfit-batch`` learns one batch by heart.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints import write_atomically
from ..errors import RunStopped
from .build import Components, build_components, resolve_precision
from .config import AugmentationConfig, TrainConfig
from .loop import default_output, prepare_process
from .network.probe import set_training_mode
from .run.screen import peak_memory
from .run.world import World
from .update import Updater, groups_of

_CHART = (12, 64)
_BLOCKS = " ▁▂▃▄▅▆▇█"


def dry_run(config: TrainConfig, world: World) -> None:
    """Build everything, make one update, and print shapes, size, cost, memory and the schedule.

    The schedule is also drawn into ``OUTPUT.schedule.png``, where matplotlib is installed.
    """
    prepare_process(config, world)
    parts = build_components(config, world)
    updater = Updater(config, world, parts.state, parts.preprocess)
    parts.batches.sampler.begin(0)
    macs = count_macs(parts.state.model, parts.spec.img_size, world) if config.run.parallel == "ddp" else None
    set_training_mode(parts.state.task.get_trainable_module())
    started = time.perf_counter()
    group = next(groups_of(parts.batches, config.optimizer.accumulation))
    loaded = time.perf_counter()
    parts.scheduler.step_update(0)
    report = updater.run(group, (0, 0))
    seconds = time.perf_counter() - loaded
    if not world.is_primary:
        return
    images, targets = parts.preprocess(*group[0])
    lines = {
        "model": f"{config.model.name}, {_count(parts.state.model):,} parameters",
        "cost": f"{macs / 1e9:.3f} G multiply-accumulates per image" if macs is not None else "not counted on shards",
        "images": f"{parts.batches.sampler.num_images:,} training, {parts.val_batches.sampler.num_images:,} val, "
        f"{parts.state.model.num_classes} classes",
        "input": f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')} on {images.device}; "
        f"targets {tuple(targets.shape)}",
        "update": f"{config.data.batch_size} images x {world.size} processes x {config.optimizer.accumulation} = "
        f"{parts.batches.sampler.width * config.optimizer.accumulation}; {parts.updates_per_epoch:,} per epoch",
        "precision": resolve_precision(config.run, world.device),
        "optimizer": f"{config.optimizer.optimizer}, {len(parts.state.optimizer.param_groups)} groups of parameters",
        "first update": f"loss {report.loss:.4f} in {seconds:.2f} s, after {loaded - started:.2f} s of loading",
        "memory": f"{peak_memory(world.device) / 2**30:.2f} GiB at most",
    }
    for name, text in lines.items():
        print(f"{name:<13}{text}")
    _show_schedule(config, parts)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, img_size: tuple[int, int], world: World) -> int:
    """Multiply-accumulates of one image in matrix products, convolutions and attention."""
    counter = FlopCounterMode(display=False)
    model.eval()
    with counter:
        model(torch.zeros(1, 3, *img_size, device=world.device))
    return counter.get_total_flops() // 2


def learning_rates(config: TrainConfig, parts: Components, points: int) -> list[float]:
    """The largest learning rate at evenly spaced updates from the first to the last."""
    total = config.schedule.epochs * parts.updates_per_epoch
    rates = []
    for point in range(points):
        parts.scheduler.step_update(round(point * (total - 1) / max(points - 1, 1)))
        rates.append(max(group["lr"] for group in parts.state.optimizer.param_groups))
    return rates


def _show_schedule(config: TrainConfig, parts: Components) -> None:
    height, width = _CHART
    rates = learning_rates(config, parts, width)
    print(f"\nlearning rate over {config.schedule.epochs} epochs: {rates[0]:.2e}, {max(rates):.2e}, {rates[-1]:.2e}")
    for line in draw_bars(rates, height):
        print(line)
    output = Path(config.run.output or default_output(config))
    path = output.with_name(output.name + ".schedule.png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    points = learning_rates(config, parts, 1000)
    figure = Figure(figsize=(7, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([config.schedule.epochs * point / (len(points) - 1) for point in range(len(points))], points)
    axes.set(xlabel="epoch", ylabel="learning rate", title=f"{config.model.name}: {config.schedule.schedule}")
    axes.grid(color="#e6e9ed")
    print(f"picture: {write_atomically(path, lambda temporary: figure.savefig(temporary, format='png'))}")


def draw_bars(values: list[float], height: int) -> Iterator[str]:
    """Lines of a bar chart from zero, highest first, eighths of a line as block characters."""
    scale = height * 8 / (max(values) or 1)
    levels = [math.ceil(value * scale) for value in values]
    for row in reversed(range(height)):
        yield "".join(_BLOCKS[min(max(level - row * 8, 0), 8)] for level in levels).rstrip()


def overfit_batch(config: TrainConfig, world: World, updates: int) -> None:
    """Train on the first batch alone, unchanged and at the peak learning rate, and say how well it is learnt.

    Raises:
        RunStopped: less than nine tenths of the batch are recognised afterwards.
    """
    still = AugmentationConfig(crop="none", hflip=0.0)
    config = replace(config, augmentation=still, optimizer=replace(config.optimizer, accumulation=1))
    prepare_process(config, world)
    parts = build_components(config, world)
    updater = Updater(config, world, parts.state, parts.preprocess)
    parts.batches.sampler.begin(0)
    batch = next(iter(parts.batches))
    set_training_mode(parts.state.task.get_trainable_module())
    losses = [updater.run([batch], (0, 0)).loss for _ in range(updates)]
    accuracy = _accuracy(parts, batch)
    line = (
        f"one batch of {len(batch[0])} images, {updates} updates: loss {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"{accuracy:.1f} % recognised"
    )
    if accuracy < 90:
        raise RunStopped(f"{line}: the network does not learn it; try more updates or another --lr")
    if world.is_primary:
        print(line)


@torch.no_grad()
def _accuracy(parts: Components, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    model = parts.state.task.get_eval_model().eval()
    images, targets = parts.val_preprocess(*batch)
    return 100 * int((model(images).argmax(1) == targets).sum()) / len(targets)
