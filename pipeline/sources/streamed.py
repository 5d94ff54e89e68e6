"""Streams: a dataset that is read as it goes and never stored; its own files are the shards.

What is cheap is read ahead: names, sizes and Parquet footers. A Parquet file is then read by row groups, several of
them on their way at a time; a WebDataset tar member by member, front to back. Rows come as tables whose first two
columns are the encoded image and the label; those that are carried through follow.
"""

import bz2
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import lzma
import posixpath
import queue
import re
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.schema import MOST_PIXELS, SourceConfig
from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError, RowError, first_line
from pipeline.core.images import is_image_name
from pipeline.core.left_out import LeftOut, Tally
from pipeline.core.redaction import printable
from pipeline.sources.mapped import (
    LITTER_REASON,
    Source,
    chosen_splits,
    class_names,
    digest_of,
    file_names,
    find_columns,
    is_litter,
    local_builder,
    own_files,
    plain_type,
    stated_features,
)
from pipeline.sources.origins import Origin, card_license

# Threads that read footers while planning: each waits for its server most of the time.
PLANNERS = 32
# Threads that fetch row groups, and the bytes of them that may be on their way or wait to be decoded: one at least.
FETCHERS = 4
BYTES_AHEAD = 256 * 2**20
# Seconds after which a server that says nothing has failed: it may have accepted, and hang. Of row groups that are on
# their way all together, these and more where they are large: a connection that does so many bytes a second is slow.
SILENT_SECONDS = 300.0
SLOW_BYTES = 100_000
# What fsspec takes for signs of a glob. (In an address of HTTP ? would begin a query, which the config refuses.)
GLOB_SIGNS = "*?["
# What may lie between two columns that are fetched at once.
GAP_BYTES = 2**20
# Rows and bytes of a table out of a tar, of which two wait.
TAR_ROWS = 256
TAR_BYTES = 16 * 2**20
TAR_BLOCK = 4 * 2**20
# Bytes that a header of a tar may take for long names and the like, and a label or a text of a sample. An image may
# have as many as its pixels take where nothing compresses them, in four channels, and as many more as a text.
HEADER_BYTES = 2**20
TEXT_BYTES = 16 * 2**20
PIXEL_BYTES = 4
# Of a compressed tar nobody knows how long it is; what one member may claim.
MOST_UNPACKED = 2**34
# Characters of a member's name that are kept.
NAME_LENGTH = 200
# Links that lead to links.
MOST_LINKS = 40
# Samples at the head of a tar that are looked at for what samples hold.
HEAD_SAMPLES = 64
# What a mark takes of either end of a file that no checksum is known of.
MARK_BYTES = 2**16
# Rows of a table at the head of a file, and the bytes that are fetched at once for it.
HEAD_ROWS = 32
HEAD_BUFFER = 2**18

# The local file system, as fsspec names it.
LOCAL = ("file", ("file", "local"))
PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIXES = (".tar", *(f".{name}" for name in ("tar.gz", "tgz", "tar.bz2", "tbz2", "tar.xz", "txz", "tar.zst")))
# How a compressed file begins, whatever it is called, and what reads it.
UNPACK: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}
CLASS_FIELD, KEY = "cls", "__key__"
# The name of a member of a sample: the sample's own, which may have folders, and the field.
MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)")
# In a tar these would seem to be samples.
TAR_LITTER = ("thumbs.db", "desktop.ini")
# What explains samples that lack a part.
SIDE_BY_SIDE = "(The files of a sample must lie side by side in a tar, as `tar --sort=name` puts them.)"
CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})

Item = TypeVar("Item")
Kind = Literal["parquet", "tar"]


@dataclass(frozen=True)
class StreamedFile:
    """One file of a source.

    name: as it is recorded, relative to the dataset; place: where it is opened, a path or a URL; mark: changes when
    the content does; groups: of a Parquet file the (rows, bytes) of each row group; rows: None where not known.
    """

    name: str
    place: str
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


@dataclass(frozen=True)
class StreamedSource(Source):
    """A source whose rows are not known ahead; `splits` is empty, and `files` has those of each split, in order.

    `allowed` are the folders that image paths may lead to; `need_labels` makes an unlabelled row an error; `most_bytes`
    is what an image in a tar may have.
    """

    files: Mapping[str, tuple[StreamedFile, ...]] = field(default_factory=dict)
    kind: Kind = "parquet"
    fields: Fields = Fields(None, None, ())
    names: tuple[str, ...] | None = None
    need_labels: bool = True
    allowed: tuple[Path, ...] = ()
    most_bytes: int = TEXT_BYTES + PIXEL_BYTES * MOST_PIXELS

    @functools.cached_property
    def by_name(self) -> Mapping[tuple[str, str], StreamedFile]:
        """The files by split and name."""
        return {(split, file.name): file for split, files in self.files.items() for file in files}

    def split_rows(self) -> dict[str, int | None]:
        """Rows of each split, None where they are not known."""
        return {split: _total(file.rows for file in files) for split, files in self.files.items()}


