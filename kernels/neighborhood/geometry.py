"""Windows of neighborhood attention along one axis, and how an axis is cut into tiles of queries.

Tokens `dilation` apart form a group, and attention stays inside a group. A residue (position modulo dilation) names the
group; "place" is the position inside it, so everything counted in places knows no dilation.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, groupby
from math import prod
from typing import NamedTuple


class Run(NamedTuple):
    """Equally spaced tiles of one axis with one relative geometry, hence one mask and one bias.

    Tile (r, t), with r below `residues` and t below `tiles`, lies in group `residue + r`. Its queries start at place
    `query + t * queries` and its keys, all that its queries see, at place `key + t * queries`.

    Attributes:
        queries, keys: of one tile.
        windows: half-open range of keys of each query, from the tile's first key.
    """

    residue: int
    residues: int
    query: int
    key: int
    tiles: int
    queries: int
    keys: int
    windows: tuple[tuple[int, int], ...]

    @property
    def all_tiles(self) -> int:
        return self.residues * self.tiles

    @property
    def reach(self) -> int:
        """Tiles this many apart share no key."""
        return min(self.tiles, -(-self.keys // self.queries))

    def halves(self) -> tuple["Run", "Run"]:
        if self.tiles > 1:
            half = self.tiles // 2
            rest = self._replace(tiles=self.tiles - half, query=self.query + half * self.queries)
            return self._replace(tiles=half), rest._replace(key=self.key + half * self.queries)
        half = self.residues // 2
        rest = self._replace(residues=self.residues - half, residue=self.residue + half)
        return self._replace(residues=half), rest


def group_windows(length: int, kernel_size: int, stride: int, is_causal: bool) -> list[tuple[int, int]]:
    """Half-open range of keys of each place of a group of `length` places.

    The queries of a stride share the window of their leader: the middle one, or the last one when causal.
    """
    windows = []
    for place in range(length):
        first = place // stride * stride
        if is_causal:
            leader = min(first + stride - 1, length - 1)
            windows.append((max(leader - kernel_size + 1, 0), place + 1))
        else:
            leader = min(first + stride // 2, length - 1)
            start = min(max(leader - kernel_size // 2, 0), length - kernel_size)
            windows.append((start, start + kernel_size))
    return windows


def tile_lengths(length: int, stride: int, tile: int) -> list[int]:
    """Cuts a group into tiles near the wished length: whole strides, as equal as can be, so that geometries are few."""
    strides = -(-length // stride)
    count = min(strides, max(1, round(length / max(tile, stride))))
    lengths = [stride * (strides // count + (index < strides % count)) for index in range(count)]
    lengths[-1] -= strides * stride - length
    return lengths


@lru_cache(maxsize=1024)
def axis_runs(size: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, tile: int) -> tuple[Run, ...]:
    """All tiles of an axis of `size` positions. Groups differ by one place where dilation does not divide the size."""
    length, longer = divmod(size, dilation)
    runs: list[Run] = []
    if longer:
        runs += _group_runs(0, longer, group_windows(length + 1, kernel_size, stride, is_causal), stride, tile)
    runs += _group_runs(longer, dilation - longer, group_windows(length, kernel_size, stride, is_causal), stride, tile)
    return tuple(runs)


def _group_runs(residue: int, residues: int, windows: list[tuple[int, int]], stride: int, tile: int) -> Iterator[Run]:
    lengths = tile_lengths(len(windows), stride, tile)
    tiles = []
    for query, queries in zip(accumulate([0, *lengths[:-1]]), lengths, strict=True):
        seen = windows[query : query + queries]
        key = min(start for start, _ in seen)
        keys = max(stop for _, stop in seen) - key
        relative = tuple((start - key, stop - key) for start, stop in seen)
        tiles.append(Run(residue, residues, query, key, 1, queries, keys, relative))
    # Tiles that follow each other with one geometry are evenly spaced, in their queries and in their keys.
    for _, same in groupby(tiles, key=lambda run: (run.key - run.query, run.windows)):
        members = list(same)
        yield members[0]._replace(tiles=len(members))


def split(runs: tuple[Run, ...], limit: int) -> Iterator[tuple[Run, ...]]:
    """Halves the tiles of a product of runs until each part has at most `limit`, or one."""
    counts = [run.all_tiles for run in runs]
    if prod(counts) <= max(limit, 1):
        yield runs
        return
    axis = counts.index(max(counts))
    for half in runs[axis].halves():
        yield from split((*runs[:axis], half, *runs[axis + 1 :]), limit)
