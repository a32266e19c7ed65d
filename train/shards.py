"""Files that a stream is read from, on a disk or behind URLs: parquet, and WebDataset's tar files."""

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from timm.utils.misc import natural_key

from .errors import UserError, first_line
from .readers import SPLITS, find_parquet, find_shards, read_pairs


class Example(NamedTuple):
    """An encoded image and its class index."""

    content: bytes
    target: int


class Shards(Protocol):
    """Files of examples."""

    paths: Sequence[str]
    lengths: Sequence[int]

    def read(self, shard: int, start: int) -> Iterator[Example]:
        """The examples of a shard, on from one of them."""
        ...


class ParquetShards:
    """Parquet files as the package ``datasets`` writes them: columns ``image`` and ``label``.

    Only their footers are read at the start.
    """

    def __init__(self, paths: Sequence[str]):
        from datasets import ClassLabel, Features

        self.paths = list(paths)
        footers = _in_threads(_read_footer, self.paths)
        self.lengths = [rows for rows, _ in footers]
        features = Features.from_arrow_schema(footers[0][1])
        for column in ("image", "label"):
            if column not in features:
                raise UserError(f"--data: no column {column} in {self.paths[0]}, but {', '.join(features)}")
        label = features["label"]
        self.classes = list(label.names) if isinstance(label, ClassLabel) else None

    def read(self, shard: int, start: int) -> Iterator[Example]:
        from pyarrow.parquet import ParquetFile

        with _open(self.paths[shard]) as stream, ParquetFile(stream) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first + count > start:
                    batches = file.iter_batches(16, row_groups=[group], columns=["image", "label"])
                    rows = (row for batch in batches for row in batch.to_pylist())
                    for number, row in enumerate(rows, first):
                        if number >= start:
                            image = row["image"]
                            yield Example(image["bytes"] if isinstance(image, dict) else image, row["label"])
                first += count


class TarShards:
    """WebDataset's tar files.

    Args:
        lengths: images of each; found by reading their headers if not given.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int] | None = None):
        self.paths, self.classes = list(paths), None
        if lengths is None:
            targets = _in_threads(_read_targets, self.paths)
            lengths = [len(own) for own in targets]
            self.classes = [str(index) for index in range(max((max(own) for own in targets if own), default=-1) + 1)]
        if len(lengths) != len(paths):
            raise UserError(f"--data: _info.json lists {len(paths)} shards like {paths[0]}, {len(lengths)} lengths")
        self.lengths = lengths

    def read(self, shard: int, start: int) -> Iterator[Example]:
        with _open(self.paths[shard]) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for number, (place, target) in enumerate(read_pairs(archive)):
                if number >= start:
                    file.seek(place.offset)
                    yield Example(file.read(place.size), target)


def is_url(path: str) -> bool:
    """Whether a path is no file of this machine."""
    return "://" in path


def _open(path: str) -> BinaryIO:
    """A file or a URL, open for reading."""
    import fsspec

    try:
        return fsspec.open(path, "rb").open()
    except (ImportError, ValueError) as error:
        # The package that a protocol needs is not there; or there is no such protocol.
        raise UserError(f"--data: cannot open {path}: {first_line(error)}") from error


def _in_threads(read: Callable[[str], Any], paths: Sequence[str]) -> list:
    """Read from every shard; the answers of a network overlap."""

    def call(path: str) -> Any:
        try:
            return read(path)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"--data: cannot read shard {path}: {first_line(error)}") from error

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(call, paths))


def _read_footer(path: str) -> tuple[int, Any]:
    from pyarrow.parquet import ParquetFile

    with _open(path) as stream, ParquetFile(stream) as file:
        return file.metadata.num_rows, file.schema_arrow


def _read_targets(path: str) -> list[int]:
    with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        return [target for _, target in read_pairs(archive)]


def find_parquet_shards(name: str) -> dict[str, Callable[[], Shards]]:
    """By split, what opens its shards."""
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise UserError(f"--data hfids/{name}: needs datasets; pip install 'vicinal[data]'") from error
    if Path(name).is_dir():
        files = find_parquet(Path(name), SPLITS)
    else:
        try:
            found = load_dataset_builder(name).config.data_files or {}
        except Exception as error:
            # Of the hub, or of the network: datasets has no common base for what it raises.
            raise UserError(f"--data hfids/{name}: {first_line(error)}") from error
        files = {split: _first_of(found, parts) for split, parts in SPLITS.items()}
    if not all(str(path).endswith(".parquet") for paths in files.values() for path in paths):
        raise UserError(f"--data hfids/{name}: its files are not parquet, which hfds/{name} reads too")
    return {split: partial(ParquetShards, paths) for split, paths in files.items() if paths}


def find_tar_shards(root: str) -> dict[str, Callable[[], Shards]]:
    """By split, what opens its shards: those that ``_info.json`` lists, or else those of a folder."""
    try:
        with _open(f"{root}/_info.json") as file:
            listed = json.load(file)["splits"]
    except FileNotFoundError:
        listed = {}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--data wds/{root}: cannot read its _info.json: {first_line(error)}") from error
    splits = {}
    for split, parts in SPLITS.items():
        own = dict(_first_of(listed, parts))
        paths = [f"{root}/{name}" for name in own.get("filenames", ())]
        if not is_url(root):
            folders = (Path(root, part).glob("*.tar") for part in parts)
            found = find_shards(Path(root), parts) or chain(*folders)
            paths = paths or sorted(map(str, found), key=natural_key)
        if paths:
            splits[split] = partial(TarShards, paths, own.get("shard_lengths"))
    return splits


def _first_of(splits: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What a mapping holds by the first of several names."""
    return next((splits[name] for name in names if name in splits), ())
