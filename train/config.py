"""Configuration of a training run: frozen dataclasses, one per concern.

The string below a field is its ``--help`` text. A field's flag is its name with dashes, without the section
(``schedule.epochs`` is ``--epochs``), so field names are unique across sections.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ..command import check_fields
from ..errors import UserError
from .strict_yaml import parse_scalar


def _parse_pairs(items: list[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise ValueError(f"expected KEY=VALUE, got {item!r}")
        if key in pairs:
            raise ValueError(f"{key!r} is given twice")
        pairs[key] = parse_scalar(text)
    return pairs


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


_SETTLED_MODEL_OPTIONS = {
    "in_chans": "images are read as RGB, in 3 channels",
    "num_classes": "the number of classes comes from the data; leave it out",
    "features_only": "a classifier is trained, not a pyramid of features; leave it out",
    "pretrained": "use --pretrained",
    "pretrained_cfg": "use --weights",
    "pretrained_cfg_overlay": "use --weights",
    "checkpoint_path": "use --weights",
}
"""Options of ``timm.create_model`` that a run does not leave open, and what to do about them."""


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
    """Weight of the teacher in the loss; the labels have the rest."""
    model_kwargs: Options = field(default_factory=dict)
    """Further options of the model, such as kernel_size=5."""

    def __post_init__(self):
        _check(
            self.weights is None or not self.pretrained,
            "--weights and --pretrained both say where the weights come from: leave one out",
        )
        for name, reason in _SETTLED_MODEL_OPTIONS.items():
            _check(
                name not in self.model_kwargs or (name == "in_chans" and self.model_kwargs[name] == 3),
                f"--model-kwargs {name}={self.model_kwargs.get(name)}: {reason}",
            )
        _check(
            self.drop_path_rate is None or "drop_path_rate" not in self.model_kwargs,
            "--drop-path-rate and drop_path_rate in --model-kwargs say the same: leave one out",
        )
        check_fields(self, teacher_weight="(0, 1]", probe_queries="[1, inf)", drop_path_rate="[0, 1)")


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
    """Fraction of every class that becomes the val split, where the data has none of its own."""
    split_seed: int = 0
    """Seed of that split; separate from --seed so that runs compare on the same val images."""
    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1]; the model's own if not given."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations; the model's own if not given."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Resampling at evaluation; the model's own if not given."""
    crop_pct: float | None = None
    """Share of the resized image that the evaluation's centre crop keeps; the model's own if not given."""
    max_unreadable: int = 0
    """Images of the whole run that may be unreadable: another one takes their place; one more stops the run."""
    num_classes: int | None = None
    """Number of classes, of a stream whose shards do not say it."""
    stream_lanes: int = 64
    """Shards of a stream that all processes together read at a time; best a multiple of all their workers."""
    shuffle_buffer: int = 8192
    """Images of a stream that all processes together hold while their order is shuffled."""

    def __post_init__(self):
        check_fields(
            self,
            batch_size="[1, inf)",
            img_size="[1, inf)",
            workers="[0, inf)",
            val_fraction="(0, 1)",
            split_seed="[0, inf)",
            mean="[0, 1]",
            std="(0, 1]",
            crop_pct="(0, 1]",
            max_unreadable="[0, inf)",
            num_classes="[1, inf)",
            stream_lanes="[1, inf)",
            shuffle_buffer="[0, inf)",
        )
        is_stream = self.name.startswith(("hfids/", "wds/"))
        _check(self.num_classes is None or is_stream, "--num-classes is for streams: other data says it by itself")


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
        check_fields(
            self,
            scale="(0, 1]" if self.crop == "rrc" else "(0, inf)",
            shift="[0, 1)",
            hflip="[0, 1]",
            color_jitter="[0, inf)",
            random_erasing="[0, 1]",
            repeats="[1, inf)",
            mixup="[0, inf)",
            cutmix="[0, inf)",
            mixup_prob="[0, 1]",
            mixup_switch_prob="[0, 1]",
        )
        _check(
            self.scale is None or self.scale[0] <= self.scale[1],
            f"--scale {' '.join(map(str, self.scale or ()))}: the least comes first, then the largest",
        )

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
        for name in ("lr", "weight_decay", "layer_decay"):
            _check(
                name not in self.optimizer_kwargs,
                f"--optimizer-kwargs {name}={self.optimizer_kwargs.get(name)}: use --{name.replace('_', '-')}",
            )
        check_fields(
            self,
            lr="(0, inf)",
            lr_base_size="[1, inf)",
            weight_decay="[0, inf)",
            layer_decay="(0, 1]",
            bce_threshold="[0, 1)",
            label_smoothing="[0, 1)",
            clip_grad="(0, inf)",
            accumulation="[1, inf)",
            max_skips="[0, inf)",
        )
        _check(
            self.bce_threshold is None or self.loss == "bce",
            f"--bce-threshold {self.bce_threshold}: goes with --loss bce",
        )


