"""What a run does besides MMEngine's own: seeding by counters, and a line on the terminal now and then."""

from collections.abc import Callable
from typing import Any

from mmengine.dist import get_rank, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..run.randomness import seed_all, stream_seed

_FIGURES = ("mAP", "mAP_50", "mIoU", "mAcc", "aAcc")


class Begin(Hook):
    """Calls a function once all is built and the weights are drawn, before the first iteration.

    Args:
        begin: the function.

    Attributes:
        is_done: whether it was called.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin, self.is_done = begin, False

    def before_run(self, runner: Runner) -> None:
        self.begin()
        self.is_done = True


class CountedSeeds(Hook):
    """Seeds every step by (seed, iteration, rank), so that a resumed run draws what the uninterrupted one drew.

    What changes the images is seeded where they are loaded: see ``seeding``.

    Args:
        seed: of the run.
    """

    priority = "LOWEST"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_all(stream_seed("step", self.seed, runner.iter, get_rank()))


class Progress(Hook):
    """Prints one line every so many iterations, and one after each validation, on the primary process.

    Args:
        interval: iterations between two lines.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int) -> None:
        self.interval = interval

    @master_only
    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.every_n_train_iters(runner, self.interval) or runner.iter + 1 == runner.max_iters:
            seen = runner.message_hub.log_scalars
            loss, seconds = (seen[f"train/{name}"].mean(self.interval) for name in ("loss", "time"))
            lr = runner.optim_wrapper.get_lr()["lr"][0]
            done = f"iteration {runner.iter + 1}/{runner.max_iters}"
            print(f"{done}  loss {loss:.4f}  lr {lr:.2e}  {seconds:.2f} s each", flush=True)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        print(f"validation: {describe_metrics(metrics or {})}", flush=True)


def describe_metrics(metrics: dict[str, float]) -> str:
    """The overall figures of an evaluator: average precisions, or mean IoU and accuracy."""
    shown = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.endswith(_FIGURES)}
    return "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