def _total(rows: Iterable[int | None]) -> int | None:
    total = 0
    for count in rows:
        if count is None:
            return None
        total += count
    return total


# ---------------------------------------------------------------------------------------------- planning


def open_stream(config: SourceConfig, *, need_labels: bool, max_pixels: int = MOST_PIXELS) -> StreamedSource:
    """Find the files of a source that is streamed, and what their rows hold.

    Args:
        config: the `source` section.
        need_labels: whether a row without a label is an error.
        max_pixels: of an image; what claims more bytes than so many pixels can take is not read.

    Raises:
        ConfigError: it is not there, is empty, is neither Parquet nor WebDataset, or lacks the splits or columns that
            are asked for.
    """
    found, features, origin = _resolve(config)
    kind = _kind(found)
    files: dict[str, tuple[StreamedFile, ...]] = {}
    schemas: dict[str, pa.Schema] = {}
    for split, listed in file_names(found).items():
        files[split] = _measured(listed, kind, config.limit, schemas)
        if _total(file.rows for file in files[split]) == 0:
            raise ConfigError(f"source: split {split} is empty.")
    if kind == "tar":
        fields, kept, own = _tar_fields(itertools.chain(*files.values()), config, need_labels)
    else:
        fields, kept, own = _parquet_fields(schemas, features, config, need_labels)
    folder = Path(str(config.path)).expanduser()
    marks = (f"{split}/{file.name}:{file.size}:{file.mark}:{file.rows}" for split in files for file in files[split])
    return StreamedSource(
        splits=(),
        classes=class_names(config, own),
        digest=digest_of([*marks, repr(fields)]),
        kept=kept,
        origin=origin,
        files=files,
        kind=kind,
        fields=fields,
        names=class_names(config, own),
        need_labels=need_labels,
        allowed=(folder.resolve(),) if folder.is_dir() else (),
        most_bytes=TEXT_BYTES + PIXEL_BYTES * max_pixels,
    )


def _resolve(config: SourceConfig) -> tuple[dict[str, list[tuple[str, str]]], Any, Origin]:
    """The (name, place) of the files of each wanted split, the features if they are known, and where it is from."""
    path = str(config.path)
    if "://" in path:
        names = config.split or ("train",)
        if len(names) > 1:
            raise ConfigError("source.split: the files of a URL are one split; name one, which they are to be called.")
        return {names[0]: _listed(path)}, None, Origin(name=_url_folder(path).rstrip("/").rpartition("/")[2] or None)
    return _built(config, path)


def _listed(url: str) -> list[tuple[str, str]]:
    """The files that a URL or a glob names, sorted, each with its name relative to what the glob has no choice in."""
    if re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}", url):
        raise ConfigError(f"source.path: braces are not expanded, as in {url}; write * in their place.")
    try:
        system, path = _system_of(url)
        found = sorted(_answered(lambda: system.glob(path))) if set(GLOB_SIGNS) & set(path) else [path]
    except Exception as error:  # a dozen file systems, each with errors of its own
        raise ConfigError(f"source.path: {url} cannot be listed: {_reason(error)}") from error
    if not found:
        raise ConfigError(f"source.path: {url} names no file.")
    folder = _url_folder(path)
    places = [system.unstrip_protocol(place) for place in found]
    return [(name.removeprefix(folder), place) for name, place in zip(found, places, strict=True)]


def _system_of(place: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it. HTTP's client minds silence, not how long a file takes."""
    options: dict[str, Any] = {}
    if place.startswith(("http://", "https://")):
        import aiohttp  # fsspec's client

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    found: tuple[Any, str] = fsspec.url_to_fs(place, **options)
    return found


def _answered(call: Callable[[], Item]) -> Item:
    """What a server answers to one question.

    Raises:
        TimeoutError: it does not.
    """
    with contextlib.closing(_Fetchers(1)) as pool:
        return pool.submit(call).result(SILENT_SECONDS)


def _reason(error: BaseException) -> str:
    """What went wrong, for a person: of time that is over clients say nothing."""
    return "the server does not answer" if isinstance(error, TimeoutError) else first_line(error)


def _url_folder(path: str) -> str:
    """The part of a path or URL before its file name, or before the first part with a glob in it."""
    fixed = re.split(f"[{re.escape(GLOB_SIGNS)}]", path)[0]
    return fixed[: fixed.rfind("/") + 1]


def _built(config: SourceConfig, path: str) -> tuple[dict[str, list[tuple[str, str]]], Any, Origin]:
    """As `_resolve`, for a dataset of the Hub or a local folder, as `datasets` finds its files."""
    import datasets
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path).expanduser()
    local = folder.is_dir()
    if not local and (path.startswith((".", "~", "/")) or path.count("/") > 1):
        raise ConfigError(f"source.path: there is no folder {folder}.")
    load = functools.partial(datasets.load_dataset_builder, path, config.name, revision=config.revision)
    if local:
        load = functools.partial(local_builder, folder, config.name)
    try:
        builder = load() if local else _answered(load)
        features = stated_features(builder, load)
    except ConfigError:
        raise
    except Exception as error:  # as in sources: all mean the same here
        looked = "" if local else " (no such local folder, so it was looked up on the Hub)"
        raise ConfigError(f"source.path: {path} cannot be opened{looked}: {_reason(error)}") from error
    there = own_files(builder, config)
    if not there:
        raise ConfigError(f"source.path: {path} is not made of files that can be streamed; leave out source.streaming.")
    found = {split: there[split] for split in chosen_splits(config, list(there))}
    stated = str(builder.info.license or "").strip() or None
    if local:
        return (
            found,
            features,
            Origin(name=folder.resolve().name, license=card_license(folder / "README.md")),
        )
    commit = next((match[1] for match in re.finditer(r"@([0-9a-f]{40})/", next(iter(found.values()))[0][1])), None)
    # `datasets` has just read the card of that commit.
    card = try_to_load_from_cache(path, "README.md", repo_type="dataset", revision=commit)
    license_ = stated or (card_license(Path(card)) if isinstance(card, str) else None)
    return (
        found,
        features,
        Origin(name=path.rpartition("/")[2], repository=path, revision=commit, license=license_),
    )


