"""Streams: a dataset that is read as it goes and never stored; its own files are the shards.

What is cheap is read ahead: names, sizes and Parquet footers. Their formats say how rows are read.
"""

import contextlib
import functools
import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from PIL import Image

from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.fetchers import Fetchers
from pipeline.core.plan import Plan, Shard
from pipeline.sources import files
from pipeline.sources.base import SampleRow, Source, digest_of
from pipeline.sources.cells import open_cell
from pipeline.sources.files import reason_of_failure, system_of

# Threads that read footers while planning: each waits for its server most of the time.
PLANNERS = 32
# Rows at the head of files that are looked at before a run.
HEAD_ROWS = 64
# What a mark takes of either end of a file that no checksum is known of.
MARK_BYTES = 2**16

Found = TypeVar("Found")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    name: as it is recorded, relative to the dataset; url: where it is opened, a path too; mark: changes when
    the content does; groups: of a Parquet file the (rows, bytes) of each row group; rows: None where not known.
    """

    name: str
    url: str
    size: int
    mark: str
    groups: tuple[tuple[int, int], ...] = ()
    rows: int | None = None

    def cuts(self, most: int) -> tuple[int, ...] | None:
        """Where its shards end, each of up to `most` rows but for a row group that has more; None: one, to its end."""
        if self.rows is None:
            return None
        ends, start, stop = [], 0, 0
        for rows, _ in self.groups:
            if rows and start < stop and stop + rows - start > most:
                ends.append(stop)
                start = stop
            stop += rows
        return (*ends, self.rows)


@dataclass(frozen=True)
class Fields:
    """Which columns of a file, or fields of a sample, become what; `image` is None for any image of a tar."""

    image: str | None
    label: str | None
    kept: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StreamedSource(Source):
    """A source that is read file after file. `listed` has the files of each split, in order; `allowed` are the folders
    that image paths may lead to."""

    listed: Mapping[str, tuple[SourceFile, ...]]
    fields: Fields
    allowed: tuple[Path, ...] = ()

    @property
    def splits(self) -> Mapping[str, int | None]:
        return {split: total_rows(own) for split, own in self.listed.items()}

    def files(self, most: int) -> Mapping[str, Sequence[tuple[str, Sequence[int] | None]]]:
        return {split: [(file.name, file.cuts(most)) for file in own] for split, own in self.listed.items()}

    @functools.cached_property
    def _by_name(self) -> Mapping[tuple[str, str | None], SourceFile]:
        return {(split, file.name): file for split, own in self.listed.items() for file in own}

    def file_of(self, shard: Shard) -> SourceFile:
        """The file that a shard is of."""
        return self._by_name[shard.split, shard.file]

    @abstractmethod
    def head(self, shard: Shard) -> Iterator[pa.Table]:
        """The rows of a shard, a few at a time, for who stops early: little more is fetched than is asked for."""

    def sample(self, plan: Plan, shards: Sequence[Shard], count: int) -> Iterator[SampleRow]:
        del plan  # rows come as the files have them
        return itertools.islice(itertools.chain.from_iterable(map(self._head_rows, shards)), min(count, HEAD_ROWS))

    def _head_rows(self, shard: Shard) -> Iterator[SampleRow]:
        number = itertools.count(shard.start)
        for table in self.head(shard):
            for cell, label in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
                yield SampleRow(shard, next(number), cell, label)

    def open(self, cell: Any) -> Image.Image:
        return open_cell(cell, self.allowed)


def total_rows(listed: Iterable[SourceFile]) -> int | None:
    """The rows of some files, None where they are not known."""
    counts = [file.rows for file in listed]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def digest_of_files(listed: Mapping[str, Sequence[SourceFile]], fields: Fields) -> str:
    """Of the names, sizes and marks of all files, and what is read of them."""
    marks = (f"{split}/{file.name}:{file.size}:{file.mark}:{file.rows}" for split in listed for file in listed[split])
    return digest_of([*marks, repr(fields)])


def check_rows(listed: Mapping[str, Sequence[SourceFile]]) -> None:
    """Refuse a split that is known to have no row.

    Raises:
        ConfigError: there is one.
    """
    for split, own in listed.items():
        if total_rows(own) == 0:
            raise ConfigError(f"source: split {split} is empty.")


def measured(
    found: Sequence[tuple[str, str]], limit: int | None, look: Callable[[SourceFile], tuple[SourceFile, Found]]
) -> Iterator[tuple[SourceFile, Found]]:
    """The files of a split, by name and URL, with their sizes, marks and what a look into each has found.

    Raises:
        ConfigError: one cannot be read, or its size is not known.
    """
    # A limit is met by a few files as a rule, of which no more are looked at than there are threads.
    for start in range(0, len(found), PLANNERS if limit else len(found)):
        some = found[start : start + PLANNERS] if limit else found
        with contextlib.closing(Fetchers(min(PLANNERS, len(some)))) as pool:
            futures = [pool.submit(functools.partial(_measure, name, url, look)) for name, url in some]
            for (name, _), future in zip(some, futures, strict=True):
                with planning(name):
                    measurement = future.result(files.SILENT_SECONDS)
                yield measurement


def _measure(name: str, url: str, look: Callable[[SourceFile], tuple[SourceFile, Found]]) -> tuple[SourceFile, Found]:
    with planning(name):
        return look(measure(name, url))


def measure(name: str, url: str) -> SourceFile:
    """A file with its size and a mark of its content.

    Raises:
        ConfigError: its size is not known.
    """
    system, path = system_of(url)
    info = system.info(path)
    if info.get("size") is None:
        raise ConfigError(f"source: the server does not say how large {name} is, so it cannot be streamed.")
    file = SourceFile(name, url, int(info["size"]), "")
    # The Hub's name of the content; what stores and servers call its tag or checksum.
    keys = ("blob_id", "ETag", "etag", "Content-MD5", "Digest")
    return replace(file, mark=next((str(info[key]) for key in keys if info.get(key)), None) or _ends(file))


def up_to(limit: int | None, found: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """The files, with a limit the first that hold so many rows."""
    taken: list[SourceFile] = []
    rows = 0
    for file in found:
        taken.append(file)
        rows += file.rows or 0
        if limit is not None and rows >= limit:
            break
    return tuple(taken)


def _ends(file: SourceFile) -> str:
    """A digest of the first and the last bytes of a file, where a Parquet footer lies; no time enters it."""
    with opened(file) as handle:
        head = handle.read(MARK_BYTES)
        handle.seek(max(0, file.size - MARK_BYTES))
        return hashlib.sha256(head + handle.read(MARK_BYTES)).hexdigest()


def opened(file: SourceFile, **options: Any) -> Any:
    """A handle that fetches what is read and nothing else, unless the options say otherwise."""
    system, path = system_of(file.url)
    options = {"cache_type": "none", **options}
    if file.url.startswith(("http://", "https://")):
        options["size"] = file.size  # or it would be asked again
    return system.open(path, "rb", **options)


@contextlib.contextmanager
def planning(name: str) -> Iterator[None]:
    """What goes wrong with a file before a run, as one sentence that names it."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # a dozen file systems, each with errors of its own
        raise ConfigError(f"source: {name} cannot be read: {reason_of_failure(error)}") from error


@contextlib.contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """What goes wrong in a file during a run, as one sentence that names it."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # as in planning
        raise PipelineError(
            f"source: {file.name} cannot be read ({reason_of_failure(error)}); what was committed is kept, and the "
            "same command goes on from there."
        ) from error
