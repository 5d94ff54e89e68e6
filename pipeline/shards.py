"""Shards on disk: names, the Parquet writer, and the commit.

A shard is one Parquet file per subset, written under `.run/tmp`, synced, renamed into place, and made true
by its receipt, which is written last. A shard without a receipt does not exist, whatever files there are.

    OUTPUT/clean/test-00000-of-00004.parquet
    OUTPUT/eps-8/test-00000-of-00004.parquet
    OUTPUT/.run/receipts/test-00000-of-00004.json
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import ConfigError, PipelineError, write_failure
from pipeline.plan import Shard
from pipeline.records import IMAGE

# A row group closes at whichever comes first. The Hub's viewer reads whole row groups and wants under 300 MB
# of them; streaming readers buffer one per file; a reader that skips by statistics wants them small.
ROW_GROUP_ROWS = 1024
ROW_GROUP_BYTES = 32 * 2**20
# What `datasets` 5.2 passes for the Hub's deduplication (datasets.config.DEFAULT_CDC_OPTIONS).
CONTENT_DEFINED_CHUNKING = {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0}
FOOTER_KEY = "fgsm"


def subset_name(level: int) -> str:
    """The folder, and the Hub's config name, of an epsilon in grey levels; 0 is clean."""
    return f"eps-{level}" if level else "clean"


def shard_file(level: int, shard: Shard) -> str:
    """A shard's file relative to the output folder."""
    return f"{subset_name(level)}/{shard.name}.parquet"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Record):
    """One Parquet file of a receipt, with what its rows add up to.

    `labelled` rows have a label, and `correct` of them are predicted right; `fooled` counts true values;
    `confidence_sum` over `rows` is the mean confidence.
    """

    path: str
    level: int
    rows: int
    bytes: int
    sha256: str
    labelled: int
    correct: int
    fooled: int
    confidence_sum: float


class SkippedRow(Record):
    """A source row that could not be decoded; `position` is its place in the shard."""

    position: int
    source_index: int
    reason: str


class Receipt(Record):
    """What a committed shard holds. Nothing in it depends on when or how fast it was written."""

    run_id: str
    shard: str
    split: str
    planned: int
    rows: int
    skipped: tuple[SkippedRow, ...]
    zero_sign_share: float
    files: tuple[FileEntry, ...]
    versions: dict[str, str]