def _kind(found: Mapping[str, Sequence[tuple[str, str]]]) -> Kind:
    names = [name for files in found.values() for name, _ in files]
    kinds: dict[Kind, tuple[str, ...]] = {"parquet": PARQUET_SUFFIXES, "tar": TAR_SUFFIXES}
    for kind, suffixes in kinds.items():
        if names[0].lower().endswith(suffixes):
            other = next((name for name in names if not name.lower().endswith(suffixes)), None)
            if other is None:
                return kind
            raise ConfigError(f"source.path: {names[0]} and {other} are of two kinds; a streamed source is of one.")
    raise ConfigError(
        f"source.path: {names[0]} is neither Parquet nor a WebDataset .tar, the kinds that can be streamed; "
        "leave out source.streaming."
    )


def _measured(
    listed: Sequence[tuple[str, str]], kind: Kind, limit: int | None, schemas: dict[str, pa.Schema]
) -> tuple[StreamedFile, ...]:
    """The files with their sizes, marks and, of Parquet, rows: with a limit, the first that hold so many.

    `schemas` takes those of Parquet files, by their names; of files with the same one the first.

    With a limit the samples of tars are counted too, one tar after another, so that none is read that is not taken.
    """
    measured: list[StreamedFile] = []
    seen = {schema.serialize().to_pybytes() for schema in schemas.values()}
    rows = 0
    # A limit is met by a few files as a rule, of which no more are looked at than there are threads.
    for start in range(0, len(listed), PLANNERS if limit else len(listed)):
        some = listed[start : start + PLANNERS] if limit else listed
        with contextlib.closing(_Fetchers(min(PLANNERS, len(some)))) as pool:
            futures = [pool.submit(functools.partial(_measure, name, place, kind)) for name, place in some]
            for (name, _), future in zip(some, futures, strict=True):
                with _planning(name):
                    file, schema = future.result(SILENT_SECONDS)
                    if limit is not None and file.rows is None:
                        file = replace(file, rows=_count_samples(file))
                measured.append(file)
                if schema is not None and (stored := schema.serialize().to_pybytes()) not in seen:
                    seen.add(stored)
                    schemas[name] = schema
                rows += file.rows or 0
                if limit is not None and rows >= limit:
                    return tuple(measured)
    return tuple(measured)


