"""Tars of WebDataset that are streamed: each is one shard, read member by member, front to back.

A sample is the files of one name that lie side by side; their extensions are its fields.
"""

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import lzma
import posixpath
import re
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError, RowError
from pipeline.core.images import is_image_name
from pipeline.core.left_out import LeftOut, Tally
from pipeline.core.plan import Plan, Shard
from pipeline.core.redaction import printable
from pipeline.sources.base import Read, class_names, joined
from pipeline.sources.cells import CELL
from pipeline.sources.columns import Fields
from pipeline.sources.files import LITTER_REASON, Listing, is_litter
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.streams import (
    MARK_BYTES,
    SourceFile,
    StreamedSource,
    make_streamed,
    measure,
    measured,
    opened,
    planning,
    reading,
    up_to,
)

# Rows and bytes of a table out of a tar, of which one waits, and rows of one at the head.
TABLE_ROWS = 256
HEAD_ROWS = 32
TABLE_BYTES = 16 * 2**20
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
# Samples at the head of a tar that are looked at for what samples hold.
HEAD_SAMPLES = 64
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
SIDE_BY_SIDE = "(The files of a sample must be next to each other in a tar, as `tar --sort=name` puts them.)"


def open_tars(config: HuggingFaceConfig, listing: Listing, *, need_labels: bool) -> "TarSource":
    """Find what the samples of tars hold. With a limit they are counted, one tar after another, so that none is read
    that is not taken."""

    def counted(found: Sequence[tuple[str, str]]) -> Iterator[SourceFile]:
        for file, _ in measured(found, lambda file: (file, None)):
            with planning(file.name):
                yield file if config.limit is None else replace(file, rows=_count_samples(file))

    listed = {split: up_to(config.limit, counted(found)) for split, found in listing.files.items()}
    fields, kept = _find_fields(itertools.chain(*listed.values()), config, need_labels)
    classes = class_names(config, None)
    return make_streamed(TarSource, listing, listed, fields, classes=classes, kept=kept, need_labels=need_labels)


def _find_fields(
    files: Iterable[SourceFile], config: HuggingFaceConfig, need_labels: bool
) -> tuple[Fields, dict[str, Any]]:
    """What is read of the samples of tars; there are no class names in them.

    The first tar that has samples tells, and of these as many as it takes to see all fields that are wanted.
    """
    import datasets

    label = config.label_column or CLASS_FIELD
    wanted = [("label_column", label), *(("keep_columns", name) for name in config.keep_columns)]
    if config.image_column is not None:
        wanted.append(("image_column", config.image_column))
    file, found, images = _head_of_tars(files, {name for _, name in wanted}, config)
    fields = f"the fields of {file.name} are {', '.join(found)}. {SIDE_BY_SIDE}"
    if config.image_column is None and images != 1:
        raise ConfigError(f"source.image_column: a sample has {images} images; name one; {fields}")
    if label not in found and config.label_column is None and not need_labels:
        del wanted[0]
    for key, name in wanted:
        if name not in found:
            other = " (without labels set attack.label=prediction)" if key == "label_column" else ""
            raise ConfigError(f"source.{key}: there is no field {name}{other}; {fields}")
    kept = {name: datasets.Value("string") for name in config.keep_columns}
    return Fields(config.image_column, label if label in found else None, config.keep_columns), kept


def _head_of_tars(
    files: Iterable[SourceFile], wanted: set[str], config: HuggingFaceConfig
) -> tuple[SourceFile, list[str], int]:
    """The first tar that has samples, the fields at its head, and how many images the first sample with one has."""
    for file in files:
        fields: dict[str, None] = {}
        images = 0
        with planning(file.name), contextlib.closing(_Tar(file, MARK_BYTES)) as tar:
            for sample in itertools.islice(tar.samples(), HEAD_SAMPLES):
                fields |= dict.fromkeys(sample)
                images = images or sum(map(_is_image, sample))
                if wanted <= fields.keys() and (images or config.image_column):
                    break
        if fields:
            return file, list(fields), images
    raise ConfigError("source: its tars have no samples: files whose names have an extension.")


# Of a million samples the fields have a few names.
@functools.lru_cache(maxsize=1024)
def _is_image(name: str) -> bool:
    return is_image_name(f"x.{name}")


