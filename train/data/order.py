"""The order in which a run sees its images: a function of counters, on any number of processes and workers."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ...errors import UserError
from ..run.randomness import stream_seed
from ..run.world import World
from .streams import StreamImages


class SampleKey(NamedTuple):
    """What identifies one training example, and keys its random changes."""

    epoch: int
    index: int
    repeat: int


class TrainSampler(Sampler[list[SampleKey]]):
    """This process's batches of one epoch, a pure function of (seed, epoch).

    Batch b of all processes together is one run of positions of the epoch's order; a process takes every
    ``world.size``-th of them, so that the same order is seen on any number of processes, and the repeats of an image
    fall to different ones. Images that do not fill a last batch wait for the next epoch's order.

    Args:
        stream: gives the order, for a data set that is read from front to back.
        workers: loader processes; of a stream, each gets the part of every batch that lies in its lanes.

    Attributes:
        epoch: the epoch of the next pass.
        position: positions of the epoch's order that lie behind the run; the next pass goes on from there.
        skip: batches that the next pass leaves out after that.
        parts: lists of keys that make up a batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        repeats: int,
        world: World,
        stream: StreamImages | None = None,
        workers: int = 0,
    ):
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.repeats, self.world = seed, repeats, world
        self.stream, self.parts = stream, 1 if stream is None else max(1, workers)
        self.epoch = self.position = self.skip = 0
        if num_images == 0:
            raise UserError("--data: no training images; a val or test split alone can be measured, not trained on")
        if self.per_epoch == 0:
            raise UserError(
                f"--batch-size {batch_size} on {world.size} processes exceeds the {num_images} training images"
            )

    @property
    def width(self) -> int:
        """Images of a batch of all processes together."""
        return self.batch_size * self.world.size

    @property
    def per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return self.num_images // self.width

    def begin(self, epoch: int, position: int = 0) -> None:
        """Let the next pass show an epoch, from a position on."""
        self.epoch, self.position, self.skip = epoch, position, 0

    def __len__(self) -> int:
        return max(0, (self.num_images - self.position) // self.width - self.skip)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        indices = self._order()
        first, stride = self.position + self.skip * self.width + self.world.rank, self.world.size
        for start in range(first, first + len(self) * self.width, self.width):
            positions = range(start, start + self.batch_size * stride, stride)
            own = indices[start : positions[-1] + 1 : stride].tolist()
            keys = [
                SampleKey(self.epoch, index, position % self.repeats)
                for index, position in zip(own, positions, strict=True)
            ]
            yield from [keys] if self.stream is None else self._deal(keys, positions)

    def _order(self) -> Tensor:
        """Image numbers by position. A tensor: a million keys would take hundreds of megabytes in every process."""
        generator = torch.Generator().manual_seed(stream_seed("order", self.seed, self.epoch))
        if self.stream is None:
            order = torch.randperm(self.num_images, generator=generator)
        else:
            order = self.stream.order(generator)
        return order.repeat_interleave(self.repeats)[: self.num_images]

    def _deal(self, keys: list[SampleKey], positions: Sequence[int]) -> list[list[SampleKey]]:
        """The parts of a batch, one for each worker, so that a lane is read by one of them.

        Together they are in the order of the lanes, whatever the number of workers.
        """
        parts: list[list[SampleKey]] = [[] for _ in range(self.parts)]
        lanes = [position // self.repeats % self.stream.lanes for position in positions]
        for place in sorted(range(len(keys)), key=lanes.__getitem__):
            parts[lanes[place] * self.parts // self.stream.lanes].append(keys[place])
        return parts


class EvalSampler(Sampler[list[int]]):
    """This process's batches of the val images: a stretch of them, in order.

    Every process gets the same number of batches of the same sizes, filled up by wrapping around, because sharded
    models communicate in every forward pass; only the first ``num_valid`` examples are to be counted.
    """

    parts = 1

    def __init__(self, num_images: int, batch_size: int, world: World):
        self.num_images, self.batch_size = num_images, batch_size
        self.skip = 0
        part = math.ceil(num_images / world.size)
        self.indices = [index % num_images for index in range(world.rank * part, (world.rank + 1) * part)]
        self.num_valid = min(part, max(0, num_images - world.rank * part))

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size) - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        first, self.skip = self.skip * self.batch_size, 0
        for start in range(first, len(self.indices), self.batch_size):
            yield self.indices[start : start + self.batch_size]