@contextlib.contextmanager
def _planning(name: str) -> Iterator[None]:
    """What goes wrong with a file before a run, as one sentence that names it."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # as in _listed
        raise ConfigError(f"source: {name} cannot be read: {_reason(error)}") from error


def _measure(name: str, place: str, kind: Kind) -> tuple[StreamedFile, pa.Schema | None]:
    with _planning(name):
        system, path = _system_of(place)
        info = system.info(path)
        if info.get("size") is None:
            raise ConfigError(f"source: the server does not say how large {name} is, so it cannot be streamed.")
        file = StreamedFile(name, place, int(info["size"]), "")
        # The Hub's name of the content; what stores and servers call its tag or checksum.
        keys = ("blob_id", "ETag", "etag", "Content-MD5", "Digest")
        mark = next((str(info[key]) for key in keys if info.get(key)), None) or _ends(file)
        rows: int | None = None
        groups: tuple[tuple[int, int], ...] = ()
        schema: pa.Schema | None = None
        if kind == "parquet":
            footer = _footer(file)
            schema = footer.schema.to_arrow_schema()
            rows, groups = footer.num_rows, tuple(map(_group, map(footer.row_group, range(footer.num_row_groups))))
    return StreamedFile(name, place, file.size, mark, groups, rows), schema


def _group(group: Any) -> tuple[int, int]:
    return group.num_rows, group.total_byte_size


def _ends(file: StreamedFile) -> str:
    """A digest of the first and the last bytes of a file, where a Parquet footer lies; no time enters it."""
    with _opened(file) as handle:
        head = handle.read(MARK_BYTES)
        handle.seek(max(0, file.size - MARK_BYTES))
        return hashlib.sha256(head + handle.read(MARK_BYTES)).hexdigest()


def _opened(file: StreamedFile, **options: Any) -> Any:
    """A handle that fetches what is read and nothing else, unless the options say otherwise."""
    system, path = _system_of(file.place)
    options = {"cache_type": "none", **options}
    if file.place.startswith(("http://", "https://")):
        options["size"] = file.size  # or it would be asked again
    return system.open(path, "rb", **options)


def _footer(file: StreamedFile) -> pq.FileMetaData:
    with _opened(file) as handle:
        return pq.read_metadata(handle)


def _parquet_fields(
    schemas: Mapping[str, pa.Schema], stated: Mapping[str, Any] | None, config: SourceConfig, need_labels: bool
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


def _tar_fields(
    files: Iterable[StreamedFile], config: SourceConfig, need_labels: bool
) -> tuple[Fields, dict[str, Any], None]:
    """What is read of the samples of tars; there are no class names in them.

    The first tar that has samples tells, and of these as many as it takes to see all fields that are wanted.
    """
    import datasets

    label: str | None = config.label_column or CLASS_FIELD
    wanted = {
        config.label_column or CLASS_FIELD,
        *config.keep_columns,
        *([config.image_column] if config.image_column else []),
    }
    file, there, images = _head_of_tars(files, wanted, config)
    fields = f"the fields of {file.name} are {', '.join(there)}"
    if config.image_column is None and images != 1:
        if images:
            raise ConfigError(f"source.image_column: a sample has {images} images; name one ({fields}).")
        raise ConfigError(f"source.image_column: a sample has 0 images; name one ({fields}). {SIDE_BY_SIDE}")
    if config.label_column is None and label not in there:
        if need_labels:
            raise ConfigError(
                f"source.label_column: there is no field {CLASS_FIELD}; name one ({fields}), or set "
                f"attack.label=prediction. {SIDE_BY_SIDE}"
            )
        label = None
    named = {"image_column": config.image_column, "label_column": config.label_column}
    for key, name in [*named.items(), *(("keep_columns", name) for name in config.keep_columns)]:
        if name is not None and name not in there:
            raise ConfigError(f"source.{key}: there is no field {name}; {fields}. {SIDE_BY_SIDE}")
    kept = {name: datasets.Value("string") for name in config.keep_columns}
    return Fields(config.image_column, label, config.keep_columns), kept, None


def _head_of_tars(
    files: Iterable[StreamedFile], wanted: set[str], config: SourceConfig
) -> tuple[StreamedFile, list[str], int]:
    """The first tar that has samples, the fields at its head, and how many images the first sample with one has."""
    for file in files:
        there: dict[str, None] = {}
        images = 0
        with _planning(file.name), contextlib.closing(_Tar(file, MARK_BYTES)) as tar:
            for sample in itertools.islice(tar.samples(), HEAD_SAMPLES):
                there |= dict.fromkeys(sample)
                images = images or sum(map(_is_image, sample))
                if wanted <= set(there) and (images or config.image_column):
                    break
        if there:
            return file, list(there), images
    raise ConfigError("source: its tars have no samples: files whose names have an extension.")


# Of a million samples the fields have a few names.
@functools.lru_cache(maxsize=1024)
def _is_image(name: str) -> bool:
    return is_image_name(f"x.{name}")


# ----------------------------------------------------------------------------------------------- reading


# A number of a stretch, some of its rows, and what was left out where they are.
Read = tuple[int, pa.Table, tuple[LeftOut, ...]]


@dataclass(frozen=True)
class Stretch:
    """Rows `start` to `stop` of a file, to its end where that is None: what a shard is made of."""

    file: StreamedFile
    start: int
    stop: int | None


def read_stretches(source: StreamedSource, stretches: Sequence[Stretch]) -> Generator[Read, None, None]:
    """The rows of some stretches, in order: at least one table of each, and what of a tar was left out.

    A bounded number of bytes is on its way at a time. Nothing before or between the stretches is read but the Parquet
    footers; the tar of a stretch is read from its front.

    Raises:
        PipelineError: a file cannot be read, has changed since the run was planned, or holds a label that is none.
    """
    return _read_tars(source, stretches) if source.kind == "tar" else _read_parquet(source, stretches)


def read_head(source: StreamedSource, stretch: Stretch) -> Iterator[pa.Table]:
    """The rows of a stretch, a few at a time, for who stops early: little more is fetched than is asked for.

    Raises:
        PipelineError: as `read_stretches`.
    """
    if source.kind == "tar":
        yield from (table for table, _ in _tables_of_tar(source, stretch.file, HEAD_ROWS))
        return
    with _naming(stretch.file), _opened(stretch.file) as handle:
        # Buffered, a page at a time: a row group may be a hundred megabytes.
        file = pq.ParquetFile(handle, buffer_size=HEAD_BUFFER, pre_buffer=False)
        for group, _ in _groups_of(stretch):
            for batch in file.iter_batches(HEAD_ROWS, [group], _columns_of(source.fields), use_threads=False):
                yield _normalised(source, stretch.file, pa.Table.from_batches([batch]))


def _read_parquet(source: StreamedSource, stretches: Sequence[Stretch]) -> Generator[Read, None, None]:
    # Row groups of a file follow each other, so a few footers are enough.
    footer, one_by_one = functools.lru_cache(maxsize=2 * FETCHERS)(_footer), threading.Lock()

    def fetch(stretch: Stretch, group: int | None) -> pa.Table:
        with _naming(stretch.file):
            with one_by_one:
                metadata = footer(stretch.file)
            if tuple(map(_group, map(metadata.row_group, range(metadata.num_row_groups)))) != stretch.file.groups:
                raise PipelineError(f"source: {stretch.file.name} has changed since the run was planned.")
            columns = _columns_of(source.fields)
            if group is None:
                rows = metadata.schema.to_arrow_schema().empty_table().select(columns)
            else:
                rows = _row_group(stretch.file, metadata, group, columns)
                if stretch.stop is not None:
                    rows = rows.slice(0, stretch.stop - sum(count for count, _ in stretch.file.groups[:group]))
            return _normalised(source, stretch.file, rows)

    def calls() -> Iterator[tuple[int, int, Callable[[], pa.Table]]]:
        for number, stretch in enumerate(stretches):
            groups: list[tuple[int | None, int]] = [*_groups_of(stretch)] or [(None, 0)]
            for group, size in groups:
                yield number, size, functools.partial(fetch, stretch, group)

    with contextlib.closing(_Fetchers(FETCHERS)) as pool:
        waiting: deque[tuple[int, int, Future[pa.Table]]] = deque()
        ahead, following = 0, calls()
        call = next(following, None)
        while waiting or call is not None:
            while call is not None and (
                not waiting or (ahead + call[1] <= BYTES_AHEAD and len(waiting) < 2 * FETCHERS)
            ):
                waiting.append((call[0], call[1], pool.submit(call[2])))
                ahead += call[1]
                call = next(following, None)
            number, size, future = waiting.popleft()
            with _naming(stretches[number].file):
                rows = future.result(SILENT_SECONDS + ahead / SLOW_BYTES)
            yield number, rows, ()
            ahead -= size


def _row_group(file: StreamedFile, metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group; where that is a request, in as few as they lie apart."""
    parts = {}
    local = _system_of(file.place)[0].protocol in LOCAL
    if not local:
        with _opened(file) as handle:
            for start, stop in _spans(metadata.row_group(group), columns):
                handle.seek(start)
                parts[start, stop] = handle.read(stop - start)
    with _opened(file, **({} if local else {"cache_type": "parts", "cache_options": {"data": parts}})) as handle:
        return pq.ParquetFile(handle, metadata=metadata).read_row_group(group, columns, use_threads=False)


