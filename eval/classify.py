"""``vicinal eval``: top-1 and top-5 accuracy of a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch
import tyro
from torch import nn

from .. import zoo  # noqa: F401  registers our models with timm
from ..checkpoints import write_atomically
from ..train.command import parse_options
from ..train.config import DataConfig
from ..train.data import InputSpec, Preprocess, eval_batches
from ..train.distributed import World, join_world, leave_world
from ..train.errors import UserError, first_line
from ..train.evaluate import evaluate
from ..train.images import Images, open_images
from ..train.outputs import check_output_file
from ..train.trial import check_forward


@dataclass(frozen=True)
class EvalArguments:
    """Measure a checkpoint on the held-out images of a data set, every image once."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Folder of a run (its best model), or of a model (model.safetensors and config.json)."""
    data: DataConfig = field(default_factory=DataConfig)
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast."""
    json: str | None = None
    """Also write the result to this file."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal eval``; prints one JSON object."""
    arguments = parse_options(EvalArguments, "vicinal eval", argv, config=(tyro.conf.OmitArgPrefixes,))
    if arguments.json:
        check_output_file("--json", arguments.json)
    world = join_world(arguments.device)
    try:
        result = classify(arguments, world)
    finally:
        leave_world()
    if world.is_primary:
        text = json.dumps(result)
        print(text)
        if arguments.json:
            write_atomically(arguments.json, lambda temporary: Path(temporary).write_text(text + "\n"))
    return 0


def classify(arguments: EvalArguments, world: World) -> dict[str, str | float | int]:
    """Load, evaluate, and return ``loss``, ``top1``, ``top5`` (percent) and ``images``, with what they belong to."""
    folder = find_model(arguments.checkpoint)
    model = load_model(folder).to(world.device)
    _, images = open_images(arguments.data)
    check_classes(model, images, folder)
    spec = InputSpec.resolve(arguments.data, model.pretrained_cfg)
    check_forward(model, spec, model.num_classes)
    preprocess = Preprocess(spec, world.device, model.num_classes)
    dtype = getattr(torch, arguments.precision)
    autocast = torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32)
    metrics = evaluate(model, eval_batches(images, arguments.data, spec, world), preprocess, autocast, world)
    return {"checkpoint": str(folder), "data": arguments.data.name, **metrics}


def find_model(path: str) -> Path:
    """The model folder that a path means: itself, or the best (else the last) model of a run."""
    candidates = [Path(path), Path(path) / "best", Path(path) / "last"]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    if not Path(path).exists():
        raise UserError(f"checkpoint {path}: no such folder")
    raise UserError(f"checkpoint {path}: expected a folder with config.json and model.safetensors, or a run with best/")


def load_model(folder: Path) -> nn.Module:
    """Rebuild a saved model, weights included, in evaluation mode."""
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # timm raises whatever its JSON, safetensors and state dict readers do
        raise UserError(f"checkpoint {folder}: cannot be loaded: {first_line(error)}") from error
    return model.eval()


def check_classes(model: nn.Module, images: Images, folder: Path) -> None:
    """Refuse data whose classes are not those that the model was trained on."""
    names = model.pretrained_cfg.get("label_names")
    if model.num_classes != len(images.classes):
        raise UserError(
            f"checkpoint {folder} has {model.num_classes} classes, the data {len(images.classes)}: see --data"
        )
    if names and list(names) != list(images.classes):
        raise UserError(f"checkpoint {folder} was trained on classes {names[0]}..{names[-1]}, not those of --data")
