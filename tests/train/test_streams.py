"""Shards that are read from front to back: what is read, and in which order, on any number of processes and workers."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from vicinal.train.data.decode import UnreadableImage
from vicinal.train.data.loader import Batches, UnreadableCounter
from vicinal.train.data.order import TrainSampler
from vicinal.train.data.stream_files import Example
from vicinal.train.data.streams import StreamImages
from vicinal.train.run.world import World

CPU = torch.device("cpu")


class CountedShards:
    """Shards of numbers, which remember what was read of them."""

    def __init__(self, lengths):
        self.lengths, self.paths = lengths, [f"shard {index}" for index in range(len(lengths))]
        self.starts = np.cumsum([0, *lengths])
        self.read_rows = []

    def read(self, shard, start):
        for row in range(start, self.lengths[shard]):
            self.read_rows.append((shard, row))
            yield Example(str(self.starts[shard] + row).encode(), 0)


def stream_of(lengths, lanes=4, buffer=40):
    return StreamImages(CountedShards(lengths), ["only"], lanes, buffer)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("lengths", [[100] * 8, [3, 50, 0, 7, 120, 1], [5]])
def test_an_epoch_shows_every_image_once_and_reads_every_shard_once(lengths):
    stream = stream_of(lengths)
    order = stream.order(generator()).tolist()
    assert sorted(order) == list(range(sum(lengths)))
    assert order == stream.order(generator()).tolist()
    assert [int(stream.example(index).content) for index in order] == order
    rows = stream.shards.read_rows
    # Where two lanes meet inside a shard it is read to that place, and on from a window before it.
    assert len(rows) - len(set(rows)) <= 2 * stream.lanes * (stream.window + 64)
    if len(set(lengths)) == 1:
        assert len(rows) == len(set(rows)) == sum(lengths)


def test_order_is_shuffled_by_epoch_inside_and_across_shards():
    stream = stream_of([100] * 8)
    first, second = (stream.order(generator(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    for lane in range(4):
        own = first[lane::4]
        assert len((own[:100] // 100).unique()) <= 2
        moved = (own % 100 - torch.arange(200) % 100).abs()
        assert 0 < moved.max() <= 100
    assert len((first[:4] // 100).unique()) == 4


def test_any_image_can_be_asked_for():
    stream = stream_of([30, 40])
    for index in (69, 0, 35, 35, 2, 1, 68, 29):
        assert int(stream.example(index).content) == index
    again = pickle.loads(pickle.dumps(stream))
    assert int(again.example(31).content) == 31
    with pytest.raises(IndexError):
        stream.targets[70]


def batches_of(stream, world_size, workers, batch_size, repeats=1, position=0):
    """By process: the parts of each batch."""
    found = []
    for rank in range(world_size):
        world = World(CPU, rank=rank, size=world_size)
        sampler = TrainSampler(len(stream), batch_size, 0, repeats, world, stream, workers)
        sampler.begin(3, position)
        parts = list(sampler)
        assert len(parts) == len(sampler) * sampler.parts
        found.append([parts[start : start + sampler.parts] for start in range(0, len(parts), sampler.parts)])
    return found


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 2), (4, 1), (3, 2)])
def test_updates_hold_the_same_images_on_any_number_of_processes_and_workers(world_size, workers, repeats):
    stream = stream_of([100] * 8)
    ((*alone,),) = batches_of(stream, 1, 0, 24, repeats)
    shares = batches_of(stream, world_size, workers, 24 // world_size, repeats)
    for (whole,), *parts in zip(alone, *shares, strict=True):
        assert sorted(whole) == sorted(key for share in parts for part in share for key in part)


def test_batches_of_a_process_do_not_depend_on_its_workers():
    stream = stream_of([100] * 8)
    ((*alone,),) = batches_of(stream, 1, 0, 24)
    ((*shared,),) = batches_of(stream, 1, 3, 24)
    assert [batch for (batch,) in alone] == [[key for part in batch for key in part] for batch in shared]


def test_a_shard_is_read_by_one_worker_of_one_process():
    stream = stream_of([100] * 8)
    readers = {}
    for rank, batches in enumerate(batches_of(stream, 2, 2, 8)):
        for batch in batches:
            for worker, part in enumerate(batch):
                for key in part:
                    readers.setdefault(key.index // 100, set()).add((rank, worker))
    assert len(readers) == 8
    assert all(len(found) == 1 for found in readers.values())


class WhoLoads(Dataset):
    """The worker that loads an example, and its shard."""

    def __getitem__(self, key):
        return torch.tensor([get_worker_info().id]), key.index // 100, ()


def test_loader_hands_the_parts_to_their_workers():
    stream = stream_of([100] * 6, lanes=3)
    sampler = TrainSampler(600, 20, 0, 1, World(CPU), stream, 3)
    found = {}
    for epoch in (0, 1):
        sampler.begin(epoch)
        batches = list(Batches(WhoLoads(), sampler, 3, CPU, UnreadableCounter(0)))
        assert [len(shards) for _, shards in batches] == [20] * 30
        for workers, shards in batches:
            for worker, shard in zip(workers.flatten().tolist(), shards.tolist(), strict=True):
                found.setdefault((epoch, shard), set()).add(worker)
    assert len(found) == 12
    assert all(len(workers) == 1 for workers in found.values())


def test_going_on_inside_an_epoch_reads_little_of_what_lies_behind():
    stream = stream_of([200] * 8, lanes=4, buffer=40)
    ((*whole,),) = batches_of(stream, 1, 0, 16)
    stream.shards.read_rows.clear()
    ((*rest,),) = batches_of(stream, 1, 0, 16, position=1280)
    assert rest == whole[80:]
    for (batch,) in rest:
        for key in batch:
            stream.example(key.index)
    # Four lanes, and each goes back by at most one window.
    assert len(stream.shards.read_rows) <= 320 + 4 * 2 * stream.window


class FailingShards(CountedShards):
    """Fails at one image, so many times."""

    def __init__(self, path, failures):
        super().__init__([20])
        self.paths, self.failures = [path], failures

    def read(self, shard, start):
        for row, example in enumerate(super().read(shard, start), start):
            if row == 7 and self.failures:
                self.failures -= 1
                raise ConnectionError("reset by peer")
            yield example


@pytest.mark.parametrize(
    ("path", "failures", "is_read"), [("s3://x/0", 2, True), ("s3://x/0", 3, False), ("0", 1, False)]
)
def test_shard_behind_a_url_is_opened_again(path, failures, is_read, monkeypatch):
    monkeypatch.setattr("vicinal.train.data.streams.PAUSES", (0.0, 0.0))
    stream = StreamImages(FailingShards(path, failures), ["only"])
    for index in range(7):
        stream.example(index)
    if is_read:
        assert int(stream.example(7).content) == 7
    else:
        with pytest.raises(UnreadableImage, match=f"cannot read image 7 of {path}: reset by peer"):
            stream.example(7)
    assert int(stream.example(8).content) == 8


def test_image_of_no_class_is_named():
    with pytest.raises(UnreadableImage, match="image 3 of shard 1 is of class 0 of 0"):
        StreamImages(CountedShards([5, 5]), []).example(8)


def test_a_window_is_the_share_of_a_lane():
    stream = stream_of([400], lanes=1, buffer=10)
    assert stream_of([100] * 8, lanes=4, buffer=40).window == stream.window == 10
    order = stream.order(generator())
    moved = (order - torch.arange(400)).abs()
    assert 0 < moved.max() <= 10
    own = stream_of([100] * 8, lanes=4, buffer=40).order(generator())[::4]
    # The two shards of the first lane, one after the other, each moved by at most the window of 10.
    first, second = (part % 100 for part in own.split(100))
    assert max((part - torch.arange(100))[10:90].abs().max() for part in (first, second)) <= 10