def _spans(group: Any, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Where in the file some columns of a row group are, those that lie close together as one."""
    spans: list[tuple[int, int]] = []
    for chunk in sorted(map(group.column, range(group.num_columns)), key=_chunk_start):
        if not any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
            continue
        start = _chunk_start(chunk)
        if spans and start - spans[-1][1] <= GAP_BYTES:
            start = spans.pop()[0]
        spans.append((start, _chunk_start(chunk) + chunk.total_compressed_size))
    return spans


def _chunk_start(chunk: Any) -> int:
    offsets: list[int] = [offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset]
    return min(offsets)


def _read_tars(source: StreamedSource, stretches: Sequence[Stretch]) -> Generator[Read, None, None]:
    for number, stretch in enumerate(stretches):
        tables = _until(stretch.stop, _tables_of_tar(source, stretch.file, TAR_ROWS))
        following_table = functools.partial(next, tables, None)
        with contextlib.closing(_Fetchers(1)) as pool:
            following = [pool.submit(following_table) for _ in range(2)]
            while (found := following.pop(0).result()) is not None:
                following.append(pool.submit(following_table))
                yield number, *found


def _until(
    stop: int | None, tables: Iterator[tuple[pa.Table, tuple[LeftOut, ...]]]
) -> Iterator[tuple[pa.Table, tuple[LeftOut, ...]]]:
    """The rows before the stop, None for all; what follows is not read."""
    for table, left_out in tables:
        if stop is not None and table.num_rows >= stop:
            yield table.slice(0, stop), left_out
            return
        stop = None if stop is None else stop - table.num_rows
        yield table, left_out


class _Fetchers:
    """Threads that wait for servers. At the end nobody waits for them, unlike those of a ThreadPoolExecutor: one that
    hangs would hold up the whole process."""

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._count = count
        for _ in range(count):
            threading.Thread(target=self._serve, daemon=True, name="fetch").start()

    def submit(self, call: Callable[[], Item]) -> "Future[Item]":
        future: Future[Item] = Future()
        self._calls.put((future, call))
        return future

    def _serve(self) -> None:
        while (work := self._calls.get()) is not None:
            future, call = work
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def close(self) -> None:
        """Let the threads end; what has not begun is dropped."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in range(self._count):
            self._calls.put(None)


@contextlib.contextmanager
def _naming(file: StreamedFile) -> Iterator[None]:
    """What goes wrong in a file, as one sentence that names it."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise PipelineError(
            f"source: {file.name} cannot be read ({_reason(error)}); what was committed is kept, and the same "
            "command goes on from there."
        ) from error


def _groups_of(stretch: Stretch) -> Iterator[tuple[int, int]]:
    """The row groups of a stretch, which ends where they do, and their bytes."""
    start = 0
    for group, (rows, size) in enumerate(stretch.file.groups):
        if rows and start >= stretch.start and (stretch.stop is None or start < stretch.stop):
            yield group, size
        start += rows


def _columns_of(fields: Fields) -> list[str]:
    return [str(fields.image), *([fields.label] if fields.label else []), *fields.kept]


def _normalised(source: StreamedSource, file: StreamedFile, rows: pa.Table) -> pa.Table:
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
    return _joined(cells, pa.array(labels, pa.int64()), kept.replace_schema_metadata(None))


def _joined(cells: Any, labels: pa.Array, kept: pa.Table) -> pa.Table:
    return pa.Table.from_arrays([cells, labels, *kept.columns], names=["", "", *kept.column_names])


def _indices(source: StreamedSource, file: StreamedFile, column: pa.ChunkedArray) -> Any:
    if _is_text(column.type):
        known = pa.array(source.names or (), column.type)
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


# -------------------------------------------------------------------------------------------------- tars


class _Member(tarfile.TarInfo):
    """A file in a tar whose header is whole: `tarfile` takes any other for the tar's end, and drops what follows."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise  # the end mark
            reason = f"a header in it is damaged, {error}" if buf else "it breaks off before its end mark"
            raise tarfile.ReadError(reason) from None
        # `tarfile` would read any number of bytes of a long name into memory.
        if member.size < 0 or (member.type in LONG_HEADERS and member.size > HEADER_BYTES):
            raise tarfile.ReadError(f"a header in it claims {member.size:,} bytes")
        return member


# What a name in a tar stands for: where a file is and its bytes, or the name that a link leads to.
Target = str | tuple[int, int] | None
# Headers with something behind them: long names and the like. Labels of a tar, of which nothing is a file.
LONG_HEADERS = (b"L", b"K", b"x", b"g", b"X")
LABELS_OF_TARS = (b"V", b"D")


class _Tar:
    """One tar while it is read, front to back.

    most_bytes: that an image may have.
    """

    def __init__(self, file: StreamedFile, block: int, most_bytes: int = 0) -> None:
        self.file, self.most_bytes = file, most_bytes
        self._tally = Tally()
        self._stack = contextlib.ExitStack()
        handle = self._stack.enter_context(_opened(file, cache_type="readahead", block_size=block))
        # A server may give files from their beginning only: nothing is sought.
        packed = self._stack.enter_context(io.BufferedReader(handle, 2**16))
        unpack = next((unpack for magic, unpack in UNPACK.items() if packed.peek(8).startswith(magic)), None)
        self._handle = packed if unpack is None else self._stack.enter_context(unpack(packed))
        self._most = file.size if unpack is None else MOST_UNPACKED
        self._compressed = unpack is not None
        self._targets: dict[str, Target] | None = None

    def close(self) -> None:
        self._stack.close()

    def take_left_out(self) -> tuple[LeftOut, ...]:
        """What was left out since the last call."""
        taken, self._tally = self._tally.left_out(), Tally()
        return taken

    def samples(self, wanted: Callable[[str], bool] = lambda _: False) -> Iterator[dict[str, bytes | None]]:
        """The samples: consecutive files of one name, by their extensions; only those wanted are read.

        Raises:
            tarfile.ReadError: the tar is damaged, or does not go on to its end mark, with nothing behind it.
            PipelineError: a member can be part of no sample, or is larger than it may be.
        """
        sample: dict[str, bytes | None] = {}
        key = None
        for member in self.members():
            found = MEMBER.fullmatch(member.name)
            litter = _is_tar_litter(member.name)
            if found is None or litter:
                self._leave_out(member, LITTER_REASON if litter else "names without an extension")
                continue
            if sample and found[1] != key:
                yield sample
                sample = {}
            key, name = found[1], found[2]
            if name in sample:
                raise PipelineError(f"source: {self.file.name} has two files {member.name} in one sample.")
            sample.setdefault(KEY, key.encode())
            sample[name] = self._content(member, _is_image(name)) if wanted(name) else None
        if sample:
            yield sample

    def members(self) -> Iterator[tarfile.TarInfo]:
        """What in the tar may be part of a sample: files, and links within it."""
        try:
            archive = tarfile.open(fileobj=self._handle, mode="r|", bufsize=2**16, tarinfo=_Member)  # noqa: SIM115
            self._archive = self._stack.enter_context(archive)
        except tarfile.ReadError as error:
            raise tarfile.ReadError(f"it is no tar, or {error}") from None
        for member in self._archive:
            self._archive.members = []  # type: ignore[attr-defined]  # or a million of them would stay in memory
            if member.isdir():
                continue
            if member.type in LABELS_OF_TARS:
                self._leave_out(member, "labels of a tar")
            elif member.issparse() or not (member.isfile() or member.issym() or member.islnk()):
                kind = "a sparse file" if member.issparse() else "no file but a device, a pipe or the like"
                raise self.refused(member, f"is {kind}; pack the images as plain files")
            elif member.size > self._most:
                raise tarfile.ReadError(f"{printable(member.name)} claims {member.size:,} bytes, more than there are")
            else:
                yield member
        # The end mark is of zeros, as is what pads it; a header that was overwritten with zeros has files behind it.
        while block := self._archive.fileobj.read(TAR_BLOCK):
            if block.count(0) < len(block):
                raise tarfile.ReadError("something follows its end mark")

    def _leave_out(self, member: tarfile.TarInfo, reason: str) -> None:
        self._tally.add(reason, printable(member.name)[:NAME_LENGTH])

    def refused(self, member: tarfile.TarInfo, why: str) -> PipelineError:
        return PipelineError(f"source: {printable(member.name)} in {self.file.name} {why}.")

    def _content(self, member: tarfile.TarInfo, image: bool) -> bytes:
        linked = None if member.isfile() else self._linked(member)
        size, most = linked[1] if linked else member.size, self.most_bytes if image else TEXT_BYTES
        if size > most:
            what = "an image of runtime.max_pixels" if image else "a label or a text"
            raise self.refused(member, f"has {size:,} bytes, and {what} has at most {most:,}")
        if linked is None:
            return self._archive.extractfile(member).read()  # type: ignore[union-attr]
        with _opened(self.file) as handle:
            handle.seek(linked[0])
            content: bytes = handle.read(size)
        return content

    def _linked(self, member: tarfile.TarInfo) -> tuple[int, int]:
        """Where in the tar the file is that a link leads to: its first byte, and its bytes."""
        if self._compressed:
            raise self.refused(member, "is a link, and in a compressed tar none is followed; decompress the tar")
        if self._targets is None:
            self._targets = _targets(self.file)
        target: Target = _link_target(member)
        for _ in range(MOST_LINKS):
            if not isinstance(target, str):
                break
            target = self._targets.get(target)
        if isinstance(target, tuple):
            return target
        raise self.refused(member, f"is a link to {printable(member.linkname)}, which is no file in the same tar")


def check_unstreamed(files: Iterable[tuple[str, str]]) -> None:
    """Look through tars, by name and place, that `datasets` is to read: it would leave images out, and say nothing.

    Raises:
        PipelineError: a tar is damaged, or has an image that only a stream reads.
    """
    first: str | None = None
    fields: set[str] = set()
    for name, place in files:
        with _planning(name), contextlib.closing(_Tar(_measure(name, place, "tar")[0], TAR_BLOCK)) as tar:
            for member in tar.members():
                found = MEMBER.fullmatch(member.name)
                if found is None or _is_tar_litter(member.name):
                    continue
                first = first or found[1]
                if found[1] == first:
                    fields.add(found[2])
                if not member.isfile():
                    why = "is a link"
                elif posixpath.basename(member.name).startswith("__"):
                    why = "has a name that begins with __"
                elif _is_image(found[2]) and found[2] not in fields:
                    why = f"is a .{found[2]}, which the first sample has not"
                else:
                    continue
                raise tar.refused(member, f"{why}, and `datasets` leaves it out; set source.streaming: true")
        if first is None:
            raise ConfigError(f"source: {name} has no samples; set source.streaming: true, or remove it.")


def _is_tar_litter(name: str) -> bool:
    """Whether a member is litter, of a system or of a tar that was unpacked by what did not know its headers."""
    folder, _, own = name.rpartition("/")
    return own.startswith(".") or own.lower() in TAR_LITTER or _is_litter_folder(folder)


@functools.lru_cache(maxsize=1024)
def _is_litter_folder(path: str) -> bool:
    parts = [part for part in path.split("/") if part not in (".", "..")]
    return any(is_litter(part) or re.fullmatch(r"PaxHeaders?(\.\d+)?", part) for part in parts)


def _targets(file: StreamedFile) -> dict[str, Target]:
    """What links in a tar may lead to, by name: where a file is in it, or the target of another link.

    Only asked for a tar with links, which is then read a second time: all names of any other would be kept for nothing.
    None stands for a name that is there twice.
    """
    targets: dict[str, Target] = {}
    with (
        _opened(file, cache_type="readahead", block_size=TAR_BLOCK) as handle,
        tarfile.open(fileobj=handle, mode="r:", tarinfo=_Member) as archive,
    ):
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]
            name = posixpath.normpath(member.name)
            if member.issym() or member.islnk():
                target: Target = _link_target(member)
            else:
                plain = member.isfile() and not member.issparse()
                target = (member.offset_data, member.size) if plain else None
            targets[name] = None if name in targets else target
    return targets


