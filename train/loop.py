"""The loop: epochs of updates, evaluation after each, checkpoints, and records of it all."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .build import autocast, build_model, build_optimizer, build_scheduler, build_task, record_input
from .config import TrainConfig
from .data import InputSpec, Preprocess, eval_batches, train_batches
from .distributed import World
from .errors import RunStopped, UserError
from .evaluate import evaluate
from .images import open_images
from .log import MetricsLog, Screen, open_screen, read_records
from .randomness import seed_all, stream_seed
from .recipe import write_recipe
from .state import RunFolder, TrainState, find_resume_point


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    top1: float
    """Held-out top-1 accuracy after the last epoch, percent."""
    best_top1: float
    best_epoch: int
    folder: RunFolder


class LossWatch:
    """Reads each loss one batch late, so that the device need not wait, and stops at one that is not finite."""

    def __init__(self):
        self.total, self.count, self.latest = 0.0, 0, math.nan
        self._pending: Tensor | None = None

    def add(self, loss: Tensor, where: str) -> None:
        """Take the loss of the batch just launched, and read the one before it."""
        self.read(where)
        self._pending = loss.detach()

    def read(self, where: str) -> float:
        """Wait for the loss taken last, and return it."""
        if self._pending is not None:
            self.latest, self._pending = float(self._pending), None
            self.total, self.count = self.total + self.latest, self.count + 1
        if self.count and not math.isfinite(self.latest):
            raise RunStopped(
                f"the loss is {self.latest} by {where}: lower --lr, set --clip-grad 1.0, or use --precision float32; "
                "the last checkpoint is from before"
            )
        return self.latest

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


class Trainer:
    """One run.

    Args:
        config: everything that decides it.
        world: the processes that share it.

    Raises:
        UserError: the model, the data, the optimizer, the output folder or the checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self.folder = RunFolder(config.run.output or default_output(config))
        resume_point = find_resume_point(config.run.resume, self.folder)
        seed_all(stream_seed("weights", config.run.seed))
        self._build()
        if resume_point is not None:
            self.state.restore(resume_point)
        self._open_folder(resume_point)

    def _build(self) -> None:
        config, world = self.config, self.world
        train_images, val_images = open_images(config.data)
        num_classes = len(train_images.classes)
        model = build_model(config.model, config.data.img_size, num_classes)
        self.spec = InputSpec.resolve(config.data, model.pretrained_cfg)
        record_input(model, self.spec, train_images.classes)
        self.batches = train_batches(train_images, config.data, config.augmentation, self.spec, config.run.seed, world)
        self.val_batches = eval_batches(val_images, config.data, self.spec, world)
        memory_format = torch.channels_last if config.run.channels_last else torch.contiguous_format
        smoothing = config.optimizer.label_smoothing
        self.preprocess = Preprocess(
            self.spec, world.device, num_classes, smoothing, config.augmentation, memory_format
        )
        self.val_preprocess = Preprocess(self.spec, world.device, num_classes, memory_format=memory_format)
        task = build_task(model, config, world)
        optimizer = build_optimizer(model, config.optimizer)
        scaler = NativeScaler(world.device.type) if config.run.precision == "float16" else None
        self.state = TrainState(task, optimizer, scaler)
        self.updates_per_epoch = math.ceil(len(self.batches) / config.optimizer.accumulation)
        self.scheduler = build_scheduler(optimizer, config.schedule, self.updates_per_epoch)

    def _open_folder(self, resume_point: Path | None) -> None:
        self.log = None
        if self.world.is_primary:
            records = self._claim_folder(resume_point)
            self.log = MetricsLog(self.folder.metrics, self.folder.table, records)
            write_recipe(self.config, self.folder.config)
        self.world.wait()

    def _claim_folder(self, resume_point: Path | None) -> list[dict]:
        if resume_point is None:
            # Under auto, a folder without a checkpoint is that of a run that ended in its first epoch.
            self.folder.claim(may_hold_files=self.config.run.resume == "auto")
            return []
        source = RunFolder(resume_point.parent)
        self.folder.claim(may_hold_files=source.path.resolve() == self.folder.path.resolve())
        return read_records(source.metrics, last_epoch=self.state.epoch)

    def fit(self) -> Outcome:
        """Train until the last epoch is done."""
        epochs, state = self.config.schedule.epochs, self.state
        screen = open_screen(self.world.is_primary, epochs)
        screen.say(self._describe())
        try:
            while state.epoch < epochs:
                self._run_epoch(screen)
        finally:
            screen.close()
        return self._outcome()

    def _describe(self) -> str:
        model, config = unwrap_model(self.state.task.get_trainable_module()), self.config
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size = "x".join(map(str, self.spec.img_size))
        train, held_out = self.batches.sampler.num_images, self.val_batches.sampler.num_images
        return (
            f"{config.model.name}: {parameters / 1e6:.2f} M parameters, {size} px; {config.data.name}: "
            f"{train} training and {held_out} held-out images, {model.num_classes} classes; "
            f"{self.world.size} x {self.world.device}"
        )

    def _run_epoch(self, screen: Screen) -> None:
        state, started = self.state, time.perf_counter()
        screen.begin(state.epoch, len(self.batches))
        train_loss = self._train_epoch(screen)
        seconds = time.perf_counter() - started
        metrics = self._evaluate()
        record = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": self._lr(),
            "train_loss": train_loss,
            **{f"val_{name}": value for name, value in metrics.items()},
            "images_per_second": len(self.batches) * self.config.data.batch_size * self.world.size / seconds,
            "seconds": seconds,
        }
        state.epoch += 1
        if self.log is not None:
            self.log.add("epoch", **record)
        self._save(metrics["top1"])
        screen.say(self._epoch_line(record))

    def _epoch_line(self, record: dict) -> str:
        return (
            f"epoch {record['epoch']:>3}/{self.config.schedule.epochs}  lr {record['lr']:.2e}  "
            f"train loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}  "
            f"top-1 {record['val_top1']:6.2f} %  {record['images_per_second']:.0f} images/s"
        )

    def _train_epoch(self, screen: Screen) -> float:
        config, state, watch = self.config, self.state, LossWatch()
        accumulation, total = config.optimizer.accumulation, len(self.batches)
        self.batches.sampler.epoch = state.epoch
        state.task.get_trainable_module().train()
        for number, (images, targets) in enumerate(self.batches):
            group_start = number - number % accumulation
            # The last group of an epoch may be smaller; its mean is over the batches that it has.
            group_size = min(accumulation, total - group_start)
            completes = number == group_start + group_size - 1
            if number == group_start:
                self.scheduler.step_update(state.step)
            seed_all(stream_seed("batch", config.run.seed, state.epoch, number, self.world.rank))
            watch.add(self._accumulate(images, targets, group_size, completes), self._where())
            if completes:
                self._after_update(watch)
            screen.advance(watch.latest)
        watch.read(self._where())
        return self.world.mean(watch.mean)

    def _where(self) -> str:
        return f"epoch {self.state.epoch + 1}, update {self.state.step}"

    def _accumulate(self, images: Tensor, targets: Tensor, group_size: int, completes: bool) -> Tensor:
        """Forward and backward of one batch, and the update if it completes its group; returns the loss."""
        task, state, config = self.state.task, self.state, self.config.optimizer
        images, targets = self.preprocess(images, targets)
        with nullcontext() if completes else task.no_sync():
            with autocast(self.config.run, self.world.device):
                loss = task(images, targets)["loss"]
            scaled = loss / group_size
            if state.scaler is not None:
                self._scaled_update(scaled, completes)
            else:
                scaled.backward()
        if completes and state.scaler is None:
            if config.clip_grad is not None:
                dispatch_clip_grad(self._clipped_parameters(), config.clip_grad, config.clip_mode)
            state.optimizer.step()
        if completes:
            state.optimizer.zero_grad()
        return loss

    def _scaled_update(self, loss: Tensor, completes: bool) -> None:
        config = self.config.optimizer
        self.state.scaler(
            loss,
            self.state.optimizer,
            clip_grad=config.clip_grad,
            clip_mode=config.clip_mode,
            parameters=self._clipped_parameters(),
            need_update=completes,
        )

    def _clipped_parameters(self) -> list[Tensor]:
        # Adaptive clipping leaves the classifier alone (Brock et al. 2021, section 4.1).
        return list(self.state.task.get_clip_parameters(exclude_head=self.config.optimizer.clip_mode == "agc"))

    def _after_update(self, watch: LossWatch) -> None:
        state = self.state
        state.step += 1
        state.task.update_ema(step=state.step)
        if self.log is not None and state.step % self.config.run.log_interval == 0:
            loss = watch.read(self._where())
            self.log.add("step", epoch=state.epoch + 1, step=state.step, lr=self._lr(), train_loss=loss)

    def _lr(self) -> float:
        """The learning rate of the last update; the largest, where layers differ."""
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    def _evaluate(self) -> dict[str, float | int]:
        task = self.state.task
        if self.world.is_distributed:
            for average in {False, task.has_ema()}:
                distribute_bn(task.get_trainable_module(ema=average), self.world.size, reduce=True)
        context = autocast(self.config.run, self.world.device)
        model = task.get_eval_model(ema=task.has_ema())
        # DDP's forward pass would synchronise buffers at every batch.
        model = model.module if isinstance(model, DistributedDataParallel) else model
        return evaluate(model, self.val_batches, self.val_preprocess, context, self.world)

    def _save(self, top1: float) -> None:
        state = self.state
        state.top1 = top1
        improved = top1 > state.best_top1
        if improved:
            state.best_top1, state.best_epoch = top1, state.epoch
        if self.world.is_primary:
            if improved:
                self.folder.replace("best", state.save_weights)
            self.folder.replace("last", state.save)
        self.world.wait()

    def _outcome(self) -> Outcome:
        state = self.state
        return Outcome(state.top1, state.best_top1, state.best_epoch, self.folder)


def default_output(config: TrainConfig) -> str:
    """runs/MODEL-DATA, of the last parts of their names."""
    return str(Path("runs") / f"{Path(config.model.name).name}-{Path(config.data.name).name}")


def train(config: TrainConfig, world: World) -> Outcome:
    """Run a configuration from its start, or from where ``run.resume`` says, to its end."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if config.run.report and world.is_primary:
        _require_matplotlib()
    return Trainer(config, world).fit()


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--report needs matplotlib: pip install 'vicinal[demo]', or leave out --report") from error
