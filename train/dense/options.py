"""Options of ``vicinal detect`` and ``vicinal segment``; the string below a field is its ``--help`` text."""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Literal

import tyro

from ...errors import UserError
from ..config import Options

PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg")


@dataclass(frozen=True)
class DenseData:
    """Images and annotations; what is not given stays as the config has it."""

    data: str | None = None
    """Folder in COCO's layout (detect) or in ADE20K's, with a classes.txt if the classes are others (segment)."""
    train: str | None = None
    """detect: own data, COCO file to train on; --val and --images go with it."""
    val: str | None = None
    """detect: own data, COCO file to validate on."""
    images: str | None = None
    """detect: own data, folder that the files' image names start from."""

    def __post_init__(self):
        own = [self.train, self.val, self.images]
        if any(own) and not (self.val and self.images):
            raise UserError("--train, --val and --images belong together: two COCO files and the images' folder")
        if self.data and any(own):
            raise UserError("--data is for COCO's own layout; leave it out beside --train, --val and --images")


@dataclass(frozen=True)
class DenseModel:
    """The network; what is not given stays as the config has it."""

    backbone: str | None = None
    """Another model of ours or of timm's in place of the config's; channels and pixel statistics follow."""
    backbone_kwargs: Options = field(default_factory=dict)
    """Options of the backbone, such as drop_path_rate=0.1 output_norm=layer frozen_stages=1 grad_checkpointing=true."""
    backbone_weights: str | None = None
    """none, released, a tag of the released weights, or a file or folder, such as RUN/best of vicinal train."""


@dataclass(frozen=True)
class DenseRun:
    """The run; what is not given stays as the config has it."""

    output: str | None = None
    """Folder of the run; runs/CONFIG if not given."""
    resume: str | None = None
    """auto: go on from the last checkpoint in --output, or start if there is none; or a checkpoint file."""
    iterations: int | None = None
    """Length of the run, for configs that count iterations; schedules are scaled to it."""
    epochs: int | None = None
    """Length of the run, for configs that count epochs; schedules are scaled to it."""
    batch_size: int | None = None
    """Images per process and step."""
    workers: int | None = None
    """Loader processes."""
    lr: float | None = None
    """Peak learning rate."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Autocast; float16 scales the loss."""
    sync_bn: bool = False
    """Let the backbone's batch norms share their statistics over the processes."""
    seed: int = 0
    """Seed of the weights, the order of the images, and every random change."""
    threads: int = 0
    """CPU threads per process; 0 leaves torch's choice."""
    set: Options = field(default_factory=dict)
    """Any other entry of the config by its path, such as model.test_cfg.rcnn.score_thr=0.1."""

    def __post_init__(self):
        for name, least in (("iterations", 1), ("epochs", 1), ("batch_size", 1), ("workers", 0), ("threads", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must lie between 0 and 2**32 - 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"--lr {self.lr}: must be positive")


@dataclass(frozen=True)
class DenseTrain:
    """Train a detector or a segmenter."""

    config: Annotated[str, tyro.conf.Positional]
    """Config of MMDetection's or MMSegmentation's form: a file, or the name of one that comes with the package."""
    data: DenseData = field(default_factory=DenseData)
    model: DenseModel = field(default_factory=DenseModel)
    run: DenseRun = field(default_factory=DenseRun)


def require_packages() -> None:
    """Say how to get the detection extra where it is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'vicinal[detection]'")