def _link_target(member: tarfile.TarInfo) -> str:
    """The name that a link leads to: a symbolic one from its own folder, a hard one from the top of the tar."""
    folder = posixpath.dirname(member.name) if member.issym() else ""
    return posixpath.normpath(posixpath.join(folder, member.linkname))


def _count_samples(file: StreamedFile) -> int:
    # Headers only, as far as the blocks that are fetched allow.
    with contextlib.closing(_Tar(file, TAR_BLOCK)) as tar:
        return sum(1 for _ in tar.samples())


def _tables_of_tar(
    source: StreamedSource, file: StreamedFile, rows: int
) -> Iterator[tuple[pa.Table, tuple[LeftOut, ...]]]:
    """The rows of a tar, at least one table, each with what was left out since the one before."""
    fields = source.fields

    def wanted(name: str) -> bool:
        return name in (fields.label, *fields.kept) or (name == fields.image if fields.image else _is_image(name))

    with _naming(file), contextlib.closing(_Tar(file, TAR_BLOCK, source.most_bytes)) as tar:
        waiting: list[dict[str, bytes | None]] = []
        size = 0
        for sample in _side_by_side(source, file, tar.samples(wanted)):
            waiting.append(sample)
            size += sum(len(content) for content in sample.values() if content is not None)
            if len(waiting) >= rows or size >= TAR_BYTES:
                yield _table_of(source, file, waiting), tar.take_left_out()
                waiting, size = [], 0
        yield _table_of(source, file, waiting), tar.take_left_out()


