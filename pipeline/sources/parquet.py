"""Parquet files that are streamed: footers are read ahead, then row groups, several of them on their way at a time."""

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.sources import HuggingFaceConfig
from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError, RowError
from pipeline.core.fetchers import Fetchers
from pipeline.core.plan import Plan, Shard
from pipeline.sources import files
from pipeline.sources.base import Read, class_names, joined
from pipeline.sources.cells import CELL
from pipeline.sources.columns import find_columns, plain_type
from pipeline.sources.files import Listing
from pipeline.sources.streams import (
    Fields,
    SourceFile,
    StreamedSource,
    check_rows,
    digest_of_files,
    measured,
    opened,
    reading,
    up_to,
)

# Threads that fetch row groups, and the bytes of them that may be on their way or wait to be decoded: one at least.
FETCHERS = 4
BYTES_AHEAD = 256 * 2**20
# Row groups that are on their way all together are waited for longer where they are large: a connection that does so
# many bytes a second is slow.
SLOW_BYTES = 100_000
# Rows of a table at the head of a file, and the bytes that are fetched at once for it.
TABLE_ROWS = 32
HEAD_BUFFER = 2**18


def open_parquet(config: HuggingFaceConfig, listing: Listing, *, need_labels: bool, max_pixels: int) -> "ParquetSource":
    """Read the footers of Parquet files, and find the columns that are used.

    Raises:
        ConfigError: a file cannot be read, a split has no rows, or a column is missing or differs between files.
    """
    del max_pixels  # the decoder minds it
    # Of files with the same schema that of the first.
    schemas: dict[bytes, tuple[str, pa.Schema]] = {}

    def noting(found: Sequence[tuple[str, str]]) -> Iterator[SourceFile]:
        for file, schema in measured(found, config.limit, _look):
            schemas.setdefault(schema.serialize().to_pybytes(), (file.name, schema))
            yield file

    listed = {split: up_to(config.limit, noting(found)) for split, found in listing.files.items()}
    check_rows(listed)
    fields, kept, own = _find_fields(dict(schemas.values()), listing.features, config, need_labels)
    return ParquetSource(
        classes=class_names(config, own),
        digest=digest_of_files(listed, fields),
        kept=kept,
        origin=listing.origin,
        need_labels=need_labels,
        listed=listed,
        fields=fields,
        allowed=listing.allowed,
    )


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


def _find_fields(
    schemas: Mapping[str, pa.Schema], stated: Mapping[str, Any] | None, config: HuggingFaceConfig, need_labels: bool
) -> tuple[Fields, dict[str, Any], Sequence[str] | None]:
    """What is read of Parquet files, the features of kept columns, and the class names if they have them."""
    import datasets

    columns = find_columns(schemas, stated, config, need_labels)
    image, label = columns.image, columns.label
    names = None
    if label is not None and isinstance(columns.features[label], datasets.ClassLabel):
        names = columns.features[label].names
    for schema in schemas.values():
        kind = plain_type(schema.field(image).type)
        if not _holds_images(kind):
            hint = " (text, such as base64 or paths, must become the images' bytes first)" if _is_text(kind) else ""
            raise ConfigError(f"source.image_column: {image} does not hold images but {kind}{hint}.")
        kind = plain_type(schema.field(label).type) if label is not None else pa.int64()
        if _is_text(kind) and names is None and config.classes is None:
            raise ConfigError(
                f"source.classes: column {label} holds strings; name the classes, as a streamed source is not read "
                "ahead to find them."
            )
        if not (_is_text(kind) or pa.types.is_integer(kind)):
            raise ConfigError(f"source.label_column: {label} holds {kind}; labels are integers or strings.")
    kept = {name: columns.features[name] for name in config.keep_columns}
    return Fields(image, label, config.keep_columns), kept, names


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


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
            for group, _ in _groups_of(file, shard):
                for batch in parquet.iter_batches(TABLE_ROWS, [group], self.columns, use_threads=False):
                    yield _normalised(self, file, pa.Table.from_batches([batch]))

    def tables(self, plan: Plan, shards: Sequence[Shard]) -> Generator[Read, None, None]:
        del plan  # rows come as the files have them
        with contextlib.closing(Fetchers(FETCHERS)) as pool:
            waiting: deque[tuple[Shard, int, Future[pa.Table]]] = deque()
            coming, calls = 0, self._calls(shards)
            call = next(calls, None)
            while waiting or call is not None:
                while call is not None and (
                    not waiting or (coming + call[1] <= BYTES_AHEAD and len(waiting) < 2 * FETCHERS)
                ):
                    waiting.append((call[0], call[1], pool.submit(call[2])))
                    coming += call[1]
                    call = next(calls, None)
                shard, size, future = waiting.popleft()
                with reading(self.file_of(shard)):
                    rows = future.result(files.SILENT_SECONDS + coming / SLOW_BYTES)
                yield shard, rows, ()
                coming -= size

    def _calls(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, int, Callable[[], pa.Table]]]:
        """What fetches each row group of some shards, and its bytes; of a shard without any, what fetches no rows."""
        # Row groups of a file follow each other, so a few footers are enough.
        footer, one_by_one = functools.lru_cache(maxsize=2 * FETCHERS)(_footer), threading.Lock()

        def fetch(shard: Shard, group: int | None) -> pa.Table:
            file = self.file_of(shard)
            with reading(file):
                with one_by_one:
                    metadata = footer(file)
                return _normalised(self, file, self._fetch(shard, metadata, group))

        for shard in shards:
            groups: list[tuple[int | None, int]] = [*_groups_of(self.file_of(shard), shard)] or [(None, 0)]
            for group, size in groups:
                yield shard, size, functools.partial(fetch, shard, group)

    def _fetch(self, shard: Shard, metadata: pq.FileMetaData, group: int | None) -> pa.Table:
        file = self.file_of(shard)
        if _groups(metadata) != file.groups:
            raise PipelineError(f"source: {file.name} has changed since the run was planned.")
        if group is None:
            return metadata.schema.to_arrow_schema().empty_table().select(self.columns)
        rows = _row_group(file, metadata, group, self.columns)
        if shard.stop is None:
            return rows
        return rows.slice(0, shard.stop - sum(count for count, _ in file.groups[:group]))


