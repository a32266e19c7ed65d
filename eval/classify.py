"""``vicinal eval``: top-1 and top-5 accuracy of a checkpoint."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch
import tyro
from PIL import Image
from torch import nn

from .. import zoo  # noqa: F401  registers our models with timm
from ..checkpoints import write_atomically
from ..checkpoints.files import CONFIG_NAME
from ..command import parse_options
from ..errors import UserError, find_shortage, first_line
from ..outputs import check_output_file
from ..train.config import DataConfig
from ..train.data.images import IN_MEMORY, Images, Selection, open_images
from ..train.data.transforms import InputSpec, Preprocess, eval_batches
from ..train.evaluate import evaluate
from ..train.network.check import check_forward
from ..train.network.weights import check_model_folder, strict_loading
from ..train.recipe import as_plain, read_recipe
from ..train.run.folder import find_best
from ..train.run.resume import describe_changes
from ..train.run.world import World, join_world, leave_world


@dataclass(frozen=True)
class EvalArguments:
    """Measure a checkpoint, every image once: on the val images of its run, unless other data is given."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Folder of a run (its best model), or of a model (model.safetensors and config.json)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Those of the run, where the checkpoint is one's."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast."""
    json: str | None = None
    """Also write the result to this file."""


# What decides which images are measured, and how they are prepared.
_MEASURED = {"data": ("name", "val_fraction", "split_seed", "img_size", "mean", "std", "interpolation", "crop_pct")}
# Stands for "not given"; a stream, because its options are all that there are.
_NOT_GIVEN = "wds/"


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal eval``; prints one JSON object, and what is out of the ordinary to stderr."""
    arguments, of_run = parse_arguments(argv)
    if arguments.json:
        check_output_file("--json", arguments.json)
    world = join_world(arguments.device)
    try:
        result = classify(arguments, world, of_run, takes_whole=not _is_split_given(argv))
    finally:
        leave_world()
    if world.is_primary:
        text = json.dumps(result)
        print(text)
        if note := result.get("note"):
            print(f"note: {note}", file=sys.stderr)
        if arguments.json:
            write_atomically(arguments.json, lambda temporary: Path(temporary).write_text(text + "\n"))
    return 0


def parse_arguments(argv: Sequence[str]) -> tuple[EvalArguments, DataConfig | None]:
    """The command line, the run's own data below it, and that data; None where the checkpoint is no run's."""
    if {"-h", "--help"} & set(argv):
        return _parse(argv, DataConfig()), None
    first = _parse(argv, DataConfig(_NOT_GIVEN))
    of_run = read_data_of_run(first.checkpoint)
    if of_run is None:
        return _parse(argv, DataConfig()), None
    if first.data.name in (_NOT_GIVEN, of_run.name):
        return _parse(argv, of_run), of_run
    # Of other data the run knows neither where it lies nor how many classes it has.
    return _parse(argv, replace(of_run, name="digits", data_dir=None, download=False, num_classes=None)), of_run


def _parse(argv: Sequence[str], data: DataConfig) -> EvalArguments:
    default = EvalArguments(tyro.MISSING, data)
    return parse_options(EvalArguments, "vicinal eval", argv, default=default, config=(tyro.conf.OmitArgPrefixes,))


def _is_split_given(argv: Sequence[str]) -> bool:
    flags = {argument.partition("=")[0].replace("_", "-") for argument in argv}
    return bool({"--val-fraction", "--split-seed"} & flags)


def read_data_of_run(checkpoint: str) -> DataConfig | None:
    """The data of the run that a path means or lies in; None where it is no run's."""
    for folder in (Path(checkpoint), Path(checkpoint).parent):
        if (folder / "config.yaml").is_file():
            return read_recipe(folder / "config.yaml")["data"]
    return None


