"""``vicinal detect`` and ``vicinal segment``: ``test`` measures a checkpoint, ``show`` draws what it predicts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..checkpoints import write_atomically
from ..train.command import parse_options
from ..train.dense.options import DenseData, DenseTrain, require_packages
from ..train.errors import UserError, first_line

CONFIG_FILE, WEIGHTS_FILE = "config.py", "model.safetensors"


@dataclass(frozen=True)
class DenseTest:
    """Measure a run, or a checkpoint with its config, on the validation data."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run; or a config (file or name), with --checkpoint."""
    checkpoint: str | None = None
    """Weights: .pth or .safetensors, ours or as published by the backbone's authors; the run's own if not given."""
    data: DenseData = field(default_factory=DenseData)
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    json: str | None = None
    """Also write the result to this file."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class DenseShow:
    """Draw predictions beside the images, and beside the annotations where there are some."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run; or a config (file or name), with --checkpoint."""
    checkpoint: str | None = None
    """Weights: .pth or .safetensors, ours or as published by the backbone's authors; the run's own if not given."""
    files: list[str] = field(default_factory=list)
    """Images to look at; the first of the validation data if not given."""
    count: int = 6
    """How many images of the validation data."""
    score: float = 0.5
    """Least score of a drawn detection."""
    output: str = "predictions.png"
    """Picture to write."""
    data: DenseData = field(default_factory=DenseData)
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"--count {self.count}: must be at least 1")


def main(task: str, action: str, argv: Sequence[str]) -> int:
    """Run one of both; ``test`` prints one JSON object, ``show`` the picture's path."""
    kind = {"test": DenseTest, "show": DenseShow}[action]
    arguments = parse_options(kind, f"vicinal {task} {action}", argv, config=(tyro.conf.OmitArgPrefixes,))
    require_packages()
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    if action == "show":
        print(f"picture: {show(task, arguments)}")
        return 0
    text = json.dumps(test(task, arguments))
    print(text)
    if arguments.json:
        write_atomically(arguments.json, lambda path: Path(path).write_text(text + "\n"))
    return 0


def test(task: str, arguments: DenseTest) -> dict[str, float]:
    """The evaluator's figures of a checkpoint: average precisions from 0 to 1, or IoU in percent."""
    from ..train.dense.run import build_runner, quiet_output
    from ..train.distributed import join_world, leave_world

    cfg, checkpoint = find_model(task, arguments)
    world = join_world("auto")
    try:
        with quiet_output():
            runner = build_runner(cfg, world)
            load_weights(runner.model, checkpoint)
            metrics = runner.test()
    finally:
        leave_world()
    return {key: float(value) for key, value in metrics.items()}


def show(task: str, arguments: DenseShow) -> Path:
    """Draw the predictions of a checkpoint; returns the picture's path."""
    from ..train.dense.run import build_model, quiet_output
    from .dense_pictures import draw_predictions

    cfg, checkpoint = find_model(task, arguments)
    with quiet_output():
        model, dataset, transform = build_model(cfg)
        load_weights(model, checkpoint)
        samples: Any = list(arguments.files) or range(min(arguments.count, len(dataset)))
        for file in arguments.files:
            if not Path(file).is_file():
                raise UserError(f"--files {file}: no such file")
        packed = [dataset[s] if isinstance(s, int) else transform({"img_path": s, "img_id": 0}) for s in samples]
        predicted = [model.test_step({key: [value] for key, value in item.items()})[0] for item in packed]
    picture = draw_predictions(predicted, dataset.metainfo["classes"], arguments.score)
    return write_atomically(arguments.output, lambda path: picture.save(path, "PNG"))


def find_model(task: str, arguments: DenseTest | DenseShow) -> tuple[Any, Path]:
    """The config, pointed to the data, and the checkpoint of a run's folder or of a config with its weights."""
    from ..train.dense.configs import prepare

    run = Path(arguments.run)
    is_run = run.is_dir()
    if is_run and not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} has no {CONFIG_FILE}: give the folder of a run, or a config and --checkpoint")
    checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else run / WEIGHTS_FILE
    if not is_run and not arguments.checkpoint:
        raise UserError(f"{run} is a config: give its weights by --checkpoint")
    config = str(run / CONFIG_FILE) if is_run else arguments.run
    cfg = prepare(task, DenseTrain(config=config, data=arguments.data))
    if is_run:
        cfg.work_dir = str(run / "test")
    # the checkpoint holds all weights
    cfg.model.backbone.pretrained = False
    return cfg, checkpoint


def load_weights(model: Any, checkpoint: Path) -> None:
    """Load a checkpoint strictly; what does not fit is the user's to know."""
    from ..zoo.mmlab.weights import load_detector

    try:
        load_detector(getattr(model, "module", model), checkpoint)
    except ValueError as error:
        raise UserError(first_line(error)) from error