def _side_by_side(
    source: StreamedSource, file: StreamedFile, samples: Iterator[dict[str, bytes | None]]
) -> Iterator[dict[str, bytes | None]]:
    """The samples, none of which is there in parts: in a tar that is sorted by type, labels would be lost.

    Only the names of samples that lack something are kept in mind, as numbers.
    """
    parts: set[int] = set()
    fields = source.fields
    needed = {name for name in (fields.label, *fields.kept) if name is not None}
    for sample in samples:
        name = hash(sample[KEY])
        if name in parts:
            shown = printable((sample[KEY] or b"").decode("utf-8", "replace"))
            raise PipelineError(f"source: {file.name} has files of the sample {shown} apart. {SIDE_BY_SIDE}")
        if not needed <= sample.keys() or _image_of(file, sample, fields.image) is None:
            parts.add(name)
        yield sample


def _table_of(source: StreamedSource, file: StreamedFile, samples: Sequence[Mapping[str, bytes | None]]) -> pa.Table:
    fields = source.fields
    cells = [{"bytes": _image_of(file, sample, fields.image), "path": None} for sample in samples]
    labels = [_label_of(source, file, sample) for sample in samples]
    kept = {
        name: pa.array([_text_of(file, name, sample.get(name)) for sample in samples], pa.string())
        for name in fields.kept
    }
    return _joined(pa.array(cells, CELL), pa.array(labels, pa.int64()), pa.table(kept))


