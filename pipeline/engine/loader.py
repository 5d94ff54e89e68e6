"""The loader: shards of the plan become batches of uint8 images, ahead of use.

Worker processes open, decode and resize whole batches; where a source is streamed, threads do. A batch never
crosses a shard and always has the same shape: what is missing at the end of a shard, and every image that could
not be decoded, is a masked row of zeros. Images cross the bus as uint8, a quarter of the bytes of float32.
"""

import contextlib
import itertools
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.config.schema import MOST_PIXELS, PreprocessConfig
from pipeline.core.batches import UNLABELLED, Batch, Skipped
from pipeline.core.errors import ConfigError, PipelineError, RowError, first_line
from pipeline.core.images import Opener, UndecodableError
from pipeline.core.lanes import available_cores
from pipeline.core.left_out import LeftOut
from pipeline.core.memory import require_open_files
from pipeline.core.plan import Plan, Shard
from pipeline.engine.decode import read_image
from pipeline.sources.mapped import Source, Split, open_cell, spread
from pipeline.sources.streamed import Read, StreamedSource, Stretch, read_head, read_stretches

MAX_WORKERS = 16
# A batch that takes longer never comes: a process that was forked may wait for a lock that nobody holds any more.
SILENT_SECONDS = 600.0
# Images of each split looked at before a run that takes all sizes as they are.
SIZE_SAMPLES = 1000
# Of a source that is streamed, the rows at the head of each split that are looked at.
HEAD_SAMPLES = 64

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Reader:
    """How rows become pixels: shared by every worker. Labels of a source that is streamed are below `classes`."""

    source: Source
    preprocess: PreprocessConfig
    max_pixels: int
    shape: Shape
    classes: int | None = None

    def read(self, plan: Plan, shard: Shard, place: slice) -> Batch:
        """Open and decode one batch.

        Raises:
            ConfigError: an image has another size than the first one, and nothing resizes it.
        """
        started = time.thread_time()
        split = self._split(shard.split)
        rows = plan.rows(shard, place)
        batch = self._decode(plan, shard, place, split.rows.openers(rows.tolist()), split.labels[rows], split.rows.file)
        kept = split.rows.kept(batch.source_index.tolist())
        return replace(batch, kept=kept, seconds=time.thread_time() - started)

    def read_table(
        self, plan: Plan, shard: Shard, place: slice, table: pa.Table, left_out: tuple[LeftOut, ...] = ()
    ) -> Batch:
        """Decode one batch of a source that is streamed.

        Args:
            plan: the run's plan.
            shard: with its length, if this is the last batch.
            place: of the rows within it.
            table: the rows, as `streams` gives them.
            left_out: of the source where they are.

        Raises:
            ConfigError: as `read`.
            PipelineError: a label is missing, or is no class.
        """
        started = time.thread_time()
        labels = table.column(1).to_numpy().copy()  # Arrow's own memory is read-only
        self._check_labels(shard, place, labels)
        allowed = self.source.allowed if isinstance(self.source, StreamedSource) else ()
        openers = [partial(open_cell, cell, allowed) for cell in table.column(0).to_pylist()]
        batch = self._decode(plan, shard, place, openers, labels)
        kept = table.select(range(2, table.num_columns)).filter(pa.array(batch.valid[: len(labels)].numpy()))
        return replace(batch, kept=kept, seconds=time.thread_time() - started, left_out=left_out)

    def _check_labels(self, shard: Shard, place: slice, labels: NDArray[np.int64]) -> None:
        if getattr(self.source, "need_labels", False) and (labels == UNLABELLED).any():
            row = shard.start + place.start + int((labels == UNLABELLED).argmax())
            raise RowError(
                f"source: row {row} of {shard.file} is unlabelled, and attack.label: dataset needs every label; drop "
                "such rows, or set attack.label=prediction."
            )
        if self.classes is not None and len(labels) and labels.max() >= self.classes:
            raise RowError(
                f"source: {shard.file} has label {labels.max()}, outside the {self.classes} classes (0 to "
                f"{self.classes - 1}); a model with more classes is needed, or model.label_map."
            )

    def _decode(
        self,
        plan: Plan,
        shard: Shard,
        place: slice,
        openers: Sequence[Opener],
        known: NDArray[np.int64],
        file_of: Callable[[int], str | None] = lambda _: None,
    ) -> Batch:
        """A batch without its kept columns; `file_of` names the file of a source row."""
        rows = plan.rows(shard, place)
        channels, height, width = self.shape
        images = torch.zeros((plan.batch_size, height, width, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.full((plan.batch_size,), UNLABELLED, dtype=torch.int64)
        valid = torch.zeros(plan.batch_size, dtype=torch.bool)
        skipped = []
        for slot, opener in enumerate(openers):
            try:
                pixels = read_image(opener, self.preprocess, self.max_pixels)
            except UndecodableError as error:
                row = int(rows[slot])
                skipped.append(Skipped(place.start + slot, row, str(error), file_of(row)))
                continue
            if tuple(pixels.shape) != self.shape:
                row = int(rows[slot])
                raise _mixed_sizes(self.shape, tuple(pixels.shape), name_row(shard, row, file_of(row)))
            images[slot], valid[slot] = pixels, True
        labels[: len(rows)] = torch.from_numpy(known)
        source_index = rows[valid[: len(rows)].numpy()]
        return Batch(shard, place, images, labels, valid, source_index, pa.table({}), tuple(skipped), 0.0)

    def sample(self, plan: Plan, count: int) -> tuple[Tensor, Tensor]:
        """Some images of the run: spread over each split, or the head of the first shard of a source that is streamed.

        Returns:
            Up to `count` images, (n, C, H, W) uint8, and their labels, (n,) int64, -1 for unlabelled. What cannot be
            decoded, or is of another size, is left to the run.
        """
        images, labels = [], []
        if isinstance(self.source, StreamedSource):
            rows = head_openers(self.source, plan.shards[:1], count)
        else:
            rows = _samples(self.source, plan, count)
        for _, label, opener in rows:
            with contextlib.suppress(UndecodableError):
                pixels = read_image(opener, self.preprocess, self.max_pixels)
                if tuple(pixels.shape) == self.shape:
                    images.append(pixels)
                    labels.append(UNLABELLED if self.classes is not None and label >= self.classes else label)
            if len(images) == count:
                break
        found = torch.stack(images) if images else torch.zeros((0, *self.shape), dtype=torch.uint8)
        return found, torch.tensor(labels, dtype=torch.int64)

    def _split(self, name: str) -> Split:
        return next(split for split in self.source.splits if split.name == name)


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
    for where, _, opener in _samples(source, plan):
        try:
            pixels = read_image(opener, preprocess, max_pixels)
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


# What messages call a row, its label and what opens its image.
Sample = tuple[str, int, Opener]


def _samples(source: Source, plan: Plan, count: int = SIZE_SAMPLES) -> Iterator[Sample]:
    """Rows to look at before a run: `count` of each split, or the head of each split of a source that is streamed."""
    if isinstance(source, StreamedSource):
        for name in source.files:
            shards = [shard for shard in plan.shards if shard.split == name]
            yield from head_openers(source, shards, HEAD_SAMPLES)
    for split in source.splits:
        order = plan.orders[split.name]
        for row in order[spread(len(order), count)].tolist():
            file = split.rows.file(row)
            named = f" ({file})" if file else ""
            yield f"row {row} of split {split.name}{named}", int(split.labels[row]), split.rows.openers([row])[0]


def head_openers(source: StreamedSource, shards: Sequence[Shard], count: int) -> Iterator[Sample]:
    """The first `count` rows of some shards, fetched as they are asked for."""
    for shard in shards:
        row = shard.start
        for table in read_head(source, _stretch(source, shard)):
            for cell, label in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
                if not count:
                    return
                yield name_row(shard, row), label, partial(open_cell, cell, source.allowed)
                row, count = row + 1, count - 1


def _stretch(source: StreamedSource, shard: Shard) -> Stretch:
    return Stretch(source.by_name[shard.split, str(shard.file)], shard.start, shard.stop)


class _Batches(Dataset[Batch | PipelineError]):
    """The batches of some shards as a map-style dataset: one item is one whole batch."""

    def __init__(self, reader: Reader, plan: Plan, shards: Sequence[Shard]) -> None:
        self.reader, self.plan, self.shards = reader, plan, shards
        # How many batches there are up to the end of each shard: a list of all would be 1 GB for a billion images.
        self._ends = np.cumsum([-(-len(shard) // plan.batch_size) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, index: int) -> tuple[Shard, slice]:
        """The shard of a batch, and its rows within it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        before = int(self._ends[number - 1]) if number else 0
        start = (index - before) * self.plan.batch_size
        return shard, slice(start, min(start + self.plan.batch_size, len(shard)))

    def __getitem__(self, index: int) -> Batch | PipelineError:
        try:
            batch = self.reader.read(self.plan, *self.place(index))
            return batch if get_worker_info() is None else batch.share_memory()
        except PipelineError as error:
            # Raised in a worker it would arrive wrapped in a traceback; returned it stays one sentence.
            return error
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search("allocate|mmap", str(error)):
                raise
            return PipelineError(
                f"A batch could not be read for want of memory ({first_line(error)}); the same command goes on from "
                "what is committed, with a smaller runtime.workers (0 needs no shared memory) if it happens again."
            )


def _same(item: Any) -> Any:
    return item


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process alone decides what it means.

    SIGTERM stays as it is: DataLoader itself ends workers with it.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_batches(
    reader: Reader, plan: Plan, shards: Sequence[Shard], workers: int | str, *, pin: bool = False
) -> Generator[Batch, None, None]:
    """Read the batches of some shards, in order.

    Args:
        reader: opens and decodes rows.
        plan: the run's plan.
        shards: those to read.
        workers: decoding processes, or threads for a source that is streamed; 0 decodes in this one, `auto` takes the
            cores at hand.
        pin: put images, labels and masks into page-locked memory, from which copies to CUDA are asynchronous.

    Raises:
        PipelineError: what `Reader.read` raises, a worker process died, or too few files may be open for so many.
    """
    count = min(available_cores(), MAX_WORKERS) if workers == "auto" else int(workers)
    if isinstance(reader.source, StreamedSource):
        return _stream_batches(reader, reader.source, plan, shards, max(1, count), pin=pin)
    batches = _Batches(reader, plan, shards)
    count = min(count, len(batches))
    if count:
        require_open_files(count)
    loader = DataLoader(
        batches,
        batch_size=None,
        collate_fn=_same,
        num_workers=count,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupt,
        timeout=SILENT_SECONDS if count else 0,
    )
    return _unwrap(loader)


def _unwrap(loader: DataLoader[Batch | PipelineError]) -> Generator[Batch, None, None]:
    with naming_dead_workers():
        try:
            items = iter(loader)
        except OSError as error:
            raise PipelineError(
                f"Decoding workers cannot be started ({error.strerror}); set a smaller runtime.workers, 0 for none."
            ) from error
        try:
            for item in items:
                if isinstance(item, PipelineError):
                    raise item
                yield item
        finally:
            # A traceback keeps this frame, and workers that the garbage collector finds are waited for 5 s each.
            del items


@contextlib.contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Say in one sentence that a worker died, wherever the main thread is: DataLoader raises from a signal handler.

    Raises:
        PipelineError: a worker process died, or none gives anything any more.
    """
    try:
        yield
    except RuntimeError as error:
        # `worker (pid 7) is killed by signal`; an exception of our own says `worker process 7`.
        if "DataLoader timed out" in str(error):
            raise PipelineError(
                f"The decoding workers gave nothing for {SILENT_SECONDS:g} s; they hang, or the source's disk does. "
                "The same command goes on from what is committed, with runtime.workers=0 if it happens again."
            ) from error
        if "DataLoader worker (pid" not in str(error):
            raise
        raise PipelineError(
            f"A decoding worker died ({first_line(error)}), perhaps for want of memory; "
            "the same command goes on from what is committed, with a smaller runtime.workers if it happens again."
        ) from error


def _stream_batches(
    reader: Reader, source: StreamedSource, plan: Plan, shards: Sequence[Shard], threads: int, *, pin: bool
) -> Generator[Batch, None, None]:
    """The batches of shards that are streamed: some threads fetch, others decode, each with a bounded lead."""
    stretches = [_stretch(source, shard) for shard in shards]
    tables = read_stretches(source, stretches)
    decoders = ThreadPoolExecutor(threads, "decode")
    waiting: deque[Future[Batch]] = deque()
    try:
        for number, own in itertools.groupby(tables, lambda item: item[0]):
            left_out: list[LeftOut] = []
            rows, exact = _noting(own, left_out), stretches[number].file.rows is not None
            for shard, place, table in _cut(shards[number], rows, plan.batch_size, exact=exact):
                waiting.append(decoders.submit(reader.read_table, plan, shard, place, table, tuple(left_out)))
                left_out.clear()
                if len(waiting) > threads:
                    yield _arrived(waiting.popleft(), pin=pin)
        while waiting:
            yield _arrived(waiting.popleft(), pin=pin)
    finally:
        tables.close()
        decoders.shutdown(cancel_futures=True)


def _noting(read: Iterable[Read], left_out: list[LeftOut]) -> Iterator[pa.Table]:
    """The tables alone; what was left out where they are goes into the list."""
    for _, table, left in read:
        left_out += left
        yield table


def _arrived(future: Future[Batch], *, pin: bool) -> Batch:
    return future.result().pin_memory() if pin else future.result()


def _cut(
    shard: Shard, tables: Iterable[pa.Table], size: int, *, exact: bool
) -> Iterator[tuple[Shard, slice, pa.Table]]:
    """The rows of a shard in batches; with the last one the shard has a length, if it is of no rows at all.

    `exact` says that its rows were counted before.

    Raises:
        PipelineError: its file does not hold the rows that were planned.
    """
    waiting: pa.Table | None = None
    start = 0
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        # One row at least is left over: only what follows says whether a batch is the last.
        while waiting.num_rows > size:
            yield shard, slice(start, start + size), waiting.slice(0, size)
            start, waiting = start + size, waiting.slice(size)
    if waiting is None:
        raise RuntimeError(f"{shard.name}: nothing was read, not even an empty table")
    stop = start + waiting.num_rows
    if shard.rows not in (None, stop) and exact:
        raise PipelineError(
            f"source: {shard.file} has changed since the run was planned: it has {stop} rows where {shard.rows} were."
        )
    yield shard.with_rows(stop), slice(start, stop), waiting