def _is_the_image(fields: Fields, name: str) -> bool:
    return name == fields.image if fields.image else _is_image(name)


@dataclass(frozen=True, kw_only=True)
class TarSource(StreamedSource):
    """Tars of samples."""

    def head(self, shard: Shard) -> Iterator[pa.Table]:
        yield from (table for table, _ in self._tables(self.file_of(shard), HEAD_ROWS))

    def tables(self, plan: Plan, shards: Sequence[Shard]) -> Generator[Read, None, None]:
        for shard in shards:
            rows, file = 0, self.file_of(shard)
            for table, left_out in self._tables(file, TABLE_ROWS):
                table = table if shard.stop is None else table.slice(0, shard.stop - rows)
                rows += table.num_rows
                yield shard, table, left_out
                if rows == shard.stop:
                    break  # what follows is not read
            if file.rows is not None and rows != shard.rows:
                raise PipelineError(
                    f"source: {file.name} has changed since the run was planned: it has {rows} rows where "
                    f"{shard.rows} were."
                )

    def _tables(self, file: SourceFile, rows: int) -> Iterator[tuple[pa.Table, tuple[LeftOut, ...]]]:
        """The rows of a tar, at least one table, each with what was left out since the one before."""
        with reading(file), contextlib.closing(_Tar(file, TAR_BLOCK, self.max_pixels)) as tar:
            waiting: list[dict[str, bytes | None]] = []
            size = 0
            for sample in _side_by_side(self, file, tar.samples(self._wants)):
                waiting.append(sample)
                size += sum(len(content) for content in sample.values() if content is not None)
                if len(waiting) >= rows or size >= TABLE_BYTES:
                    yield _table_of(self, file, waiting), tar.take_left_out()
                    waiting, size = [], 0
            yield _table_of(self, file, waiting), tar.take_left_out()

    def _wants(self, name: str) -> bool:
        return name in (self.fields.label, *self.fields.kept) or _is_the_image(self.fields, name)


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


# Headers with something behind them: long names and the like. Labels of a tar, of which nothing is a file.
LONG_HEADERS = (b"L", b"K", b"x", b"g", b"X")
LABELS_OF_TARS = (b"V", b"D")


class _Tar:
    """One tar while it is read, front to back. The bytes of an image are bounded by `max_pixels`."""

    def __init__(self, file: SourceFile, block: int, max_pixels: int = 0) -> None:
        self.file, self.max_pixels = file, max_pixels
        self._tally = Tally()
        self._stack = contextlib.ExitStack()
        handle = self._stack.enter_context(opened(file, cache_type="readahead", block_size=block))
        # A server may give files from their beginning only: nothing is sought.
        packed = self._stack.enter_context(io.BufferedReader(handle, 2**16))
        unpack = next((unpack for magic, unpack in UNPACK.items() if packed.peek(8).startswith(magic)), None)
        self._handle = packed if unpack is None else self._stack.enter_context(unpack(packed))
        self._most = file.size if unpack is None else MOST_UNPACKED

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
        """The files in the tar, which may be parts of samples."""
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
            elif member.issparse() or not member.isfile():
                # Those who read tars of samples leave links out, and say nothing.
                link = member.issym() or member.islnk()
                kind = "a link" if link else "a sparse file" if member.issparse() else "a device, a pipe or the like"
                options = " (`tar --dereference --hard-dereference`)" if link else ""
                raise self.refused(member.name, f"is {kind} and no plain file; pack it as one{options}")
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

    def refused(self, member: str, why: str) -> PipelineError:
        return PipelineError(f"source: {printable(member)} in {self.file.name} {why}.")

    def _content(self, member: tarfile.TarInfo, image: bool) -> bytes:
        most = TEXT_BYTES + (PIXEL_BYTES * self.max_pixels if image else 0)
        if member.size > most:
            what = "an image of runtime.max_pixels" if image else "a label or a text"
            raise self.refused(member.name, f"has {member.size:,} bytes, and {what} has at most {most:,}")
        return self._archive.extractfile(member).read()  # type: ignore[union-attr]