def _image_of(file: StreamedFile, sample: Mapping[str, bytes | None], name: str | None) -> bytes | None:
    """The image of a sample: the one that the config names, or the only one.

    Raises:
        RowError: there are several.
    """
    images = [field for field in sample if _is_image(field)] if name is None else [name]
    if len(images) > 1:
        key = printable((sample[KEY] or b"").decode("utf-8", "replace"))
        raise RowError(
            f"source.image_column: the sample {key} in {file.name} has {len(images)} images ({', '.join(images)}); "
            "name one."
        )
    return sample.get(images[0]) if images else None


def _label_of(source: StreamedSource, file: StreamedFile, sample: Mapping[str, bytes | None]) -> int:
    content = sample.get(source.fields.label) if source.fields.label else None
    if content is None:
        return UNLABELLED
    text = content.decode("utf-8", "replace").strip()
    if source.names and text in source.names:
        return source.names.index(text)
    if re.fullmatch(r"-1|\d{1,9}", text):
        return int(text)
    hint = "is not among them" if source.names else "is not a number, so name the classes"
    raise PipelineError(f"source.classes: the label {text[:50]!r} in {file.name} {hint}.")


def _text_of(file: StreamedFile, name: str, content: bytes | None) -> str | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        raise PipelineError(f"source.keep_columns: {name} in {file.name} is not text.") from None
