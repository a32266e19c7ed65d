"""``vicinal detect`` and ``vicinal segment``: ``test`` measures a checkpoint, ``show`` draws what it predicts."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ...checkpoints import write_atomically
from ...command import parse_options
from ...errors import UserError, first_line, nearest
from ...outputs import check_output_file
from ...train.dense.command import train_command
from ...train.dense.options import DenseData, require_packages

WEIGHTS_FILE = "model.safetensors"
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "tif": "TIFF", "tiff": "TIFF", "bmp": "BMP"}
"""Of pictures: their names in PIL, by suffix."""


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
    """Picture to write; its suffix chooses the format, such as .png or .jpg."""
    data: DenseData = field(default_factory=DenseData)
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"--count {self.count}: must be at least 1")


def detect(argv: Sequence[str]) -> int:
    """Run ``vicinal detect``; returns its exit code."""
    return main("detect", argv)


def segment(argv: Sequence[str]) -> int:
    """Run ``vicinal segment``; returns its exit code."""
    return main("segment", argv)


def main(task: str, argv: Sequence[str]) -> int:
    """Hand over to the action: ``train`` is the training room's, ``test`` and ``show`` are ours."""
    action, *rest = argv or ["--help"]
    if action == "train":
        return train_command(task, rest)
    if action in ("test", "show"):
        return measure_or_draw(task, action, rest)
    if action in ("-h", "--help"):
        print(f"usage: vicinal {task} train CONFIG | test RUN | show RUN     (each takes --help)")
        return 0
    hint = nearest(action, ("train", "test", "show"), count=1)
    raise UserError(f"unknown action {action!r}: vicinal {task} train, test or show" + (f"; {hint}" if hint else ""))


def measure_or_draw(task: str, action: str, argv: Sequence[str]) -> int:
    """``test`` prints one JSON object, ``show`` the picture's path."""
    kind = {"test": DenseTest, "show": DenseShow}[action]
    arguments = parse_options(kind, f"vicinal {task} {action}", argv, config=(tyro.conf.OmitArgPrefixes,))
    require_packages()
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    output = {"--output": arguments.output} if action == "show" else {"--json": arguments.json}
    for flag, path in output.items():
        if path is not None:
            check_output_file(flag, path, FORMATS if action == "show" else ())
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
    from ...train.dense.check import adapt_config, check_data
    from ...train.dense.record import registered_only
    from ...train.dense.run import build_runner, quiet_output
    from ...train.run.world import join_world, leave_world

    found = find_model(task, arguments)
    say_notes(check_data(found.cfg, task, ["test_dataloader"]).notes)
    world = join_world("auto")
    try:
        with quiet_output(), registered_only() if found.is_run else nullcontext():
            runner = build_runner(adapt_config(found.cfg, task), world)
            load_weights(runner.model, found.checkpoint)
            metrics = runner.test()
    finally:
        leave_world()
    return {key: float(value) for key, value in metrics.items()}


def show(task: str, arguments: DenseShow) -> Path:
    """Draw the predictions of a checkpoint; returns the picture's path."""
    from ...train.dense.check import adapt_config, check_data
    from ...train.dense.record import registered_only
    from ...train.dense.run import build_model, quiet_output
    from .pictures import draw_predictions

    for file in arguments.files:
        if not Path(file).is_file():
            raise UserError(f"--files {file}: no such file")
    found = find_model(task, arguments)
    if not arguments.files:
        say_notes(check_data(found.cfg, task, ["val_dataloader"]).notes)
    with quiet_output(), registered_only() if found.is_run else nullcontext():
        model, dataset, transform = build_model(adapt_config(found.cfg, task))
        load_weights(model, found.checkpoint)
        samples: Any = list(arguments.files) or range(min(arguments.count, len(dataset)))
        packed = [dataset[s] if isinstance(s, int) else transform({"img_path": s, "img_id": 0}) for s in samples]
        predicted = [model.test_step({key: [value] for key, value in item.items()})[0] for item in packed]
    picture = draw_predictions(predicted, dataset.metainfo["classes"], arguments.score)
    kind = FORMATS[Path(arguments.output).suffix.lower().removeprefix(".")]
    # Of PNG, TIFF and BMP, which lose nothing, PIL ignores the quality.
    return write_atomically(arguments.output, lambda path: picture.save(path, kind, quality=95))


def say_notes(notes: Sequence[str]) -> None:
    """On standard error, so that standard output is the result alone."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@dataclass(frozen=True)
class FoundModel:
    """The config, pointed to the data; the checkpoint; and whether the config was read as data from a run's folder."""

    cfg: Any
    checkpoint: Path
    is_run: bool


def find_model(task: str, arguments: DenseTest | DenseShow) -> FoundModel:
    """The model of a run's folder, or of a config and its weights.

    Raises:
        UserError: neither, or data that the model's classes do not fit.
    """
    from ...train.dense.check import COCO_DATASETS, SEGMENTATION_DATASETS, dataset_classes, find_datasets
    from ...train.dense.configs import MEASURING, read_config, set_data
    from ...train.dense.record import read_record
    from ...zoo.mmlab.weights import guard

    guard()
    run = Path(arguments.run)
    is_run = run.is_dir()
    checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else run / WEIGHTS_FILE
    if not is_run and not arguments.checkpoint:
        raise UserError(f"{run} is a config: give its weights by --checkpoint")
    cfg = read_record(run) if is_run else read_config(task, arguments.run)
    classes = None
    if is_run:
        kinds = COCO_DATASETS if task == "detect" else SEGMENTATION_DATASETS
        trained_on = next(find_datasets(cfg.train_dataloader.dataset, kinds), None)
        classes = None if trained_on is None else dataset_classes(trained_on)
    set_data(cfg, task, arguments.data, MEASURING, classes)
    cfg.work_dir = str(run / "test") if is_run else f"runs/{run.stem}"
    # the checkpoint holds all weights, and MMEngine would load others over them
    cfg.model.backbone.pretrained = False
    cfg.load_from, cfg.resume = None, False
    return FoundModel(cfg, checkpoint, is_run)


def load_weights(model: Any, checkpoint: Path) -> None:
    """Load a checkpoint strictly; what does not fit is the user's to know."""
    from ...zoo.mmlab.weights import load_detector

    try:
        load_detector(getattr(model, "module", model), checkpoint)
    except ValueError as error:
        raise UserError(first_line(error)) from error
