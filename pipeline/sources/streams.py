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

from pipeline.core.errors import ConfigError, explained
from pipeline.core.fetchers import Fetchers, in_order
from pipeline.core.plan import Plan, Shard
from pipeline.sources import files
from pipeline.sources.base import SampleRow, Source, digest_of
from pipeline.sources.cells import open_cell
from pipeline.sources.columns import Fields
from pipeline.sources.files import Listing, system_of

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


Streamed = TypeVar("Streamed", bound=StreamedSource)


def make_streamed(
    kind: type[Streamed], listing: Listing, listed: Mapping[str, tuple[SourceFile, ...]], fields: Fields, **more: Any
) -> Streamed:
    """The source of some files that were looked at; `more` is what only its kind knows."""
    for split, own in listed.items():
        if total_rows(own) == 0:
            raise ConfigError(f"source: split {split} is empty.")
    marks = (f"{split}/{file.name}:{file.size}:{file.mark}:{file.rows}" for split in listed for file in listed[split])
    return kind(
        digest=digest_of([*marks, repr(fields)]),
        origin=listing.origin,
        listed=listed,
        fields=fields,
        allowed=listing.allowed,
        **more,
    )


def measured(
    found: Sequence[tuple[str, str]], look: Callable[[SourceFile], tuple[SourceFile, Found]]
) -> Iterator[tuple[SourceFile, Found]]:
    """The files of a split, by name and URL, with their sizes, marks and what a look into each has found."""
    with contextlib.closing(Fetchers(min(PLANNERS, len(found)))) as pool:
        # With a limit who asks stops after a few: no more than PLANNERS are looked at in vain.
        looks = in_order(found, lambda file: pool.submit(lambda: look(measure(*file))), PLANNERS)
        for (name, _), future in looks:
            with planning(name):
                measurement = future.result(files.SILENT_SECONDS)
            yield measurement


def measure(name: str, url: str) -> SourceFile:
    """A file with its size and a mark of its content; a ConfigError where its size is not known."""
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


def planning(name: str) -> contextlib.AbstractContextManager[None]:
    """Explains what goes wrong with a file before a run: a dozen file systems have errors of their own."""
    return explained(f"source: {name} cannot be read", kind=ConfigError)


def reading(file: SourceFile) -> contextlib.AbstractContextManager[None]:
    """Explains what goes wrong in a file during a run."""
    kept = "finished shards are kept; run the same command again to resume"
    return explained(f"source: {file.name} cannot be read", kept)
