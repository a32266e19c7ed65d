"""Batches on their way from the data set to the loop, past images that cannot be read and workers that die.

``StatefulDataLoader`` of torchdata resumes a pass too, but saves what each worker of each process held, and gives it
back to as many of them. Here the order is a function of counters (see :mod:`.order`), and there is no state to save
beside a number of images: a run goes on with other numbers of workers and of processes, and dead workers are replaced
in the middle of a pass, by torch's own ``DataLoader``.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...errors import RunStopped
from ...torch_internals import shared_storage
from ..config import DataConfig
from .decode import UnreadableImage
from .images import IN_MEMORY

MAX_RESTARTS = 3
IGNORED_TARGET = -1
"""The target of a val image that could not be read; it counts for nothing."""


class NoReplacement(str):
    """Among the messages of a training example: no image was found that could take its place."""


class UnreadableCounter:
    """The images of a run that could not be read, each counted once.

    Args:
        limit: so many are replaced; one more raises :class:`UnreadableImage`.
        messages: those that the run met before it was resumed.
    """

    def __init__(self, limit: int, messages: Iterable[str] = ()):
        self.limit = limit
        self.messages = list(messages)
        self.fresh: list[str] = []
        """Met by this process since it last told the others."""

    def add(self, message: str) -> None:
        """Count an image, unless it is known.

        Raises:
            UnreadableImage: there are more than the limit, or nothing could take the place of one.
        """
        if isinstance(message, NoReplacement):
            raise UnreadableImage(f"{message}; vicinal data check lists all of them")
        if message not in self.messages:
            self.messages.append(message)
            self.fresh.append(message)
        self.check()

    def merge(self, messages: Iterable[str]) -> list[str]:
        """Take over what all processes met, in one order for all of them; returns what is new to the run."""
        known = [message for message in self.messages if message not in self.fresh]
        new = [message for message in dict.fromkeys(messages) if message not in known]
        self.messages, self.fresh = known + new, []
        self.check()
        return new

    def check(self) -> None:
        """Raise if there are more than the limit."""
        if len(self.messages) > self.limit:
            raise UnreadableImage(
                f"{self.messages[-1]}; that is {len(self.messages)} of at most {self.limit} (--max-unreadable); "
                "vicinal data check lists all of them"
            )


def collate(examples: list[tuple[Tensor, int, tuple[str, ...]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Stack images and targets; the messages of the images that could not be read follow them."""
    if not examples:  # the part of a worker that has none of a batch
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), []
    images, targets, messages = zip(*examples, strict=True)
    return _stack(images), torch.tensor(targets), [message for group in messages for message in group]


def _stack(images: tuple[Tensor, ...]) -> Tensor:
    """Stack in a worker straight into the memory shared with the main process, which saves a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.stack(images)
    shape = (len(images), *images[0].shape)
    storage = shared_storage(images[0].nbytes * len(images))
    return torch.stack(images, out=torch.empty(0, dtype=images[0].dtype).set_(storage, 0, shape))


class Batches:
    """Iterate over batches of a dataset, on from the sampler's ``skip``.

    A worker process that dies (killed for memory, most often) costs nothing but time: batches depend on counters only,
    so that new workers go on at the batch that is due.

    Args:
        dataset: (image, target, messages of images that could not be read) by the sampler's keys.
        sampler: lists of keys, of which ``parts`` make up a batch; its ``skip`` leaves out the first batches.
        workers: loader processes, 0 for none.
        device: pins memory where it is CUDA.
        unreadable: counts the images that could not be read; raises :class:`UnreadableImage` past its limit.

    Raises:
        RunStopped: workers died more than :data:`MAX_RESTARTS` times in one pass.
    """

    def __init__(
        self, dataset: Dataset, sampler: Sampler, workers: int, device: torch.device, unreadable: UnreadableCounter
    ):
        self.dataset, self.sampler, self.workers, self.device = dataset, sampler, workers, device
        self.unreadable = unreadable
        self.restarts = 0
        """Times that dead workers were replaced."""
        self._loader = self._start_loader()

    def _start_loader(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.workers > 0,
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __len__(self) -> int:
        """Batches of the next pass."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, done, attempts = self.sampler.skip, 0, 0
        while True:
            try:
                for images, targets, messages in _join(_iterate(self._loader), self.sampler.parts):
                    for message in messages:
                        self.unreadable.add(message)
                    done += 1
                    yield images, targets
                return
            except (RuntimeError, OSError, EOFError) as error:
                attempts += 1
                self._replace_workers(error, attempts)
                self.sampler.skip = start + done

    def _replace_workers(self, error: Exception, attempts: int) -> None:
        # The second kind: the worker died between announcing a batch and handing its memory over.
        is_death = str(error).startswith("DataLoader worker") or isinstance(error, (ConnectionError, EOFError))
        if not self.workers or not is_death or "Caught " in str(error):
            raise error
        if attempts > MAX_RESTARTS:
            raise RunStopped(
                f"loader processes died {attempts} times in one pass ({error}): if memory runs out, lower --workers "
                "or --batch-size; --workers 0 shows the fault itself"
            ) from error
        self.restarts += 1
        self._loader = self._start_loader()


def _iterate(loader: DataLoader) -> Iterator:
    """The loader's batches, without its handler of SIGCHLD.

    That handler raises in whatever line runs when a worker dies, such as the middle of an update; the loader also
    notices when it waits for that worker's batch.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if is_main and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def _join(parts: Iterator, count: int) -> Iterator:
    """Whole batches. The loader hands lists out in turn, so that a worker gets the same part of every batch."""
    if count == 1:
        yield from parts
    while group := [part for part in islice(parts, count) if len(part[1])]:
        images, targets, messages = zip(*group, strict=True)
        yield torch.cat(images), torch.cat(targets), [message for part in messages for message in part]


def _leave_signals_to_the_main_process(_: int) -> None:
    # A cluster sends these to every process of a job. The main process saves and ends, and needs batches until then.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def resolve_workers(config: DataConfig) -> int:
    """Loader processes: none for images in memory, where handing a batch over costs more than making it."""
    if config.workers is not None:
        return config.workers
    return 0 if config.name in IN_MEMORY else min(8, os.cpu_count() or 1)