WARMUP_EPOCHS, WARMUP_SHARE = 5.0, 0.05
"""The warm-up that nobody gave: of a run of 100 epochs, as long as the default is, both are the same."""


def default_warmup(epochs: int) -> float:
    """Epochs of warm-up before so many epochs are over."""
    return WARMUP_EPOCHS if epochs > WARMUP_EPOCHS else WARMUP_SHARE * max(epochs, 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, through timm.scheduler, set before every update."""

    epochs: int = 100
    """Passes over the training images, warm-up and cool-down among them."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: float | None = None
    """Length of the linear warm-up in epochs; if not given 5, or a twentieth of a run that is too short for that."""
    warmup_lr: float = 1e-6
    """Learning rate at which the warm-up starts."""
    cooldown_epochs: int = 0
    """Last epochs, at --min-lr."""
    min_lr: float = 1e-5
    """Learning rate at which the schedule ends, unless it is constant."""
    scale_all: bool = False
    """Let --lr-base-size scale --warmup-lr and --min-lr too."""

    def __post_init__(self):
        intervals = {"epochs": "[1, inf)", "cooldown_epochs": "[0, inf)"}
        check_fields(self, **intervals, warmup_epochs="[0, inf)", warmup_lr="[0, inf)", min_lr="[0, inf)")
        _check(
            self.cooldown_epochs == 0 or self.schedule != "constant",
            "--cooldown-epochs stay at --min-lr, which --schedule constant does not reach: leave them out",
        )
        _check(
            self.cooldown_epochs < self.epochs,
            f"--cooldown-epochs {self.cooldown_epochs} leave nothing of --epochs {self.epochs}: "
            "lower the one or raise the other",
        )
        if self.warmup_epochs is None:
            # A frozen dataclass has no other way to settle a default that depends on another field.
            object.__setattr__(self, "warmup_epochs", default_warmup(self.epochs - self.cooldown_epochs))
        cooldown = f" with --cooldown-epochs {self.cooldown_epochs}" if self.cooldown_epochs else ""
        _check(
            self.warmup_epochs < self.epochs - self.cooldown_epochs,
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
    """On several processes: a copy of the weights on each (ddp), or shards of every block's (fsdp: fully_shard)."""
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
    """Under --parallel fsdp: each process writes its shards, not the first one everything."""
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
        check_fields(
            self,
            seed="[0, inf)",
            threads="[0, 4096]",
            ema_decay="(0, 1)",
            save_interval="[1, inf)",
            save_epochs="[1, inf)",
            keep="[1, inf)",
            log_interval="[1, inf)",
            profile="[0, inf)",
        )
        _check(
            self.parallel == "fsdp" or not self.sharded_checkpoints,
            "--sharded-checkpoints writes shards that only --parallel fsdp has: add it, or leave the flag out",
        )
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
            "--clip-mode agc needs full tensors, and --parallel fsdp has shards: use --clip-mode norm",
        )
        _check(
            self.run.parallel == "ddp" or self.model.probe is None,
            "--probe trains a head only, which needs no shards: use --parallel ddp",
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
