"""Parquet files that are streamed: footers are read ahead, then row groups, several of them on their way at a time."""

import contextlib
import functools
import itertools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError, RowError
from pipeline.core.fetchers import Fetchers, in_order
from pipeline.core.plan import Plan, Shard
from pipeline.sources import files
from pipeline.sources.base import Read, check_labels, class_names, joined
from pipeline.sources.cells import image_cells
from pipeline.sources.columns import cast_kept, classes_of, find_columns, is_text, label_indices, plain_type
from pipeline.sources.files import Listing
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.streams import (
    SourceFile,
    StreamedSource,
    make_streamed,
    measured,
    opened,
    reading,
    up_to,
)

# Threads that fetch row groups, and the bytes of them that may be on their way or wait to be decoded: one at least.
FETCHERS = 4
BYTES_AHEAD = 256 * 2**20
# A row group is waited for as long as a connection that does so many bytes a second takes for all that are coming.
SLOW_BYTES = 100_000
# Rows of a table at the head of a file, and the bytes that are fetched at once for it.
TABLE_ROWS = 32
HEAD_BUFFER = 2**18


def open_parquet(config: HuggingFaceConfig, listing: Listing, *, need_labels: bool) -> "ParquetSource":
    """Read the footers of Parquet files, and find the columns that are used. Errors are those of
    `open_source`."""
    # Of files with the same schema that of the first.
    schemas: dict[bytes, tuple[str, pa.Schema]] = {}

    def noting(found: Sequence[tuple[str, str]]) -> Iterator[SourceFile]:
        for file, schema in measured(found, _look):
            schemas.setdefault(schema.serialize().to_pybytes(), (file.name, schema))
            yield file

    listed = {split: up_to(config.limit, noting(found)) for split, found in listing.files.items()}
    fields, features = find_columns(dict(schemas.values()), listing.features, config, need_labels)
    classes = class_names(config, classes_of(features.get(fields.label or "")))
    for _, schema in schemas.values():
        kind = plain_type(schema.field(fields.image).type)
        if not _holds_images(kind):
            hint = " (text, such as base64 or paths, must become the images' bytes first)" if is_text(kind) else ""
            raise ConfigError(f"source.image_column: {fields.image} does not hold images but {kind}{hint}.")
        if fields.label and classes is None and is_text(plain_type(schema.field(fields.label).type)):
            raise ConfigError(
                f"source.classes: column {fields.label} holds strings; name the classes, as a streamed source is not "
                "read ahead to find them."
            )
    kept = {name: features[name] for name in fields.kept}
    return make_streamed(ParquetSource, listing, listed, fields, classes=classes, kept=kept, need_labels=need_labels)


def _look(file: SourceFile) -> tuple[SourceFile, pa.Schema]:
    footer = _footer(file)
    return replace(file, rows=footer.num_rows, groups=_groups(footer)), footer.schema.to_arrow_schema()


def _footer(file: SourceFile) -> pq.FileMetaData:
    with opened(file) as handle:
        return pq.read_metadata(handle)


def _groups(footer: pq.FileMetaData) -> tuple[tuple[int, int], ...]:
    """The rows and bytes of each row group."""
    groups = map(footer.row_group, range(footer.num_row_groups))
    return tuple((group.num_rows, group.total_byte_size) for group in groups)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass(frozen=True, kw_only=True)
class ParquetSource(StreamedSource):
    """Parquet files, of which the footers are known."""

    @property
    def columns(self) -> list[str]:
        """Those that are read, the image first."""
        fields = self.fields
        return [str(fields.image), *([fields.label] if fields.label else []), *fields.kept]

    def head(self, shard: Shard) -> Iterator[pa.Table]:
        file = self.file_of(shard)
        with reading(file), opened(file) as handle:
            # Buffered, a page at a time: a row group may be a hundred megabytes.
            parquet = pq.ParquetFile(handle, buffer_size=HEAD_BUFFER, pre_buffer=False)
            for group, _, _ in _groups_of(file, shard):
                for batch in parquet.iter_batches(TABLE_ROWS, [group], self.columns, use_threads=False):
                    yield _normalised(self, file, pa.Table.from_batches([batch]))

    def tables(self, plan: Plan, shards: Sequence[Shard]) -> Generator[Read, None, None]:
        with contextlib.closing(Fetchers(FETCHERS)) as pool:
            fetching = in_order(
                self._row_groups(shards, pool),
                lambda group: pool.submit(functools.partial(self._fetch, group)),
                BYTES_AHEAD,
                lambda group: max(group.size, BYTES_AHEAD / (2 * FETCHERS)),
            )
            for group, future in fetching:
                with reading(group.file):
                    # As many as there are fetchers share the line.
                    rows = future.result(files.SILENT_SECONDS + FETCHERS * group.size / SLOW_BYTES)
                yield group.shard, rows, ()

    def _row_groups(self, shards: Sequence[Shard], pool: Fetchers) -> Iterator["_RowGroup"]:
        """The row groups of some shards; of a shard without any, one of no rows."""
        for file, own in itertools.groupby(shards, self.file_of):
            # Before its row groups, which wait for it: threads take what they do in turn.
            footer = pool.submit(functools.partial(_footer, file))
            for shard in own:
                groups = [*_groups_of(file, shard)] or [(None, 0, 0)]
                yield from (_RowGroup(shard, file, footer, *group) for group in groups)

    def _fetch(self, group: "_RowGroup") -> pa.Table:
        footer = group.footer.result()
        if _groups(footer) != group.file.groups:
            raise PipelineError(f"source: {group.file.name} has changed since the run was planned.")
        if group.number is None:
            rows = footer.schema.to_arrow_schema().empty_table().select(self.columns)
        else:
            rows = _row_group(group.file, footer, group.number, self.columns)
        return _normalised(self, group.file, rows.slice(0, group.rows))


class _RowGroup(NamedTuple):
    """A row group of a shard: its number in the file, its bytes, and how many of its rows are of the shard."""

    shard: Shard
    file: SourceFile
    footer: Future[pq.FileMetaData]
    number: int | None
    size: int
    rows: int


def _groups_of(file: SourceFile, shard: Shard) -> Iterator[tuple[int | None, int, int]]:
    """The row groups of a shard: numbers, bytes, and how many rows of each are of the shard, which may be cut short."""
    start, stop = 0, shard.start + len(shard)
    for number, (rows, size) in enumerate(file.groups):
        if rows and shard.start <= start < stop:
            yield number, size, stop - start
        start += rows


def _row_group(file: SourceFile, metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group; those that lie together are one request."""
    with opened(file) as handle:
        parquet = pq.ParquetFile(handle, metadata=metadata, pre_buffer=True)
        return parquet.read_row_group(group, columns, use_threads=False)


def _normalised(source: ParquetSource, file: SourceFile, rows: pa.Table) -> pa.Table:
    """Rows as every reader has them: image cells, labels, kept columns."""
    fields = source.fields
    # Dictionaries and views become what they stand for, which is what everything from here on knows.
    rows = rows.replace_schema_metadata(None)
    rows = rows.cast(pa.schema([column.with_type(plain_type(column.type)) for column in rows.schema]))
    labels = np.full(rows.num_rows, UNLABELLED)
    if fields.label is not None:
        labels = label_indices(rows.column(fields.label), source.classes, file.name, RowError)
        check_labels(labels, file.name, RowError)
    kept = cast_kept(rows.select(list(fields.kept)), source.kept)
    return joined(image_cells(rows.column(str(fields.image))), labels, kept)
