"""The loader: shards of the plan become batches of uint8 images, ahead of use.

One thread fetches tables of rows from the source, others decode and resize whole batches. A batch never crosses a
shard and always has the same shape: what is missing at the end of a shard, and every image that could not be decoded,
is a masked row of zeros. Images cross the bus as uint8, a quarter of the bytes of float32.
"""

import contextlib
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import MOST_PIXELS, PreprocessConfig
from pipeline.core.batches import UNLABELLED, Batch
from pipeline.core.cores import available_cores
from pipeline.core.errors import ConfigError, PipelineError, RowError
from pipeline.core.fetchers import ahead, in_order
from pipeline.core.images import UndecodableError
from pipeline.core.left_out import LeftOut, Skipped
from pipeline.core.plan import Plan, Shard
from pipeline.engine.decode import read_image
from pipeline.sources.base import Read, SampleRow, Source

MAX_WORKERS = 16
# Images of each split looked at before a run that takes all sizes as they are; a source that is streamed gives fewer.
SIZE_SAMPLES = 1000

Shape = tuple[int, int, int]
# The rows of a batch: their shard, with its length if they are its last; where they lie in it; the table of them, as
# the source gives it; what of the source was left out where they are.
Rows = tuple[Shard, slice, pa.Table, tuple[LeftOut, ...]]


@dataclass(frozen=True)
class Reader:
    """How rows become pixels. Labels are below `classes`, where that is known."""

    source: Source
    preprocess: PreprocessConfig
    max_pixels: int
    shape: Shape
    classes: int | None = None

    def read(self, plan: Plan, rows_of_batch: Rows) -> Batch:
        """Decode one batch.

        Raises:
            ConfigError: an image has another size than the first one, and nothing resizes it.
            PipelineError: a label is missing, or is no class; or an image cannot be read.
        """
        started = time.thread_time()
        shard, place, table, left_out = rows_of_batch
        count = table.num_rows
        known = table.column(1).to_numpy()
        self._check_labels(shard, place, known)
        rows = plan.rows(shard, place)
        channels, height, width = self.shape
        # Written through NumPy: PyTorch would start threads of its own for each copy.
        pixels = np.zeros((plan.batch_size, height, width, channels), np.uint8)
        labels = torch.full((plan.batch_size,), UNLABELLED, dtype=torch.int64)
        valid = np.zeros(plan.batch_size, np.bool_)
        skipped = []
        for slot, cell in enumerate(table.column(0).to_pylist()):
            try:
                pixels[slot] = self._pixels(SampleRow(shard, int(rows[slot]), cell, int(known[slot])))
                valid[slot] = True
            except UndecodableError as error:
                name = self.source.name_of(cell)
                skipped.append(Skipped(place.start + slot, int(rows[slot]), str(error), name))
        labels[:count] = torch.tensor(known)
        return Batch(
            shard=shard,
            place=place,
            images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            labels=labels,
            valid=torch.from_numpy(valid),
            source_index=rows[valid[:count]],
            kept=table.select(range(2, table.num_columns)).filter(pa.array(valid[:count])),
            skipped=tuple(skipped),
            seconds=time.thread_time() - started,
            left_out=left_out,
        )

    def decode(self, cell: Any) -> Tensor:
        """The image of a cell, (C, H, W) uint8, of any size; raises what `read_image` does."""
        return read_image(partial(self.source.open, cell), self.preprocess, self.max_pixels)

    def _pixels(self, row: SampleRow) -> NDArray[np.uint8]:
        """The pixels of a row, (H, W, C)."""
        found = self.decode(row.cell)
        if tuple(found.shape) != self.shape:
            raise _mixed_sizes(self.shape, found.shape, _name(self.source, row))
        return found.permute(1, 2, 0).numpy()

    def _check_labels(self, shard: Shard, place: slice, labels: NDArray[np.int64]) -> None:
        if self.source.need_labels and (labels == UNLABELLED).any():
            row = shard.start + place.start + int((labels == UNLABELLED).argmax())
            raise RowError(
                f"source: row {row} of {shard.file} is unlabelled, and an attack with label: dataset needs every "
                "label; drop such rows, or set label: prediction in each attack."
            )
        if self.classes is not None and len(labels) and labels.max() >= self.classes:
            raise RowError(
                f"source: {shard.file} has label {labels.max()}, outside the {self.classes} classes (0 to "
                f"{self.classes - 1}); a model with more classes is needed, or model.label_map."
            )

    def sample(self, plan: Plan, count: int) -> tuple[Tensor, Tensor]:
        """Up to `count` images of the run, (n, C, H, W) uint8, and their labels, (n,) int64, -1 for unlabelled.

        What cannot be decoded, or is of another size, is left to the run.
        """
        images, labels = [], []
        # A request for each further file would be many.
        shards = plan.shards if plan.shards[0].file is None else plan.shards[:1]
        for row in _samples(self.source, plan, shards, count):
            with contextlib.suppress(UndecodableError):
                pixels = self.decode(row.cell)
                if tuple(pixels.shape) == self.shape:
                    images.append(pixels)
                    outside = self.classes is not None and row.label >= self.classes
                    labels.append(UNLABELLED if outside else row.label)
            if len(images) == count:
                break
        found = torch.stack(images) if images else torch.zeros((0, *self.shape), dtype=torch.uint8)
        return found, torch.tensor(labels, dtype=torch.int64)


