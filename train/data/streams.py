"""Shards that are read from front to back, from a disk or over a network: parquet files and WebDataset's tar files.

Every image has a number, by the order of the shards and of the images in them, as in data that is read in any order.
What differs is the order of an epoch: it moves forward through many shards at a time, and needs no more than a window
of each. It is computed from the lengths of the shards and (seed, epoch), so that it does not depend on the number of
processes or workers, and a run goes on inside an epoch by opening the shards that are in use there.
"""

import os
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import first_line
from .decode import UnreadableImage, open_image
from .readers import check_content
from .stream_files import Example, Shards, is_url

PAUSES = (2.0, 8.0)
"""Seconds before a shard behind a URL is opened again; then the image counts as unreadable."""
SLACK = 64
"""Images of a shard that are read past, or kept, beyond its window: threads ask a little out of order."""


class StreamImages:
    """Images by number from shards; cheap where the numbers of each shard grow, but for a window.

    Args:
        shards: the files.
        classes: names by index.
        lanes: shards that are read at a time.
        buffer: images that the lanes hold together while their order is shuffled.
    """

    def __init__(self, shards: Shards, classes: Sequence[str], lanes: int = 1, buffer: int = 0):
        self.shards, self.classes = shards, classes
        self.lanes = min(lanes, len(shards.paths))
        self.window = buffer // self.lanes
        self.starts = np.cumsum([0, *shards.lengths])
        self.targets = _Targets(self)
        self._reading = _Reading()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, generator: torch.Generator) -> Tensor:
        """An epoch: every image once; place p is of lane ``p % lanes``.

        The shards follow each other in random order and are cut into lanes of equal length; inside a lane no image
        moves by more than the window.
        """
        shuffled = torch.randperm(len(self.shards.paths), generator=generator).tolist()
        numbers = torch.cat([torch.arange(self.starts[shard], self.starts[shard + 1]) for shard in shuffled])
        order = torch.empty_like(numbers)
        counts = [len(range(lane, len(order), self.lanes)) for lane in range(self.lanes)]
        for lane, own in enumerate(numbers.split(counts)):
            moves = self.window * torch.rand(len(own), generator=generator, dtype=torch.float64)
            order[lane :: self.lanes] = own[torch.arange(len(own)).add(moves).argsort(stable=True)]
        return order

    def load(self, index: int) -> Image.Image:
        return self.load_example(index)[0]

    def load_example(self, index: int) -> tuple[Image.Image, int]:
        """One image and its class index, which other threads cannot come between."""
        example, name = self.example(index), self._name(index)
        return open_image(check_content(example.content, name), name), example.target

    def example(self, index: int) -> Example:
        """One image as it is stored.

        Raises:
            UnreadableImage: its shard cannot be read, or it is of no class of the data set.
        """
        if self._reading.process != os.getpid():
            # The open files of the process that forked this one share their position with it.
            self._reading = _Reading()
        with self._reading.lock:
            if self._reading.last[0] != index:
                self._reading.last = index, self._read(index)
            return self._reading.last[1]

    def _read(self, index: int) -> Example:
        example = self._try_to_read(index)
        if not isinstance(example.target, int) or not 0 <= example.target < len(self.classes):
            raise UnreadableImage(f"image {self._name(index)} is of class {example.target} of {len(self.classes)}")
        return example

    def _try_to_read(self, index: int) -> Example:
        shard, row = self._locate(index)
        pauses = list(PAUSES if is_url(self.shards.paths[shard]) else ())
        while True:
            try:
                return self._forward_to(shard, row)
            # pyarrow raises subclasses of ValueError for files that it cannot read.
            except (OSError, ValueError, tarfile.TarError) as error:
                self._reading.close(shard)
                if not pauses:
                    raise UnreadableImage(f"cannot read image {self._name(index)}: {first_line(error)}") from error
                time.sleep(pauses.pop(0))

    def _forward_to(self, shard: int, row: int) -> Example:
        cursors = self._reading.cursors
        # Two lanes may be in one shard, each at a place of its own.
        near = [cursor for cursor in cursors if cursor.shard == shard and cursor.reaches(row)]
        if near:
            cursor = min(near, key=lambda cursor: max(0, row - cursor.next))
            cursors.remove(cursor)
        else:
            start = max(0, row - self.window)
            cursor = _Cursor(shard, self.shards.read(shard, start), start, self.window + SLACK)
        cursors.append(cursor)
        # A lane that crosses from one shard into the next holds both; the cursor of longest ago comes first.
        del cursors[: -2 * self.lanes]
        return cursor.get(row)

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, int(index - self.starts[shard])

    def _name(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{row} of {self.shards.paths[shard]}"

    def __getstate__(self) -> dict:
        # A worker process that is not forked opens its own files.
        return {**self.__dict__, "_reading": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _reading=_Reading())


class _Targets(Sequence):
    """The class indices of a stream, which are read together with its images."""

    def __init__(self, images: StreamImages):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> int:
        if index >= len(self):
            raise IndexError(index)
        return self.images.example(index).target


class _Reading:
    """What a process has open of a stream."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.cursors: list[_Cursor] = []
        self.last: tuple[int, Example | None] = (-1, None)

    def close(self, shard: int) -> None:
        """Forget a shard, so that it is opened again."""
        self.cursors = [cursor for cursor in self.cursors if cursor.shard != shard]


class _Cursor:
    """A shard that is read forward; examples that were passed and are not asked for yet wait.

    Args:
        rows: the examples from ``start`` on.
        keep: how far behind the newest one they wait.
    """

    def __init__(self, shard: int, rows: Iterator[Example], start: int, keep: int):
        self.shard, self.rows, self.next, self.keep = shard, rows, start, keep
        self.waiting: dict[int, Example] = {}

    def reaches(self, row: int) -> bool:
        return row in self.waiting or self.next <= row <= self.next + self.keep

    def get(self, row: int) -> Example:
        while self.next <= row:
            example = next(self.rows, None)
            if example is None:
                raise OSError(f"the shard ends after {self.next} images")
            self.waiting[self.next] = example
            self.waiting.pop(self.next - self.keep, None)
            self.next += 1
        return self.waiting.pop(row)
