"""Configuration of a training run: frozen dataclasses, one per concern.

The string below a field is its ``--help`` text. A field's flag is its name with dashes, without the section
(``schedule.epochs`` is ``--epochs``), so field names are unique across sections.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
import yaml

from .errors import UserError


def parse_scalar(text: str) -> Any:
    """A value as YAML reads it, and ``1e-3`` as the number that YAML 1.1 takes for a string."""
    value = yaml.safe_load(text)
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _parse_pairs(items: list[str]) -> dict[str, Any]:
    pairs = dict(item.split("=", 1) for item in items if "=" in item)
    if len(pairs) != len(items):
        raise ValueError("expected KEY=VALUE pairs with distinct keys")
    return {key: parse_scalar(text) for key, text in pairs.items()}


# A mapping on the command line: --model-kwargs kernel_size=5 qkv_bias=false
Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE",
        instance_from_str=_parse_pairs,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={item}" for key, item in value.items()],
    ),
]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The network; its number of classes comes from the data."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "nat_pico"
    """Any name that timm.create_model takes: ours, timm's, or local-dir:FOLDER with a saved model."""
    pretrained: bool = False
    """Start from the model's released weights, with a fresh classifier where the number of classes differs."""
    weights: str | None = None
    """Start from these weights instead: a run, one of its checkpoint folders, a file, or a model's released ones."""
    probe: Literal["linear", "attentive"] | None = None
    """Train a new head only, on a frozen network: a linear one on its pooled features, or one with attention."""
    probe_queries: int = 32
    """Queries of the attentive probe; they divide the network's features."""
    drop_path_rate: float | None = None
    """Stochastic depth rate; the model's default if not given."""
    teacher: str | None = None
    """Learn also from this model with its released weights, or from local-dir:FOLDER: its first guesses are targets."""
    teacher_weight: float = 0.5
    """Share of the teacher in the loss."""
    model_kwargs: Options = field(default_factory=dict)
    """Further options of the model, such as kernel_size=5."""

    def __post_init__(self):
        _check(
            self.weights is None or not self.pretrained,
            "--weights and --pretrained both say where the weights come from: leave one out",
        )
        _check(0 < self.teacher_weight <= 1, f"--teacher-weight {self.teacher_weight}: must lie in (0, 1]")
        _check(self.probe_queries >= 1, f"--probe-queries {self.probe_queries}: must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Images, and how they reach the network."""

    name: Annotated[str, tyro.conf.arg(name="data")] = "digits"
    """digits, mnist, synthetic, a folder of images or shards, hfds/NAME, torch/NAME; streamed: hfids/NAME, wds/ROOT."""
    data_dir: str | None = None
    """Where torch/NAME lies, and where hfds/NAME is kept."""
    download: bool = False
    """Fetch torch/NAME if it is not there."""
    img_size: int | None = None
    """Height and width of the input in pixels; the model's own if not given."""
    batch_size: int = 128
    """Images per process and forward pass."""
    workers: int | None = None
    """Loader processes; if not given, none for data held in memory, else up to 8."""
    val_fraction: float = 0.2
    """Share of every class that is held out, where the data has no split of its own."""
    split_seed: int = 0
    """Seed of that split; separate from --seed so that runs compare on the same held-out images."""
    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1]; the model's own if not given."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations; the model's own if not given."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Resampling at evaluation; the model's own if not given."""
    crop_pct: float | None = None
    """Share of the resized image that the evaluation's centre crop keeps; the model's own if not given."""
    max_broken: int = 0
    """Images of the whole run that may be unreadable: another one takes their place; one more stops the run."""
    num_classes: int | None = None
    """Number of classes, of a stream whose shards do not say it."""
    stream_lanes: int = 64
    """Shards of a stream that all processes together read at a time; best a multiple of all their workers."""
    shuffle_buffer: int = 8192
    """Images of a stream that all processes together hold while their order is shuffled."""

    def __post_init__(self):
        _check(self.batch_size >= 1, f"--batch-size {self.batch_size}: must be at least 1")
        _check(self.img_size is None or self.img_size >= 1, f"--img-size {self.img_size}: must be at least 1")
        _check(self.workers is None or self.workers >= 0, f"--workers {self.workers}: must be at least 0")
        _check(0 < self.val_fraction < 1, f"--val-fraction {self.val_fraction}: must lie between 0 and 1")
        _check(self.max_broken >= 0, f"--max-broken {self.max_broken}: must be at least 0")
        is_stream = self.name.startswith(("hfids/", "wds/"))
        _check(self.num_classes is None or is_stream, "--num-classes is for streams: other data says it by itself")
        _check(self.num_classes is None or self.num_classes >= 1, f"--num-classes {self.num_classes}: at least 1")
        _check(self.stream_lanes >= 1, f"--stream-lanes {self.stream_lanes}: must be at least 1")
        _check(self.shuffle_buffer >= 0, f"--shuffle-buffer {self.shuffle_buffer}: must be at least 0")
        _check(self.crop_pct is None or 0 < self.crop_pct <= 1, f"--crop-pct {self.crop_pct}: must lie in (0, 1]")


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes to training images, through timm.data."""

    crop: Literal["rrc", "rkrr", "rkrc", "shift", "none"] = "rrc"
    """rrc: random resized crop; rkrr, rkrc: timm's aspect-keeping ones; shift: by up to --shift; none: as evaluated."""
    scale: tuple[float, float] | None = None
    """Range of the cropped area (rrc) or of the resize (rkrr, rkrc); timm's own if not given."""
    shift: float = 0.125
    """Largest translation as a share of --img-size, for --crop shift."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; ignored under --auto-augment, except 3a."""
    auto_augment: str | None = None
    """timm policy, such as rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3-w3 or 3a (3-Augment)."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle."""
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Filling: zeros, one random colour, or noise."""
    repeats: int = 1
    """Repeated augmentation: an epoch shows this many versions of each image that it draws, and draws fewer images."""
    mixup: float = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 turns it off."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup where both are on."""

    def __post_init__(self):
        for name in ("hflip", "random_erasing", "mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"--{name.replace('_', '-')} {value}: a probability must lie in [0, 1]")
        _check(0 <= self.shift < 1, f"--shift {self.shift}: a share of the image must lie in [0, 1)")
        _check(self.repeats >= 1, f"--repeats {self.repeats}: must be at least 1; 1 turns repeated augmentation off")
        _check(min(self.mixup, self.cutmix) >= 0, "--mixup and --cutmix must not be negative; 0 turns them off")

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, which makes targets soft and asks for an even batch."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, through timm.optim, the loss and the gradients."""

    optimizer: str = "adamw"
    """Any name of timm.optim.list_optimizers()."""
    lr: float = 1e-3
    """Peak learning rate, for an update of --lr-base-size images if that is given."""
    lr_base_size: int | None = None
    """Scale --lr by the images of an update (of all processes and accumulated batches) over this number."""
    weight_decay: float = 0.05
    """Weight decay; biases, norms and what the model exempts are left out."""
    layer_decay: float | None = None
    """Factor of the learning rate from one layer to the layer below it."""
    optimizer_kwargs: Options = field(default_factory=dict)
    """Further options of the optimizer, such as momentum=0.9 or eps=1e-6."""
    loss: Literal["ce", "bce"] = "ce"
    """Softmax cross-entropy, or binary cross-entropy of each class by itself."""
    bce_threshold: float | None = None
    """Under --loss bce, take soft targets above this for 1 and the others for 0."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    clip_grad: float | None = None
    """Clip gradients at this norm, value or factor (--clip-mode)."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """By the global norm, by each value, or adaptively against the weights' norm."""
    accumulation: int = 1
    """Batches whose gradients are averaged into one update."""
    max_skips: int = 5
    """Updates in a row that may be left out because their loss is not finite; one more stops the run."""

    def __post_init__(self):
        _check(self.lr > 0, f"--lr {self.lr}: must be positive")
        _check(
            self.lr_base_size is None or self.lr_base_size >= 1,
            f"--lr-base-size {self.lr_base_size}: must be at least 1",
        )
        _check(
            self.bce_threshold is None or (self.loss == "bce" and 0 <= self.bce_threshold < 1),
            f"--bce-threshold {self.bce_threshold}: must lie in [0, 1), and goes with --loss bce",
        )
        _check(self.accumulation >= 1, f"--accumulation {self.accumulation}: must be at least 1")
        _check(self.max_skips >= 0, f"--max-skips {self.max_skips}: must be at least 0")
        _check(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: must lie in [0, 1)")
        _check(self.clip_grad is None or self.clip_grad > 0, f"--clip-grad {self.clip_grad}: must be positive")
        _check(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"--layer-decay {self.layer_decay}: must lie in (0, 1]",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, through timm.scheduler, set before every update."""

    epochs: int = 100
    """Passes over the training images, warm-up and cool-down among them."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: float = 5
    """Length of the linear warm-up in epochs."""
    warmup_lr: float = 1e-6
    """Learning rate at which the warm-up starts."""
    cooldown_epochs: int = 0
    """Last epochs, at --min-lr."""
    min_lr: float = 1e-5
    """Learning rate at which the schedule ends, unless it is constant."""
    scale_all: bool = False
    """Let --lr-base-size scale --warmup-lr and --min-lr too."""

    def __post_init__(self):
        _check(self.epochs >= 1, f"--epochs {self.epochs}: must be at least 1")
        _check(self.cooldown_epochs >= 0, f"--cooldown-epochs {self.cooldown_epochs}: must be at least 0")
        _check(
            self.cooldown_epochs == 0 or self.schedule != "constant",
            "--cooldown-epochs stay at --min-lr, which --schedule constant does not reach: leave them out",
        )
        cooldown = f" with --cooldown-epochs {self.cooldown_epochs}" if self.cooldown_epochs else ""
        _check(
            0 <= self.warmup_epochs < self.epochs - self.cooldown_epochs,
            f"--warmup-epochs {self.warmup_epochs} does not fit in --epochs {self.epochs}{cooldown}: "
            "lower it or raise --epochs",
        )


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run computes, and what it leaves behind."""

    output: str | None = None
    """Folder of the run; runs/MODEL-DATA if not given."""
    resume: str | None = None
    """auto: go on from the last checkpoint in --output, or start if there is none; or a run's folder to go on from."""
    seed: int = 0
    """Seed of the weights, the order of the images, and every random change."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    threads: int = 0
    """CPU threads per process; 0 leaves torch's choice."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Autocast: bfloat16 on CUDA and float32 elsewhere (auto), or as given; float16 scales the loss."""
    channels_last: bool = False
    """Keep images and convolution weights in the channels-last memory format."""
    compile: bool = False
    """torch.compile the model; under --parallel fsdp each of its blocks."""
    grad_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass, to save memory."""
    sync_bn: bool = False
    """Batch norm over the batches of all processes; on CUDA."""
    deterministic: bool = False
    """Only algorithms of torch that give the same bits each time; needed for exact resume on CUDA, and slower."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """On several processes: a copy of the weights on each (ddp), or shares of every block's (fsdp: fully_shard)."""
    ema_decay: float | None = None
    """Evaluate and save the exponential moving average of the weights with this decay."""
    ema_warmup: bool = False
    """Let the decay of the average grow during the run up to --ema-decay."""
    save_interval: int | None = None
    """Updates between two checkpoints inside an epoch; at the end of each epoch there is one anyway."""
    save_epochs: int | None = None
    """Epochs between two checkpoints that stay, as epoch-0010/ and so on."""
    keep: int = 3
    """How many of those stay, the newest."""
    sharded_checkpoints: bool = False
    """Under --parallel fsdp: each process writes its shares, not the first one everything."""
    log_interval: int = 50
    """Updates between two step records in metrics.jsonl."""
    tensorboard: bool = False
    """Also write the records for TensorBoard, into tensorboard/ of the run's folder."""
    wandb: str | None = None
    """Also send the records to this project of Weights & Biases."""
    profile: int = 0
    """Profile this many updates, after five to warm up; the trace goes to profile.json of the run's folder."""
    report: bool = False
    """At the end, draw report.png: curves, predictions and attention maps."""

    def __post_init__(self):
        _check(self.log_interval >= 1, f"--log-interval {self.log_interval}: must be at least 1")
        for name in ("save_interval", "save_epochs", "keep"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: must be at least 1")
        for name in ("threads", "profile"):
            _check(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must be at least 0")
        _check(
            self.parallel == "fsdp" or not self.sharded_checkpoints,
            "--sharded-checkpoints writes shares that only --parallel fsdp has: add it, or leave the flag out",
        )
        _check(self.ema_decay is None or 0 < self.ema_decay < 1, f"--ema-decay {self.ema_decay}: must lie in (0, 1)")
        _check(
            self.ema_decay is not None or not self.ema_warmup,
            "--ema-warmup warms up the decay of an average that is off: set --ema-decay",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, by section; a YAML recipe has the same sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        _check(
            self.schedule.schedule == "constant" or self.schedule.min_lr <= self.optimizer.lr,
            f"--min-lr {self.schedule.min_lr} exceeds --lr {self.optimizer.lr}: lower --min-lr",
        )
        _check(
            self.run.parallel == "ddp" or self.optimizer.clip_grad is None or self.optimizer.clip_mode != "agc",
            "--clip-mode agc needs whole weights, and --parallel fsdp has shares: use --clip-mode norm",
        )
        _check(
            self.run.parallel == "ddp" or self.model.probe is None,
            "--probe trains a head only, which needs no shares: use --parallel ddp",
        )
        _check(
            self.run.parallel == "ddp" or self.model.teacher is None,
            "--teacher works on whole networks: use --parallel ddp",
        )
        _check(
            self.optimizer.lr_base_size is not None or not self.schedule.scale_all,
            "--scale-all has nothing to scale by: set --lr-base-size",
        )
        _check(
            self.data.batch_size % 2 == 0 or not self.augmentation.mixes,
            f"--batch-size {self.data.batch_size} is odd, and mixup and CutMix pair the images of a batch: "
            "use an even --batch-size, or --mixup 0 --cutmix 0",
        )


SECTIONS = {section.name: section.default_factory for section in dataclasses.fields(TrainConfig)}