def name_row(shard: Shard, row: int, file: str | None = None) -> str:
    """A source row, for messages; `file` is the name of its image, where it has one."""
    where = f"row {row} of {f'split {shard.split}' if shard.file is None else shard.file}"
    return f"{where} ({file})" if file else where


def _mixed_sizes(expected: Sequence[int], found: Sequence[int], where: str) -> ConfigError:
    return ConfigError(
        f"source: images differ in size: one is {expected[2]}x{expected[1]} and {where} is {found[2]}x{found[1]}; "
        "set preprocess.resize and preprocess.crop."
    )


def find_shape(source: Source, plan: Plan, preprocess: PreprocessConfig, max_pixels: int) -> Shape:
    """The (C, H, W) that every image of the run has.

    Where nothing brings images to one size, a spread of them is read, so that mixed sizes are noticed
    before anything is written; the loader watches the rest.

    Raises:
        ConfigError: two images differ in size, or they are larger than any that is stored.
        PipelineError: no image can be decoded.
    """
    shape: Shape | None = None
    reason = ""
    for row in _samples(source, plan, plan.shards, SIZE_SAMPLES):
        where = _name(source, row)
        try:
            pixels = read_image(partial(source.open, row.cell), preprocess, max_pixels)
        except UndecodableError as error:
            reason = f"{where} ({error})"
            continue
        channels, height, width = pixels.shape
        if shape is not None and shape != (channels, height, width):
            raise _mixed_sizes(shape, pixels.shape, where)
        if height * width > MOST_PIXELS:
            raise ConfigError(
                f"preprocess: {where} is {width}x{height}, and an image of a dataset has at most {MOST_PIXELS:,} "
                "pixels, whatever runtime.max_pixels says; set preprocess.resize and preprocess.crop."
            )
        shape = (channels, height, width)
        if preprocess.fixes_size:
            return shape
    if shape is None:
        raise PipelineError(f"source: none of its images can be decoded; the last one tried is {reason}.")
    return shape


def _samples(source: Source, plan: Plan, shards: Sequence[Shard], count: int) -> Iterator[SampleRow]:
    """Up to `count` rows of the shards of each split."""
    for split in source.splits:
        yield from source.sample(plan, [shard for shard in shards if shard.split == split], count)


def _name(source: Source, row: SampleRow) -> str:
    return name_row(row.shard, row.number, source.name_of(row.cell))


def load_batches(
    reader: Reader, plan: Plan, shards: Sequence[Shard], workers: int | str, *, pin: bool = False
) -> Generator[Batch, None, None]:
    """Read the batches of some shards, in order.

    Args:
        reader, plan, shards: what reads rows, and which.
        workers: decoding threads, beside one that fetches; 0 does both in this one, as batches are asked for, and
            `auto` takes the cores at hand.
        pin: put images, labels and masks into page-locked memory, from which copies to CUDA are asynchronous.

    Raises:
        PipelineError: what `Reader.read` and the source raise.
    """
    threads = min(available_cores(), MAX_WORKERS) if workers == "auto" else int(workers)
    tables = reader.source.tables(plan, shards)
    with contextlib.ExitStack() as stack:
        fetched = stack.enter_context(contextlib.closing(ahead(tables) if threads else tables))
        rows, read = _cut(fetched, plan.batch_size), partial(reader.read, plan)
        batches: Iterator[Batch] = map(read, rows)
        if threads:
            decoders = ThreadPoolExecutor(threads, "decode")
            stack.callback(decoders.shutdown, cancel_futures=True)
            batches = (coming.result() for _, coming in in_order(rows, partial(decoders.submit, read), threads + 1))
        for batch in batches:
            yield batch.pin_memory() if pin else batch


def _cut(fetched: Iterable[Read], size: int) -> Iterator[Rows]:
    """The rows of shards in batches; with the last one of a shard it has a length, if it is of no rows at all."""
    for shard, own in itertools.groupby(fetched, lambda read: read[0]):
        waiting, start = pa.table({}), 0
        left_out: tuple[LeftOut, ...] = ()
        for _, table, left in own:
            waiting = pa.concat_tables([waiting, table]) if waiting.num_rows else table
            left_out += left
            # One row at least is left over: only what follows says whether a batch is the last.
            while waiting.num_rows > size:
                yield shard, slice(start, start + size), waiting.slice(0, size), left_out
                waiting, left_out, start = waiting.slice(size), (), start + size
        stop = start + waiting.num_rows
        yield shard.with_rows(stop), slice(start, stop), waiting, left_out
