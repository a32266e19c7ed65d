"""Files that a stream is read from, on a disk or behind URLs: parquet, and WebDataset's tar files."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from ...errors import UserError, first_line
from .readers import (
    INFO,
    MAX_CLASSES,
    check_class_names,
    find_parquet,
    find_tars,
    read_info,
    read_pairs,
)
from .splits import LeftOut, name_parts


class Example(NamedTuple):
    """An encoded image and its class index."""

    content: bytes
    target: int


class Shards(Protocol):
    """Files of examples.

    Attributes:
        paths: of the files.
        lengths: images of each.
        classes: names by index, where the files say them.
        left_out: a line for each reason why something in them is not read, as far as it is known.
    """

    paths: Sequence[str]
    lengths: Sequence[int]
    classes: Sequence[str] | None
    left_out: Sequence[str]

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
        self.lengths, self.left_out = [rows for rows, _ in footers], []
        check_class_names({path: schema for path, (_, schema) in zip(self.paths, footers, strict=True)})
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
                            content = image.get("bytes") if isinstance(image, dict) else image
                            yield Example(content, row["label"])
                first += count


class TarShards:
    """WebDataset's tar files.

    Args:
        lengths: images of each; found by reading their headers if not given.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int] | None = None):
        self.paths, self.classes, self.left_out = list(paths), None, []
        if lengths is None:
            found = _in_threads(_read_targets, self.paths)
            lengths = [len(own) for own, _ in found]
            self.left_out = [line for _, lines in found for line in lines]
            largest = max((max(own) for own, _ in found if own), default=-1)
            if largest >= MAX_CLASSES:
                path = next(path for path, (own, _) in zip(self.paths, found, strict=True) if largest in own)
                raise UserError(f"--data: an image of {path} is of class {largest}; 0 to {MAX_CLASSES - 1} are allowed")
            self.classes = [str(index) for index in range(largest + 1)]
        if len(lengths) != len(paths):
            raise UserError(f"--data: {INFO} lists {len(paths)} shards like {paths[0]}, {len(lengths)} lengths")
        self.lengths = lengths

    def read(self, shard: int, start: int) -> Iterator[Example]:
        with _open(self.paths[shard]) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            pairs = read_pairs(archive)
            for number, (place, target) in enumerate(pairs):
                if number >= start:
                    file.seek(place.offset)
                    example = Example(file.read(place.size), target)
                    # What comes behind it is looked at before it is given away: its number may be that of the last.
                    if number == self.lengths[shard] - 1 and next(pairs, None) is not None:
                        raise tarfile.ReadError(f"the shard holds more than the {number + 1} images of {INFO}")
                    yield example


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


def read_schemas(paths: Sequence[str]) -> dict[str, Any]:
    """pyarrow's schemas of parquet files, by file."""
    return {path: schema for path, (_, schema) in zip(paths, _in_threads(_read_footer, paths), strict=True)}


def _read_targets(path: str) -> tuple[list[int], list[str]]:
    left_out = LeftOut()
    with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        return [target for _, target in read_pairs(archive, left_out)], left_out.lines(path)


def find_parquet_shards(name: str) -> dict[str | None, Callable[[], Shards]]:
    """By the part that they name, what opens the shards of it."""
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise UserError(f"--data hfids/{name}: needs datasets; pip install 'vicinal[data]'") from error
    if Path(name).is_dir():
        files = find_parquet(Path(name))
    else:
        try:
            data_files = load_dataset_builder(name).config.data_files or {}
        except Exception as error:
            # Of the hub, or of the network: datasets has no common base for what it raises.
            raise UserError(f"--data hfids/{name}: {first_line(error)}") from error
        found = {str(split): list(paths) for split, paths in data_files.items()}
        files = {part: found[split] for part, split in name_parts(found).items()}
    if not all(str(path).endswith(".parquet") for paths in files.values() for path in paths):
        raise UserError(f"--data hfids/{name}: its files are not parquet, which hfds/{name} reads too")
    return {part: partial(ParquetShards, paths) for part, paths in files.items() if paths}


def find_tar_shards(root: str) -> dict[str | None, Callable[[], Shards]]:
    """By the part that they name, what opens its shards: those that ``_info.json`` lists, or else those of a folder."""
    splits, listed = {}, _read_info(root)
    if not is_url(root) and Path(root).is_dir():
        found = find_tars(Path(root), depth=2)
        splits = {part: partial(TarShards, [str(path) for path in paths]) for part, paths in found.items()}
    for part, name in name_parts(listed).items():
        names, lengths = listed[name]
        if names:
            splits[part] = partial(TarShards, [f"{root}/{name}" for name in names], lengths)
    return splits


def _read_info(root: str) -> dict[str, tuple[list[str], list[int] | None]]:
    if not is_url(root):
        return read_info(root) if Path(root, INFO).is_file() else {}
    try:
        with _open(f"{root}/{INFO}") as file:
            content = file.read()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"--data wds/{root}: cannot read its {INFO}: {first_line(error)}") from error
    return read_info(root, content)
