"""Runs through MMEngine's runner, and models built from a config alone."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from timm.models import get_pretrained_cfg

from ...checkpoints import save
from ...errors import UserError, find_shortage, first_line
from ...outputs import check_output_folder
from ...zoo.mmlab.backbone import VicinalBackbone, is_weight_file
from ...zoo.mmlab.weights import ATOMIC_BACKEND, guard, load_starting_weights
from ..run.world import World, join_world, leave_world
from .check import adapt_config, check_data
from .configs import MEASURING, TRAINING, prepare, walk
from .hooks import Begin, CountedSeeds, Progress
from .options import DenseTrain
from .record import write_record
from .resume import compare_with_checkpoint, find_checkpoint, read_resumable
from .schedule import count_iterations, fit_warmup
from .seeding import seed_images

WEIGHTS_FILE = "model.safetensors"


def train(task: str, options: DenseTrain) -> int:
    """Run a training; its folder holds config.py, MMEngine's checkpoints and logs, and model.safetensors at the end.

    Raises:
        UserError: an option, file or folder that cannot be used.
    """
    guard()
    cfg = prepare(task, options)
    folder = check_output_folder("--output", cfg.work_dir)
    checkpoint = find_checkpoint(folder, options.run.resume)
    notes = compare_with_checkpoint(cfg, read_resumable(checkpoint), checkpoint) if checkpoint else []
    check_starting_weights(cfg)
    findings = check_data(cfg, task, TRAINING + MEASURING)
    check_backbone_weights(cfg)
    if options.run.threads:
        torch.set_num_threads(options.run.threads)
    world = join_world("auto")
    try:
        iterations = count_iterations(cfg, findings.images.get(TRAINING[0]), world.size)
        notes += [*findings.notes, *fit_warmup(cfg, iterations, options.run.set)]
        if world.is_primary:
            print("".join(f"note: {note}\n" for note in notes), end="", flush=True)
        runner = build_runner(seed_images(_resumed(adapt_config(cfg, task), checkpoint), options.run.seed), world)
        _run(runner, cfg, folder, None if checkpoint else cfg.get("load_from"), options.run.seed)
        if world.is_primary:
            network = getattr(runner.model, "module", runner.model)
            save(folder / WEIGHTS_FILE, network.state_dict())
            print(f"weights: {folder / WEIGHTS_FILE}")
    finally:
        leave_world()
    return 0


def _resumed(cfg: Config, checkpoint: Path | None) -> Config:
    cfg.resume, cfg.load_from = checkpoint is not None, str(checkpoint) if checkpoint else None
    return cfg


def _run(runner: Runner, cfg: Config, folder: Path, load_from: str | None, seed: int) -> None:
    """Train; what fails before the first iteration is the config's fault, and said in a line."""

    def begin() -> None:
        if load_from:
            _start_from(runner, load_from)
        if runner.rank == 0:
            write_record(cfg, folder)

    first = Begin(begin)
    for hook in (first, CountedSeeds(seed), Progress(cfg.default_hooks.logger.interval)):
        runner.register_hook(hook)
    try:
        runner.train()
    except UserError as error:
        raise UserError(_without_worker(str(error))) from error
    except Exception as error:
        if first.is_done or find_shortage(error):
            raise
        raise UserError(f"{cfg.filename}: {type(error).__name__}: {first_line(error)}") from error


def _start_from(runner: Runner, path: str) -> None:
    try:
        reshaped = load_starting_weights(getattr(runner.model, "module", runner.model), path)
    except ValueError as error:
        raise UserError(f"load_from: {first_line(error)}") from error
    if reshaped and runner.rank == 0:
        print(f"note: {path}: {len(reshaped)} entries of another shape start anew: {', '.join(reshaped[:6])}")


def _without_worker(message: str) -> str:
    """The message of an error in a loader process, without that process's traceback."""
    lines = message.strip().splitlines()
    return lines[-1].partition(": ")[2] if any(line.startswith("Original Traceback") for line in lines) else message


def check_starting_weights(cfg: Config) -> None:
    """Read the file of ``load_from`` before anything is built."""
    if cfg.get("load_from"):
        try:
            CheckpointLoader.load_checkpoint(cfg.load_from, map_location="cpu")
        except (ValueError, OSError) as error:
            raise UserError(f"load_from: {first_line(error)}") from error


def check_backbone_weights(cfg: Config) -> None:
    """Load the backbone's weights once before anything else is built, so that wrong ones are an error of one line."""
    backbone = cfg.model.backbone
    weights = backbone.get("pretrained", False)
    if not weights or backbone.type != "VicinalBackbone":
        return
    shown = "released" if weights is True else weights
    if not is_weight_file(weights):
        _check_released(backbone.model, weights)
    try:
        VicinalBackbone(**{key: value for key, value in backbone.items() if key != "type"}).init_weights()
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--backbone-weights {shown}: {first_line(error)}") from error


def _check_released(model: str, tag: bool | str) -> None:
    """Refuse released weights that timm has no address of."""
    try:
        released = get_pretrained_cfg(model if tag is True else f"{model}.{tag}")
    except RuntimeError as error:
        raise UserError(f"--backbone-weights {tag}: no such file, and {first_line(error)}") from error
    if released is None or not released.has_weights:
        raise UserError(
            f"--backbone-weights {'released' if tag is True else tag}: {model} has none; take none, or a file or folder"
        )


def build_runner(cfg: Config, world: World) -> Runner:
    """MMEngine's runner for the processes of this run, with checkpoints that are read safely and written whole."""
    cfg.default_hooks.checkpoint.backend_args = {"backend": ATOMIC_BACKEND}
    if world.is_distributed:
        cfg.launcher = "pytorch"
        # MMEngine takes the process group that join_world made
        cfg.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "device_ids": [world.device.index] if world.device.type == "cuda" else None,
            "broadcast_buffers": False,
        }
    if world.device.type == "cpu":
        replace_sync_bn(cfg)
    # MMEngine would print the config and every initialised parameter; Progress says what matters
    cfg.log_level = "WARNING"
    try:
        return Runner.from_cfg(cfg)
    # Whatever a component says of the arguments that the config has for it.
    except Exception as error:
        if find_shortage(error):
            raise
        raise UserError(f"{cfg.filename or cfg.work_dir}: {type(error).__name__}: {first_line(error)}") from error


def replace_sync_bn(cfg: Config) -> None:
    """Plain batch norm for the heads: torch has no synchronised one on the CPU."""
    if cfg.model.backbone.get("sync_bn"):
        raise UserError("--sync-bn needs CUDA: torch synchronises no batch norm on the CPU")
    for node in walk(cfg.model):
        if node.get("type") == "SyncBN":
            node.type = "BN"


def build_model(cfg: Config) -> tuple[torch.nn.Module, Any, Compose]:
    """The network in evaluation mode, the validation data, and the transform for files that are not among them."""
    replace_sync_bn(cfg)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    steps = [step for step in cfg.val_dataloader.dataset.pipeline if step.type != "LoadAnnotations"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MODELS.build(cfg.model).to(device).eval(), dataset, Compose(steps)


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Keep what libraries print, such as COCO's tables, from standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