def check_unstreamed(files: Iterable[tuple[str, str]]) -> None:
    """Look through tars, by name and URL, that `datasets` is to read: it would leave images out, and say nothing.

    Raises:
        PipelineError: a tar is damaged, or has an image that only a stream reads.
    """
    first: Mapping[str, Any] = {}
    for name, url in files:
        with planning(name), contextlib.closing(_Tar(measure(name, url), TAR_BLOCK)) as tar:
            for sample in tar.samples():
                first = first or sample
                images = [field for field in sample if _is_image(field)]
                hidden = posixpath.basename(_key_of(sample)).startswith("__")
                for field in images:
                    if hidden or field not in first:
                        why = "has a name that begins with __" if hidden else "is of a kind that the first sample lacks"
                        raise tar.refused(
                            f"{_key_of(sample)}.{field}",
                            f"{why}, and `datasets` leaves it out; set source.streaming: true",
                        )
        if not first:
            raise ConfigError(f"source: {name} has no samples; set source.streaming: true, or remove it.")


def _key_of(sample: Mapping[str, bytes | None]) -> str:
    return printable((sample[KEY] or b"").decode("utf-8", "replace"))


def _is_tar_litter(name: str) -> bool:
    """Whether a member is litter, of a system or of a tar that was unpacked by what did not know its headers."""
    folder, _, own = name.rpartition("/")
    return own.startswith(".") or own.lower() in TAR_LITTER or _is_litter_folder(folder)


@functools.lru_cache(maxsize=1024)
def _is_litter_folder(path: str) -> bool:
    parts = [part for part in path.split("/") if part not in (".", "..")]
    return any(is_litter(part) or re.fullmatch(r"PaxHeaders?(\.\d+)?", part) for part in parts)


def _count_samples(file: SourceFile) -> int:
    # Headers only, as far as the blocks that are fetched allow.
    with contextlib.closing(_Tar(file, TAR_BLOCK)) as tar:
        return sum(1 for _ in tar.samples())


def _side_by_side(
    source: TarSource, file: SourceFile, samples: Iterator[dict[str, bytes | None]]
) -> Iterator[dict[str, bytes | None]]:
    """The samples, none of which is there in parts: in a tar that is sorted by type, labels would be lost."""
    parts: set[int] = set()  # hashes of the names of samples that lack something
    fields = source.fields
    needed = {name for name in (fields.label, *fields.kept) if name is not None}
    for sample in samples:
        name = hash(sample[KEY])
        if name in parts:
            raise PipelineError(f"source: {file.name} has files of the sample {_key_of(sample)} apart. {SIDE_BY_SIDE}")
        if not needed <= sample.keys() or _image_of(file, sample, fields) is None:
            parts.add(name)
        yield sample


def _table_of(source: TarSource, file: SourceFile, samples: Sequence[Mapping[str, bytes | None]]) -> pa.Table:
    fields = source.fields
    cells = [{"bytes": _image_of(file, sample, fields), "path": None} for sample in samples]
    labels = [_label_of(source, file, sample) for sample in samples]
    kept = {
        name: pa.array([_text_of(file, name, sample.get(name)) for sample in samples], pa.string())
        for name in fields.kept
    }
    return joined(pa.array(cells, CELL), pa.array(labels, pa.int64()), pa.table(kept))


def _image_of(file: SourceFile, sample: Mapping[str, bytes | None], fields: Fields) -> bytes | None:
    """The image of a sample: the one that the config names, or the only one."""
    images = [field for field in sample if _is_the_image(fields, field)]
    if len(images) > 1:
        raise RowError(
            f"source.image_column: the sample {_key_of(sample)} in {file.name} has {len(images)} images "
            f"({', '.join(images)}); name one."
        )
    return sample[images[0]] if images else None


def _label_of(source: TarSource, file: SourceFile, sample: Mapping[str, bytes | None]) -> int:
    content = sample.get(source.fields.label) if source.fields.label else None
    if content is None:
        return UNLABELLED
    text = content.decode("utf-8", "replace").strip()
    if source.classes and text in source.classes:
        return source.classes.index(text)
    if re.fullmatch(r"-1|\d{1,9}", text):
        return int(text)
    hint = "is not among them" if source.classes else "is not a number, so name the classes"
    raise PipelineError(f"source.classes: the label {text[:50]!r} in {file.name} {hint}.")


def _text_of(file: SourceFile, name: str, content: bytes | None) -> str | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        raise PipelineError(f"source.keep_columns: {name} in {file.name} is not text.") from None
