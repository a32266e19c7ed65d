"""``vicinal bench train``: what our loop costs over a bare one, and our loader beside timm's."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from ...command import check_fields, parse_options
from ...errors import UserError
from ...train.build import Components
from ...train.config import (
    AugmentationConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from ...train.data.images import FolderImages
from ...train.data.transforms import InputSpec, Preprocess, train_batches
from ...train.loop import Trainer
from ...train.run.world import World
from .measure import check_table, report, turns_of_cpu_time

CPU = torch.device("cpu")
POLICY = "rand-m9-mstd0.5-inc1"
QUARTERS = 4
JPEG_SIZE = (500, 375)
"""Width and height of the images for the loaders: the median of ImageNet."""


@dataclass(frozen=True)
class BenchOptions:
    """Measure training on the CPU: the median process CPU time of short turns that alternate."""

    model: str = "test_vit"
    """Network of the loop's benchmark, at 32 px; the smaller, the more a loop's own cost shows."""
    batch_size: int = 32
    """Images of an update, and of a loader's batch."""
    images: int = 64
    """JPEGs that each loader reads in a turn; they are made for it."""
    turns: int = 80
    """Turns of each; a quarter of them should give nearly the ratio of all."""
    csv: Path | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        check_fields(self, batch_size="[1, inf)", images="[1, inf)", turns=f"[{QUARTERS}, inf)")
        if self.images < self.batch_size:
            raise UserError(f"--images {self.images}: must be at least --batch-size {self.batch_size}")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    implementation: str
    images: str
    cpu_ms_per_image: float
    throughput_ratio: float
    """Images per second of ours over those of the other."""
    by_quarters: str
    """The same of each quarter of the turns, least and largest: how far to trust it."""


def main(argv: Sequence[str]) -> int:
    """Run ``vicinal bench train``; prints a table."""
    options = parse_options(BenchOptions, "vicinal bench train", argv)
    check_table(options.csv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*measure_loop(options, Path(folder)), *measure_loaders(options, Path(folder))]
    report(rows, options.csv)
    return 0


def measure_loop(options: BenchOptions, folder: Path) -> list[Row]:
    """An epoch of our loop, records included, against the bare steps on the same batches."""
    config = TrainConfig(
        model=ModelConfig(name=options.model),
        data=DataConfig(img_size=32, batch_size=options.batch_size, workers=0, val_fraction=0.8),
        augmentation=AugmentationConfig(crop="shift", hflip=0.0),
        schedule=ScheduleConfig(warmup_epochs=0),
        run=RunConfig(device="cpu", output=str(folder / "run")),
    )
    trainer = Trainer(config, World(CPU))
    trainer.open_screen()
    bare = Trainer(replace(config, run=replace(config.run, output=str(folder / "bare"))), World(CPU)).parts
    calls = {"ours": lambda: _train_epoch(trainer), "bare": lambda: _bare_epoch(bare)}
    images = len(bare.batches) * options.batch_size
    return _rows("loop", f"{images} x 32 px", images, turns_of_cpu_time(calls, options.turns))


def _train_epoch(trainer: Trainer) -> None:
    trainer.state.position = 0
    with redirect_stdout(StringIO()):
        trainer.train_epoch()


def _bare_epoch(parts: Components) -> None:
    parts.batches.sampler.begin(0)
    task, optimizer = parts.state.task, parts.state.optimizer
    task.get_trainable_module().train()
    for batch in parts.batches:
        loss = task(*parts.preprocess(*batch))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure_loaders(options: BenchOptions, folder: Path) -> list[Row]:
    """JPEG files to normalised batches, with the augmentation of most recipes, in one process."""
    write_jpegs(folder / "jpegs", options.images)
    spec = InputSpec((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)
    calls = {
        "ours": _our_loader(options, folder / "jpegs", spec),
        "timm": _timm_loader(options, folder / "jpegs", spec),
    }
    images = options.images // options.batch_size * options.batch_size
    size = "x".join(map(str, JPEG_SIZE))
    return _rows("loader", f"{images} x {size}", images, turns_of_cpu_time(calls, options.turns))


def write_jpegs(folder: Path, count: int) -> None:
    """Photograph-like JPEGs, smooth with some noise, in two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(JPEG_SIZE)
        pixels = np.asarray(coarse) + generator.normal(0, 8, (*JPEG_SIZE[::-1], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _our_loader(options: BenchOptions, folder: Path, spec: InputSpec) -> Callable[[], None]:
    data = DataConfig(name=str(folder), batch_size=options.batch_size, workers=0)
    augmentation = AugmentationConfig(auto_augment=POLICY, random_erasing=0.25)
    batches = train_batches(FolderImages(folder), data, augmentation, spec, 0, World(CPU))
    preprocess = Preprocess(spec, CPU, 2, augmentation=augmentation)

    def load() -> None:
        batches.sampler.begin(0)
        for batch in batches:
            preprocess(*batch)

    return load


def _timm_loader(options: BenchOptions, folder: Path, spec: InputSpec) -> Callable[[], None]:
    """The loader of timm's train.py with its prefetcher, which normalises and erases on the device."""
    loader = create_loader(
        create_dataset("", root=str(folder)),
        (3, *spec.img_size),
        options.batch_size,
        is_training=True,
        auto_augment=POLICY,
        color_jitter=None,
        re_prob=0.25,
        re_mode="pixel",
        interpolation="random",
        mean=spec.mean,
        std=spec.std,
        num_workers=0,
        device=CPU,
        persistent_workers=False,
        pin_memory=False,
    )

    def load() -> None:
        for _ in loader:
            pass

    return load


def _rows(part: str, images: str, count: int, times: dict[str, list[float]]) -> list[Row]:
    """Medians: on a busy machine their ratio moves by half a percent where that of the least times moves by two."""
    rows, ours = [], times["ours"]
    length = len(ours) // QUARTERS
    for name, turns in times.items():
        quarters = (slice(start, start + length) for start in range(0, QUARTERS * length, length))
        ratios = [median(turns[quarter]) / median(ours[quarter]) for quarter in quarters]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append(Row(part, name, images, 1000 * median(turns) / count, median(turns) / median(ours), spread))
    return rows
