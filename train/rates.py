"""Learning rates by the number of images of an update; ``vicinal recipes`` prints those of all recipes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..command import check_fields, parse_options
from .config import TrainConfig
from .recipe import RECIPES, list_recipes, read_recipe


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes that come with the package, with their learning rates."""

    processes: int = 8
    """Processes (GPUs) to reckon with."""
    batch_size: int | None = None
    """Images per process and forward pass; that of each recipe if not given."""

    def __post_init__(self):
        check_fields(self, processes="[1, inf)", batch_size="[1, inf)")


def images_per_update(config: TrainConfig, processes: int) -> int:
    """Images whose gradients one update averages."""
    return config.data.batch_size * processes * config.optimizer.accumulation


def scale_rates(config: TrainConfig, processes: int) -> TrainConfig:
    """The configuration with the learning rates that it means on so many processes; it scales no further.

    Goyal et al., arXiv:1706.02677, section 2.1: the learning rate goes with the images of an update.
    """
    if config.optimizer.lr_base_size is None:
        return config
    factor = images_per_update(config, processes) / config.optimizer.lr_base_size
    schedule = config.schedule
    if schedule.scale_all:
        bounds = {"warmup_lr": schedule.warmup_lr * factor, "min_lr": schedule.min_lr * factor}
        schedule = replace(schedule, **bounds, scale_all=False)
    optimizer = replace(config.optimizer, lr=config.optimizer.lr * factor, lr_base_size=None)
    return replace(config, optimizer=optimizer, schedule=schedule)


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal recipes``; returns its exit code."""
    arguments = parse_options(RecipesArguments, "vicinal recipes", argv)
    print(f"{'recipe':<42}{'model':<30}{'epochs':>7}{'images/update':>15}{'lr':>11}{'warm-up':>11}{'lowest':>11}")
    for path in list_recipes():
        config = TrainConfig(**read_recipe(path))
        if arguments.batch_size is not None:
            config = replace(config, data=replace(config.data, batch_size=arguments.batch_size))
        scaled = scale_rates(config, arguments.processes)
        name = path.relative_to(RECIPES).as_posix().removesuffix(".yaml")
        lowest = scaled.optimizer.lr if scaled.schedule.schedule == "constant" else scaled.schedule.min_lr
        print(
            f"{name:<42}{config.model.name:<30}{config.schedule.epochs:>7}"
            f"{images_per_update(config, arguments.processes):>15}"
            f"{scaled.optimizer.lr:>11.3g}{scaled.schedule.warmup_lr:>11.3g}{lowest:>11.3g}"
        )
    return 0