def _groups_of(file: SourceFile, shard: Shard) -> Iterator[tuple[int, int]]:
    """The row groups of a shard, which ends where they do, and their bytes."""
    start = 0
    for group, (rows, size) in enumerate(file.groups):
        if rows and start >= shard.start and (shard.stop is None or start < shard.stop):
            yield group, size
        start += rows


def _row_group(file: SourceFile, metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group; those that lie together are one request."""
    with opened(file) as handle:
        parquet = pq.ParquetFile(handle, metadata=metadata, pre_buffer=True)
        return parquet.read_row_group(group, columns, use_threads=False)


def _normalised(source: ParquetSource, file: SourceFile, rows: pa.Table) -> pa.Table:
    """Rows as every reader has them: image cells, labels, kept columns."""
    import datasets
    from datasets.table import table_cast

    fields = source.fields
    # Dictionaries and views become what they stand for, which is what everything from here on knows.
    rows = rows.replace_schema_metadata(None)
    rows = rows.cast(pa.schema([column.with_type(plain_type(column.type)) for column in rows.schema]))
    image, labels = rows.column(str(fields.image)), np.full(rows.num_rows, UNLABELLED)
    # Not combined: a row group may hold more bytes than one array of them can.
    cells = pa.chunked_array([datasets.Image().cast_storage(chunk) for chunk in image.chunks], CELL)
    if fields.label is not None:
        labels = _indices(source, file, rows.column(fields.label))
    kept = table_cast(rows.select(list(fields.kept)), datasets.Features(source.kept).arrow_schema)
    return joined(cells, labels, kept.replace_schema_metadata(None))


def _indices(source: ParquetSource, file: SourceFile, column: pa.ChunkedArray) -> Any:
    if _is_text(column.type):
        known = pa.array(source.classes or (), column.type)
        indices = pc.index_in(column, known)
        unknown = pc.and_(pc.is_null(indices), pc.is_valid(column))
        if pc.any(unknown, min_count=0).as_py():
            text = column.filter(unknown)[0].as_py()
            raise RowError(f"source.classes: the label {text!r} in {file.name} is not among them.")
        column = indices
    labels = pc.fill_null(column.cast(pa.int64()), UNLABELLED).to_numpy()
    if len(labels) and labels.min() < UNLABELLED:
        raise RowError(
            f"source: {file.name} has a label {labels.min()}; labels are 0 or more, and -1 or null for unlabelled."
        )
    return labels