class OutputFolder:
    """The output folder: where things are in it, and who holds it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "manifest.json"
        self.card = root / "README.md"
        self.run = root / ".run"
        self.receipts = self.run / "receipts"
        self.scratch = self.run / "tmp"

    def path(self, file: str) -> Path:
        return self.root / file

    def receipt(self, shard: str) -> Path:
        return self.receipts / f"{shard}.json"

    def check_usable(self) -> None:
        """Refuse a folder that holds something else, before anything is written.

        Raises:
            ConfigError: it is a file, or a folder with other content than a run's.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"output.path: {self.root} is a file, not a folder.")
        if self.root.is_dir() and not self.manifest.is_file():
            others = [entry.name for entry in self.root.iterdir() if not entry.name.startswith(".")]
            if others:
                raise ConfigError(
                    f"output.path: {self.root} is not empty and holds no run (there is {others[0]}); "
                    "choose another folder."
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against a second run; the operating system lets go when the process ends.

        Raises:
            PipelineError: another process holds it, or it cannot be written.
        """
        try:
            self.receipts.mkdir(parents=True, exist_ok=True)
            lock = (self.run / "lock").open("a+")
        except OSError as error:
            raise write_failure(self.root, error) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip()
                raise PipelineError(f"{self.root} is in use by another run (process {holder}); wait for it.") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            shutil.rmtree(self.scratch, ignore_errors=True)
            yield

    def clear(self) -> None:
        """Remove the run that is here: its receipts first and its manifest last, so that what is left of an
        interrupted removal is still known as a run.

        Raises:
            PipelineError: the disk refused.
        """
        with _writing(self.root):
            shutil.rmtree(self.receipts)
            self.receipts.mkdir()
            for subset in (self.root / subset_name(0), *self.root.glob("eps-[0-9]*")):
                shutil.rmtree(subset, ignore_errors=True)
            self.card.unlink(missing_ok=True)
            self.manifest.unlink(missing_ok=True)


def read_receipts(folder: OutputFolder) -> tuple[dict[str, Receipt], list[str]]:
    """All receipts by shard, sorted, and the names of files among them that are no receipts."""
    receipts, broken = {}, []
    for path in sorted(folder.receipts.glob("*.json")):
        try:
            receipts[path.stem] = Receipt.model_validate_json(path.read_bytes())
        except ValidationError:
            broken.append(path.name)
    return receipts, broken


def committed(folder: OutputFolder, run_id: str) -> dict[str, Receipt]:
    """The receipts whose files are there with the sizes they state, by names and sizes alone."""
    receipts, _ = read_receipts(folder)
    sizes: dict[str, int] = {}
    for subset in {Path(entry.path).parent for receipt in receipts.values() for entry in receipt.files}:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder.root / subset) as entries:
            sizes.update({f"{subset}/{entry.name}": entry.stat().st_size for entry in entries})
    return {
        name: receipt
        for name, receipt in receipts.items()
        if receipt.run_id == run_id and all(sizes.get(entry.path) == entry.bytes for entry in receipt.files)
    }


def receipts_digest(receipts: Mapping[str, Receipt]) -> str:
    """One digest of all receipts; it changes whenever any stored byte does."""
    total = hashlib.sha256()
    for name in sorted(receipts):
        total.update(receipts[name].model_dump_json().encode())
    return total.hexdigest()


class ShardWriter:
    """The Parquet files of one shard, one for each level, until they are committed or dropped."""

    def __init__(
        self, folder: OutputFolder, shard: Shard, levels: Sequence[int], features: datasets.Features, run_id: str
    ) -> None:
        self.folder, self.shard, self.levels, self.run_id = folder, shard, levels, run_id
        self.scratch = folder.scratch / shard.name
        self._waiting: list[list[pa.Table]] = [[] for _ in levels]
        self._writers: list[pq.ParquetWriter] = []
        schema = features.arrow_schema
        with _writing(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            for level in levels:
                self._writers.append(
                    pq.ParquetWriter(
                        self._scratch_file(level),
                        schema,
                        write_page_index=True,
                        use_content_defined_chunking=CONTENT_DEFINED_CHUNKING,
                        **_column_options(schema),
                    )
                )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk fails again on closing
            for writer in self._writers:
                writer.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _scratch_file(self, level: int) -> Path:
        return self.scratch / f"{subset_name(level)}.parquet"

    def write(self, tables: Sequence[pa.Table]) -> None:
        """Add one batch: a table for each level.

        Raises:
            PipelineError: the disk refused.
        """
        for waiting, table in zip(self._waiting, tables, strict=True):
            waiting.append(table)
        rows = sum(table.num_rows for table in self._waiting[0])
        largest = max(sum(table.nbytes for table in waiting) for waiting in self._waiting)
        if rows >= ROW_GROUP_ROWS or largest >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        with _writing(self.scratch):
            for waiting, writer in zip(self._waiting, self._writers, strict=True):
                if waiting:
                    writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

    def commit(self, receipt: Receipt, totals: Mapping[int, Mapping[str, Any]]) -> Receipt:
        """Close, sync and rename every file, then write the receipt, which is the commit.

        Args:
            receipt: the shard's, still without files.
            totals: for each level the counts of its `FileEntry`.

        Returns:
            The receipt as written.

        Raises:
            PipelineError: the disk refused; then there is no receipt.
        """
        self._flush()
        footer = {"run_id": self.run_id, "shard": self.shard.name, "rows": receipt.rows}
        files = []
        for level, writer in zip(self.levels, self._writers, strict=True):
            final = self.folder.path(shard_file(level, self.shard))
            with _writing(final):
                writer.add_key_value_metadata(
                    {
                        FOOTER_KEY: json.dumps({**footer, "level": level}),
                        # As `datasets` marks it, so that tools know how the pages were cut.
                        "content_defined_chunking": json.dumps(CONTENT_DEFINED_CHUNKING),
                    }
                )
                writer.close()
                size, digest = _sync(self._scratch_file(level))
                final.parent.mkdir(exist_ok=True)
                self._scratch_file(level).rename(final)
                _sync_folder(final.parent)
            files.append(
                FileEntry(path=shard_file(level, self.shard), level=level, bytes=size, sha256=digest, **totals[level])
            )
        receipt = receipt.model_copy(update={"files": tuple(files)})
        write_atomically(self.folder.receipt(self.shard.name), receipt.model_dump_json(indent=1))
        return receipt


def _column_options(schema: pa.Schema) -> dict[str, Any]:
    """Per-column options as `datasets` chooses them: encoded images are not compressed again."""
    leaves = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    images = [leaf for leaf in leaves if leaf.split(".")[0] == IMAGE]
    return {
        "compression": {leaf: "none" if leaf in images else "snappy" for leaf in leaves},
        "use_dictionary": [leaf for leaf in leaves if leaf not in images],
        "column_encoding": dict.fromkeys(images, "PLAIN"),
    }


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    """The Parquet leaf columns of an Arrow column."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [path]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


def _sync(path: Path) -> tuple[int, str]:
    """Force a file to disk; its size and sha256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk: the entry belongs to the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file as a whole, so that a reader or a crash sees the old one or the new one.

    Raises:
        PipelineError: the disk refused.
    """
    with _writing(path):
        scratch = path.with_name(f".{path.name}.tmp")
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
        _sync_folder(path.parent)
