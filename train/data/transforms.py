"""Images on their way to the network: the changes to them, and their last steps on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from ...errors import UserError, first_line
from ..config import AugmentationConfig, DataConfig
from ..run.randomness import seed_host, stream_seed
from ..run.world import World
from .images import Images, UnreadableImage
from .loader import IGNORED_TARGET, Batches, NoReplacement, UnreadableCounter, resolve_workers
from .order import EvalSampler, SampleKey, TrainSampler
from .streams import StreamImages


class TrainDataset(Dataset):
    """Training examples by :class:`SampleKey`: uint8 tensor of shape (3, H, W), class index, messages.

    In the place of an image that cannot be read comes the next one that can, with its class, and the messages name the
    former. Where :attr:`MAX_REPLACEMENTS` in a row cannot be read, the last message is a :class:`NoReplacement`.
    """

    MAX_REPLACEMENTS = 100

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int, tuple[str, ...]]:
        messages: list[str] = []
        for offset in range(self.MAX_REPLACEMENTS):
            index = (key.index + offset) % len(self.images.targets)
            # Returned, not raised: raised in a worker process it would arrive wrapped in that process's traceback.
            try:
                image = self.images.load(index)
            except UnreadableImage as error:
                messages.append(str(error))
                continue
            seed_host(stream_seed("sample", self.seed, *key))
            return self.transform(image), self.images.targets[index], tuple(messages)
        reason = NoReplacement(f"{self.MAX_REPLACEMENTS} images in a row cannot be read, the last: {messages[-1]}")
        return self.transform(Image.new("RGB", (32, 32))), IGNORED_TARGET, (*messages, reason)


class EvalDataset(Dataset):
    """Val examples by index: uint8 tensor of shape (3, H, W), class index, messages.

    An image that cannot be read is black, and its class index is :data:`IGNORED_TARGET`.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int, tuple[str, ...]]:
        try:
            return self.transform(self.images.load(index)), self.images.targets[index], ()
        except UnreadableImage as error:
            return self.transform(Image.new("RGB", (32, 32))), IGNORED_TARGET, (str(error),)


class InputSpec(NamedTuple):
    """What the network takes: part of the saved model, so that evaluation prepares images as training did."""

    img_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float

    @classmethod
    def resolve(cls, config: DataConfig, pretrained_cfg: dict) -> "InputSpec":
        """The configuration's values, and the model's own where it is silent."""
        size = tuple(pretrained_cfg["input_size"][-2:]) if config.img_size is None else (config.img_size,) * 2
        return cls(
            size,
            tuple(config.mean or pretrained_cfg["mean"]),
            tuple(config.std or pretrained_cfg["std"]),
            config.interpolation or pretrained_cfg["interpolation"],
            config.crop_pct or pretrained_cfg["crop_pct"],
        )

    def as_pretrained_cfg(self) -> dict:
        """The entries of timm's pretrained_cfg that hold these values."""
        return {"input_size": (3, *self.img_size), **{key: getattr(self, key) for key in self._fields[1:]}}


def train_transform(config: AugmentationConfig, spec: InputSpec) -> Callable[[Image.Image], Tensor]:
    """PIL image -> uint8 tensor of shape (3, H, W), with random changes; erasing and mixing follow on the device."""
    has_timm_crop = config.crop in ("rrc", "rkrr", "rkrc")
    try:
        crop, change, to_tensor = _create_train_transform(config, spec, has_timm_crop)
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise UserError(f"--auto-augment {config.auto_augment}: {_reason(error)}; {_POLICIES}") from error
    if not has_timm_crop:
        crop = transforms.Compose(_resize_and_shift(config, spec))
    _allow_zero_bits(change)
    return transforms.Compose([crop, change, to_tensor])


def _reason(error: Exception) -> str:
    return first_line(error) if str(error) else "no policy of timm"


_POLICIES = "such as rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a, original or v0"


def check_augmentation(config: AugmentationConfig) -> None:
    """Refuse what timm does not take for a policy, before the data is opened.

    Raises:
        UserError: an unknown policy, or one with a part that timm cannot read or apply.
    """
    kind, *parts = (config.auto_augment or "").split("-")
    for part in parts:
        # timm passes over a part without a number, but for the name of RandAugment's set of transforms.
        if not any(character.isdigit() for character in part) and not (kind == "rand" and part.startswith("t")):
            raise UserError(f"--auto-augment {config.auto_augment}: {part!r} has no number; {_POLICIES}")
    if config.auto_augment == "":
        raise UserError(f"--auto-augment is empty; give a policy, {_POLICIES}")
    spec = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875)
    transform = train_transform(config, spec)
    try:
        transform(Image.new("RGB", (32, 32)))
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise UserError(f"--auto-augment {config.auto_augment}: {_reason(error)}; {_POLICIES}") from error


