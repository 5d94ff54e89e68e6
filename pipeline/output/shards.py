"""The Parquet writer of one shard, and its commit.

A shard is one Parquet file per subset, written in a scratch folder, put into its place in the store, and made true by
its receipt, which is written last.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.plan import Shard
from pipeline.core.sign_bits import ZERO
from pipeline.output.folder import FileEntry, OutputFolder, Receipt, shard_file
from pipeline.output.local import writing

# A row group closes at whichever comes first. The Hub's viewer reads whole row groups and wants under 300 MB
# of them; streaming readers buffer one per file; a reader that skips by statistics wants them small.
ROW_GROUP_ROWS = 1024
ROW_GROUP_BYTES = 32 * 2**20
# What `datasets` 5.2 passes for the Hub's deduplication (datasets.config.DEFAULT_CDC_OPTIONS).
CONTENT_DEFINED_CHUNKING = {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0}
FOOTER_KEY = "fgsm"


class ShardWriter:
    """The Parquet files of one shard, one for each subset, until they are committed or dropped.

    `pictures` names the schema's columns of encoded images.
    """

    def __init__(
        self,
        folder: OutputFolder,
        shard: Shard,
        subsets: Sequence[str],
        schema: pa.Schema,
        pictures: Sequence[str],
        edition: str,
    ) -> None:
        self.folder, self.shard, self.subsets, self.edition = folder, shard, subsets, edition
        # Batches that are not written yet, each a table for each subset.
        self._waiting: list[Sequence[pa.Table]] = []
        self._writers: list[pq.ParquetWriter] = []
        self._stack = contextlib.ExitStack()
        self.scratch = self._stack.enter_context(folder.store.scratch(shard.name))
        with writing(self.scratch):
            for subset in subsets:
                self._writers.append(
                    pq.ParquetWriter(
                        self.scratch / f"{subset}.parquet",
                        schema,
                        write_page_index=True,
                        use_content_defined_chunking=CONTENT_DEFINED_CHUNKING,
                        **column_options(schema, pictures),
                    )
                )

    def close(self) -> None:
        """Let go of the files and drop what is not committed."""
        for writer in self._writers:
            with contextlib.suppress(OSError):  # a full disk fails again on closing
                writer.close()
        self._stack.close()

    def write(self, tables: Sequence[pa.Table]) -> None:
        """Add one batch: a table for each subset.

        Raises:
            PipelineError: the disk refused.
        """
        self._waiting.append(tables)
        rows = sum(first.num_rows for first, *_ in self._waiting)
        largest = max(sum(table.nbytes for table in batches) for batches in zip(*self._waiting, strict=True))
        if rows >= ROW_GROUP_ROWS or largest >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        with writing(self.scratch):
            for writer, *batches in zip(self._writers, *self._waiting, strict=True):
                table = pa.concat_tables(batches) if batches else None
                # `datasets` 5.2 fails on a row group without rows; a file without row groups it reads as empty.
                if table:
                    # One batch of large images may be many row groups' worth.
                    rows = max(1, ROW_GROUP_BYTES * table.num_rows // max(1, table.nbytes))
                    writer.write_table(table, row_group_size=min(ROW_GROUP_ROWS, rows))
        self._waiting.clear()

    def commit(self, receipt: Receipt) -> Receipt:
        """Close every file and put it into its place, then write the receipt, which is the commit.

        `receipt` is still without files; it is returned as written.

        Raises:
            PipelineError: the disk or the store refused; then there is no receipt.
        """
        if receipt.rows + len(receipt.skipped) != receipt.planned:
            raise RuntimeError(f"{self.shard.name}: rows written and skipped do not add up to those planned")
        self._flush()
        footer = {"run_id": receipt.run_id, "shard": self.shard.name, "rows": receipt.rows}
        files = []
        for subset, writer in zip(self.subsets, self._writers, strict=True):
            file = shard_file(subset, self.shard, self.edition)
            local = self.scratch / f"{subset}.parquet"
            with writing(local):
                writer.add_key_value_metadata(
                    {
                        FOOTER_KEY: json.dumps({**footer, "subset": subset}),
                        # As `datasets` marks it, so that tools know how the pages were cut.
                        "content_defined_chunking": json.dumps(CONTENT_DEFINED_CHUNKING),
                    }
                )
                writer.close()
                with local.open("rb") as written:
                    digest = hashlib.file_digest(written, "sha256").hexdigest()
                size = local.stat().st_size
            self.folder.store.put(local, file)
            files.append(FileEntry(path=file, rows=receipt.rows, bytes=size, sha256=digest))
        receipt = receipt.model_copy(update={"files": tuple(files)}).sealed()
        self.folder.store.commit(
            self.folder.receipt(self.shard, self.edition), receipt.model_dump_json(indent=1).encode()
        )
        return receipt


def column_options(schema: pa.Schema, pictures: Sequence[str]) -> dict[str, Any]:
    """Per-column options as `datasets` chooses them: encoded images are not compressed again.

    Of a sign map in bits, which of them are positive does not compress; which are zero, hardly any, nearly vanishes.
    """
    footer = pa.BufferOutputStream()
    pq.write_metadata(schema, footer)
    leaves = [column.path for column in pq.ParquetFile(footer.getvalue()).schema]
    images = [leaf for leaf in leaves if leaf.split(".")[0] in pictures]
    zeros = [leaf for leaf in images if leaf.endswith(f".{ZERO}")]
    stored = {**dict.fromkeys(leaves, "snappy"), **dict.fromkeys(images, "none"), **dict.fromkeys(zeros, "zstd")}
    return {
        "compression": stored,
        "compression_level": dict.fromkeys(zeros, 1),
        "use_dictionary": [leaf for leaf in leaves if leaf not in images],
        "column_encoding": dict.fromkeys(images, "PLAIN"),
    }
