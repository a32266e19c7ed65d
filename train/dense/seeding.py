"""Random changes to images that depend on the place of an image in the run alone, whichever process makes them."""

import copy
from collections.abc import Iterator
from itertools import count
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import Dataset, Sampler

from ..run.randomness import seed_host, stream_seed


class PlacedIndex(int):
    """Index of an image that also knows its place among all the images that its process takes in the run."""

    place: int

    def __new__(cls, index: int, place: int) -> "PlacedIndex":
        placed = super().__new__(cls, index)
        placed.place = place
        return placed

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.place


@DATA_SAMPLERS.register_module()
class PlacingSampler(Sampler):
    """The indices of another sampler, with their places.

    Args:
        dataset, seed: for the other sampler.
        sampler: its config.
    """

    def __init__(self, dataset: Dataset, seed: int | None, sampler: dict) -> None:
        self.dataset = dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args={"dataset": dataset, "seed": seed})
        self.first = 0
        if hasattr(self.sampler, "skip"):
            # MMEngine asks for the method where it passes over images without loading them
            self.skip = self._skip

    def __iter__(self) -> Iterator[PlacedIndex]:
        for index, place in zip(self.sampler, count(self.first), strict=False):
            yield PlacedIndex(index, place)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Another order, where the sampler has one, and other places for each epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        self.first = epoch * len(self)

    def _skip(self, num_samples: int) -> None:
        self.sampler.skip(num_samples)
        self.first = num_samples


@DATASETS.register_module()
class SeededDataset(Dataset):
    """Another dataset, with the generators of the process seeded by (seed, place, rank) before each image.

    Args:
        dataset: config of the other dataset; what is not found here is asked of it.
        seed: of the run.
    """

    def __init__(self, dataset: dict, seed: int) -> None:
        self.dataset = DATASETS.build(dataset)
        self.seed, self.rank = seed, get_rank()

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":
            # not there yet: a copy is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: PlacedIndex) -> Any:
        seed_host(stream_seed("image", self.seed, index.place, self.rank))
        return self.dataset[int(index)]


def seed_images(cfg: Config, seed: int) -> Config:
    """A copy of a config whose training images repeat after a resumption, with any number of loader processes."""
    cfg = copy.deepcopy(cfg)
    loader = cfg.train_dataloader
    loader.dataset = {"type": "SeededDataset", "seed": seed, "dataset": loader.dataset}
    loader.sampler = {"type": "PlacingSampler", "sampler": loader.sampler}
    return cfg