def classify(
    arguments: EvalArguments, world: World, of_run: DataConfig | None = None, takes_whole: bool = False
) -> dict[str, str | float | int]:
    """Load, evaluate, and return ``loss``, ``top1``, ``top5`` (percent) and ``images``, with what they belong to.

    Args:
        arguments: what to measure.
        world: the processes that share it.
        of_run: the data that the checkpoint's run trained on, if it is known.
        takes_whole: measure all of other data that has no val split; else a val split is cut off.
    """
    folder, note = find_model(arguments.checkpoint)
    notes = [note] if note else []
    model = load_model(folder).to(world.device)
    is_own = of_run is not None and arguments.data.name == of_run.name
    images, part = choose_images(arguments.data, takes_whole and not is_own)
    if of_run is not None:
        was, now = ({"data": as_plain(asdict(data))} for data in (of_run, arguments.data))
        if changes := describe_changes(was, now, _MEASURED):
            notes.append(f"not measured as the run did: {', '.join(changes)}")
    images, missing = match_classes(model, images, folder)
    if missing:
        notes.append(
            f"{len(missing)} of {model.num_classes} classes have no folder in the data: {', '.join(missing[:5])}"
        )
    spec = InputSpec.resolve(arguments.data, model.pretrained_cfg)
    check_forward(model, spec, model.num_classes)
    preprocess = Preprocess(spec, world.device, model.num_classes)
    dtype = getattr(torch, arguments.precision)
    autocast = torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32)
    metrics = evaluate(model, eval_batches(images, arguments.data, spec, world), preprocess, autocast, world)
    result = {"checkpoint": str(folder), "data": arguments.data.name, "part": part, **metrics}
    return {**result, "note": "; ".join(notes)} if notes else result


def choose_images(data: DataConfig, takes_whole: bool) -> tuple[Images, str]:
    """The images to measure, and in words which of the data they are.

    Args:
        data: the data set.
        takes_whole: measure all of a folder that has no val split, such as one of test images only.
    """
    train, val = open_images(data)
    is_cut = isinstance(train, Selection) and isinstance(val, Selection) and train.images is val.images
    if not is_cut:
        return val, "val split of the data"
    if takes_whole and data.name not in IN_MEMORY:
        return val.images, "all of it"
    return val, f"{data.val_fraction:g} of each class, by seed {data.split_seed}"


def find_model(path: str) -> tuple[Path, str | None]:
    """The model folder that a path means, itself or the best model of a run, and what to say about the choice."""
    if (Path(path) / CONFIG_NAME).is_file():
        return Path(path), None
    found, note = find_best(Path(path))
    if found is not None:
        return found, note
    if not Path(path).exists():
        raise UserError(f"checkpoint {path}: no such folder")
    raise UserError(f"checkpoint {path}: expected a folder with config.json and model.safetensors, or a run with best/")


def load_model(folder: Path) -> nn.Module:
    """Rebuild a saved model, weights included, in evaluation mode."""
    whose = f"checkpoint {folder}"
    check_model_folder(folder, f"{whose}: cannot be loaded")
    try:
        with strict_loading(whose, complete=True):
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # timm raises whatever its JSON, safetensors and state dict readers do
        if isinstance(error, UserError) or find_shortage(error):
            raise
        raise UserError(f"checkpoint {folder}: cannot be loaded: {first_line(error)}") from error
    return model.eval()


def match_classes(model: nn.Module, images: Images, folder: Path) -> tuple[Images, list[str]]:
    """The images with the model's numbers for their classes, by name, and the classes that the data lacks.

    Raises:
        UserError: the data has a class that the model does not know, or another number of classes without names.
    """
    names, given = list(model.pretrained_cfg.get("label_names") or ()), [str(name) for name in images.classes]
    if names == given and len(names) == model.num_classes:
        return images, []
    if not names:
        if model.num_classes != len(given):
            raise UserError(f"checkpoint {folder} has {model.num_classes} classes, the data {len(given)}: see --data")
        return images, []
    if len(names) != model.num_classes or len(set(names)) != len(names):
        raise UserError(f"checkpoint {folder}: config.json has {len(set(names))} names for {model.num_classes} classes")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise UserError(
            f"checkpoint {folder} has {len(names)} classes, the data {len(given)}, of which it does not know "
            f"{unknown[0]!r}: it was trained on {names[0]}..{names[-1]}; see --data"
        )
    return Renumbered(images, [names.index(name) for name in given], names), [n for n in names if n not in given]


class Renumbered:
    """Images of another source under other numbers of their classes.

    Args:
        images: the source.
        numbers: by its own numbers.
        classes: names by the new ones.
    """

    def __init__(self, images: Images, numbers: Sequence[int], classes: Sequence[str]):
        self.images, self.numbers, self.classes = images, numbers, classes
        self.targets = _Targets(images.targets, numbers)

    def load(self, index: int) -> Image.Image:
        return self.images.load(index)


class _Targets(Sequence):
    """Read when they are asked for, as those of a stream are."""

    def __init__(self, targets: Sequence[int], numbers: Sequence[int]):
        self.targets, self.numbers = targets, numbers

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> int:
        return self.numbers[self.targets[index]]
