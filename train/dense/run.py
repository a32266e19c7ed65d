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
from mmengine.runner import Runner, find_latest_checkpoint

from ...checkpoints import save, write_atomically
from ...zoo.mmlab.backbone import VicinalBackbone, is_weight_file
from ...zoo.mmlab.weights import ATOMIC_BACKEND, guard, read_checkpoint
from ..distributed import World, join_world, leave_world
from ..errors import UserError, first_line
from .configs import prepare, walk
from .hooks import CountedSeeds, Progress
from .options import DenseTrain
from .seeding import seed_images

CONFIG_FILE, WEIGHTS_FILE = "config.py", "model.safetensors"


def train(task: str, options: DenseTrain) -> int:
    """Run a training; its folder holds config.py, MMEngine's checkpoints and logs, and model.safetensors at the end.

    Raises:
        UserError: an option, file or folder that cannot be used.
    """
    cfg = prepare(task, options)
    folder = Path(cfg.work_dir)
    set_resume(cfg, folder, options.run.resume)
    check_backbone_weights(cfg)
    if options.run.threads:
        torch.set_num_threads(options.run.threads)
    world = join_world("auto")
    try:
        runner = build_runner(seed_images(cfg, options.run.seed), world)
        runner.register_hook(CountedSeeds(options.run.seed))
        runner.register_hook(Progress(cfg.default_hooks.logger.interval))
        if world.is_primary:
            write_atomically(folder / CONFIG_FILE, lambda path: Path(path).write_text(cfg.pretty_text, "utf-8"))
        runner.train()
        if world.is_primary:
            network = getattr(runner.model, "module", runner.model)
            save(folder / WEIGHTS_FILE, network.state_dict())
            print(f"weights: {folder / WEIGHTS_FILE}")
    finally:
        leave_world()
    return 0


def set_resume(cfg: Config, folder: Path, resume: str | None) -> None:
    """Say where the run goes on from; a folder that is not empty needs ``--resume``."""
    if resume is None:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: --resume auto goes on from it, or give another --output")
        return
    checkpoint = find_latest_checkpoint(str(folder)) if resume == "auto" else resume
    if checkpoint is None:
        return
    check_checkpoint(checkpoint)
    cfg.resume, cfg.load_from = True, checkpoint


def check_checkpoint(path: str) -> None:
    """Refuse a checkpoint that cannot be read safely before anything is built."""
    try:
        read_checkpoint(path)
    except ValueError as error:
        raise UserError(first_line(error)) from error


def check_backbone_weights(cfg: Config) -> None:
    """Load a weight file once before anything else is built, so that a wrong one is an error of one line."""
    backbone = cfg.model.backbone
    if not is_weight_file(backbone.get("pretrained", False)):
        return
    try:
        VicinalBackbone(**{key: value for key, value in backbone.items() if key != "type"}).init_weights()
    except ValueError as error:
        raise UserError(f"--backbone-weights {backbone.pretrained}: {first_line(error)}") from error


def build_runner(cfg: Config, world: World) -> Runner:
    """MMEngine's runner for the processes of this run, with checkpoints that are read safely and written whole."""
    guard()
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
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{cfg.filename}: {first_line(error)}") from error


def replace_sync_bn(cfg: Config) -> None:
    """Plain batch norm for the heads: torch has no synchronised one on the CPU."""
    if cfg.model.backbone.get("sync_bn"):
        raise UserError("--sync-bn needs CUDA: torch synchronises no batch norm on the CPU")
    for node in walk(cfg.model):
        if node.get("type") == "SyncBN":
            node.type = "BN"


def build_model(cfg: Config) -> tuple[torch.nn.Module, Any, Compose]:
    """The network in evaluation mode, the validation data, and the transform for files that are not among them."""
    guard()
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