def _create_train_transform(config: AugmentationConfig, spec: InputSpec, has_timm_crop: bool) -> list[Callable]:
    return create_transform(
        (3, *spec.img_size),
        is_training=True,
        train_crop_mode=config.crop if has_timm_crop else None,
        scale=config.scale,
        hflip=config.hflip if has_timm_crop else 0.0,
        color_jitter=config.color_jitter or None,
        auto_augment=config.auto_augment,
        interpolation="random",
        mean=spec.mean,
        std=spec.std,
        use_prefetcher=True,
        separate=True,
    )


def _allow_zero_bits(change: transforms.Compose) -> None:
    """Give timm's policies a posterize that takes 0 bits: they ask for it, and Pillow 13 refuses."""
    for transform in change.transforms:
        policies = [getattr(transform, "ops", []), *getattr(transform, "policy", [])]
        for operation in (operation for policy in policies for operation in policy):
            if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep < 1:
        return image.point(lambda _: 0)
    return auto_augment.posterize(image, bits_to_keep)


def _resize_and_shift(config: AugmentationConfig, spec: InputSpec) -> list[Callable]:
    resize = eval_transform(spec).transforms[:-1]
    padding = [round(config.shift * size) for size in spec.img_size[::-1]]
    shift = [transforms.RandomCrop(spec.img_size, padding)] if config.crop == "shift" else []
    return [*resize, *shift, transforms.RandomHorizontalFlip(config.hflip)]


def eval_transform(spec: InputSpec) -> transforms.Compose:
    """PIL image -> uint8 tensor of shape (3, H, W): resize and centre crop."""
    return create_transform(
        (3, *spec.img_size),
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        mean=spec.mean,
        std=spec.std,
        use_prefetcher=True,
    )


class Preprocess:
    """The last steps before the network, on its device: normalise, erase, mix.

    Args:
        augmentation: erasing and mixing; None for evaluation.
    """

    def __init__(
        self,
        spec: InputSpec,
        device: torch.device,
        num_classes: int,
        label_smoothing: float = 0.0,
        augmentation: AugmentationConfig | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.device, self.memory_format = device, memory_format
        self.mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1) * 255
        self.erase = self.mix = None
        if augmentation is not None and augmentation.random_erasing > 0:
            self.erase = RandomErasing(augmentation.random_erasing, mode=augmentation.erasing_mode, device=device)
        if augmentation is not None and augmentation.mixes:
            self.mix = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mixup_prob,
                switch_prob=augmentation.mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 images (B, 3, H, W), class indices (B,) -> float32 images, targets (B,) or, mixed, (B, classes)."""
        images = images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        targets = targets.to(self.device, non_blocking=True)
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        return images.contiguous(memory_format=self.memory_format), targets


def train_batches(
    images: Images,
    data: DataConfig,
    augmentation: AugmentationConfig,
    spec: InputSpec,
    seed: int,
    world: World,
    unreadable: UnreadableCounter | None = None,
) -> Batches:
    """This process's training batches; ``sampler.begin`` chooses the epoch before each pass."""
    dataset = TrainDataset(images, train_transform(augmentation, spec), seed)
    workers, stream = resolve_workers(data), images if isinstance(images, StreamImages) else None
    sampler = TrainSampler(len(images.targets), data.batch_size, seed, augmentation.repeats, world, stream, workers)
    unreadable = unreadable or UnreadableCounter(data.max_unreadable)
    return Batches(dataset, sampler, workers, world.device, unreadable)


def eval_batches(
    images: Images, data: DataConfig, spec: InputSpec, world: World, unreadable: UnreadableCounter | None = None
) -> Batches:
    """This process's part of the val images; ``sampler.num_valid`` of them count."""
    dataset = EvalDataset(images, eval_transform(spec))
    sampler = EvalSampler(len(images.targets), data.batch_size, world)
    return Batches(
        dataset, sampler, resolve_workers(data), world.device, unreadable or UnreadableCounter(data.max_unreadable)
    )
