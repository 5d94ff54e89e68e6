"""Execute: some shards of a run, from source rows to committed files, on this machine.

Loading, attacking, encoding and writing overlap: the loader's threads decode ahead, lanes drive the device,
a pool of threads encodes (the codecs release the GIL), and one thread writes and commits in order. A bounded
number of batches is in flight, so memory does not grow with the dataset.
"""

import contextlib
import json
import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import kinds
from pipeline.core.batches import Batch
from pipeline.core.cores import available_cores
from pipeline.core.errors import CodeError, NonFiniteError, PipelineError, RowError
from pipeline.core.lanes import Lanes
from pipeline.core.left_out import LeftOut, Skipped, sum_left_out
from pipeline.core.plan import Shard
from pipeline.engine.compute import Part, compile_models
from pipeline.engine.loader import load_batches, name_row
from pipeline.engine.progress import Busy, Progress, bottleneck
from pipeline.engine.run import Run, versions
from pipeline.engine.scores import count, score
from pipeline.layouts.base import Scores, picture_columns
from pipeline.layouts.registry import LAYOUTS
from pipeline.output.folder import OutputFolder, Receipt, VariantCounts, add_up
from pipeline.output.manifest import Manifest
from pipeline.output.shards import ShardWriter

# Attacked batches that wait for their encoding: one is written, one encoded, while a third is computed.
BATCHES_IN_FLIGHT = 2
# Images of one encoding task: enough to hide the hand-over, few enough to keep every core busy.
IMAGES_PER_TASK = 32
# Bytes of its pixels at most, as a column of Arrow holds less than 2 GiB.
BYTES_PER_TASK = 2**30
# Where the rows of a source are not known, the share that may be skipped is one of at least so many.
SKIPPED_AMONG = 1000

# Called with a batch's source images, how many of them are labelled, and how many of those are right in each variant,
# by the name of its subset.
Tell = Callable[[int, int, Mapping[str, int]], None]

logger = logging.getLogger(__name__)


def write_shards(
    run: Run, folder: OutputFolder, shards: Sequence[Shard], others: Sequence[Receipt] | None, busy: Busy, tell: Tell
) -> Generator[Receipt, None, None]:
    """Attack, encode and commit some shards of a run, in order; yields the receipt of each.

    Args:
        run: the opened run, compiled if it is to be.
        folder, shards: which to write, and where.
        others: receipts of other shards, whose skipped rows count against `runtime.max_skipped`; None where they are
            not known here, and the caller counts.
        busy: takes the seconds of each stage.
        tell: called with the counts of each batch.

    Raises:
        RowError: a row stops the run.
        PipelineError: the numbers do, or the disk refuses.
    """
    skipped = sum(len(receipt.skipped) for receipt in others or ())
    read = sum(receipt.planned for receipt in others or ())
    sink = _Sink(run, folder, busy)
    encoders = ThreadPoolExecutor(available_cores(), "encode")
    writer = ThreadPoolExecutor(1, "write")
    in_flight: deque[Future[Receipt | None]] = deque()
    try:
        batches = load_batches(run.reader, run.plan, shards, run.config.runtime.workers, pin=run.device.type == "cuda")
        attacked = attack_ahead(run, batches, busy)
        with contextlib.closing(batches), contextlib.closing(attacked):
            for batch, parts in attacked:
                skipped += len(batch.skipped)
                read += batch.place.stop - batch.place.start
                _check_skipped(run, batch, skipped, read, here=others is not None)
                busy.add("load", batch.seconds)
                scores = _score(run, batch, parts)
                encoded = _encode(encoders, parts, run, busy)
                zero_signs = sum((part.zero_signs for part in parts), torch.zeros(len(run.variants), dtype=torch.int64))
                in_flight.append(writer.submit(sink.add, batch, scores, zero_signs, encoded))
                tell(*_progress_counts(batch, scores))
                if len(in_flight) > BATCHES_IN_FLIGHT and (receipt := in_flight.popleft().result()):
                    yield receipt
            while in_flight:
                if receipt := in_flight.popleft().result():
                    yield receipt
    finally:
        # After a failure nothing waits for encodings that nobody will write.
        writer.shutdown(wait=False, cancel_futures=True)
        encoders.shutdown(cancel_futures=True)
        writer.shutdown()
        sink.close()


def tell_speed(folder: OutputFolder, progress: Progress, shares: Mapping[str, float], opened: Manifest) -> None:
    """Say how fast a session was, how busy each stage (1 for always) and what its limit; keep it for the report."""
    device, variants = opened.versions["device"], opened.variants
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
    logger.info("Busy: %s; %s images/s.", busy, f"{progress.rate:,.1f}")
    pictures = len(opened.layout.pictures(variants))
    leaner = [name for name in kinds.LAYOUTS if len(LAYOUTS[name].pictures(variants)) < pictures]
    on_ray = all(opened.on_ray(variant.attack) for variant in variants)
    logger.info("%s", bottleneck(shares, device.startswith("cpu"), leaner if on_ray else []))
    session = {
        "images": progress.fresh,
        "images_per_second": round(progress.rate, 1),
        "device": device,
        "busy": {stage: round(share, 3) for stage, share in shares.items()},
    }
    folder.add_session(json.dumps(session))


def compile_as_begun(run: Run) -> None:
    """Compile the models of a run that were compiled when it began; those that are already are left alone.

    Raises:
        PipelineError: it cannot be compiled here.
    """
    if not run.config.runtime.compile:
        return
    try:
        compile_models(run.attacker, run.device, run.reader.shape, run.plan.batch_size)
    except torch.OutOfMemoryError as error:
        raise _too_large("the compiled models", run.plan.batch_size) from error
    except PipelineError as error:
        raise PipelineError(
            f"runtime.compile: {error}; the run was begun with compiled models. Fix the compiler, or start over with "
            "--set runtime.compile=false --overwrite."
        ) from error


def attack_ahead(run: Run, batches: Iterable[Batch], busy: Busy) -> Generator[tuple[Batch, list[Part]], None, None]:
    """Attack batches on the run's device, in order, with enough of them under way that no lane waits.

    Args:
        run: the opened run.
        batches: of the plan's batch size, on the CPU.
        busy: takes the seconds of the attack.

    Yields:
        Each batch, and its valid rows, attacked, in consecutive parts.

    Raises:
        CodeError: a model or an attack raises something; names the batch.
        NonFiniteError: logits or a gradient hold NaN or infinity; names the batch.
        PipelineError: the device's memory is too small.
    """
    waiting: deque[tuple[Batch, list[Future[Part]]]] = deque()
    with Lanes(run.device, run.chunk) as lanes:
        # Two chunks for each lane: one under way, one that follows.
        ahead = -(-2 * lanes.count * run.chunk // run.plan.batch_size)
        clock = time.thread_time if run.device.type == "cpu" else time.perf_counter
        attacker = busy.timed("attack", run.attacker, clock)
        for batch in batches:
            labels = torch.stack([space.model_labels(batch.labels) for space in run.spaces.values()], 1)
            waiting.append((batch, lanes.submit(attacker, batch.images, labels, _draws(run, batch), valid=batch.valid)))
            if len(waiting) > ahead:
                yield _arrive(*waiting.popleft())
        while waiting:
            yield _arrive(*waiting.popleft())


def _arrive(batch: Batch, futures: Sequence[Future[Part]]) -> tuple[Batch, list[Part]]:
    try:
        return batch, [future.result() for future in futures]
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} in {batch.name}; check the weights, and model.mean and std.") from None
    except CodeError as error:
        raise CodeError(f"{error} ({batch.name})") from error
    except torch.OutOfMemoryError as error:
        raise _too_large(batch.name, len(batch.labels)) from error


def _check_skipped(run: Run, batch: Batch, skipped: int, read: int, *, here: bool) -> None:
    """Stop where undecodable images are not to be skipped, or are too many: of all, or of those read so far."""
    if not batch.skipped:
        return
    runtime, last = run.config.runtime, batch.skipped[-1]
    if runtime.on_error == "fail":
        raise RowError(f"source: {_undecodable(batch.shard, last)}, and runtime.on_error is fail.")
    if here:
        check_share_skipped(skipped, run.plan.total, read, runtime.max_skipped, batch.shard, last)


def check_share_skipped(skipped: int, total: int | None, read: int, most: float, shard: Shard, last: Skipped) -> None:
    """Stop where more than a share of the rows, `most` in [0, 1], was skipped.

    It is of all in the source or, where `total` is None, of those read so far. `last` is the last one, in `shard`.

    Raises:
        RowError: more were.
    """
    if skipped > most * (max(read, SKIPPED_AMONG) if total is None else total):
        raise RowError(
            f"source: {skipped} of {total or read} rows could not be decoded, more than runtime.max_skipped = "
            f"{most:g} allows; the last: {_undecodable(shard, last)}."
        )


def _undecodable(shard: Shard, row: Skipped) -> str:
    return f"{name_row(shard, row.source_index, row.file)} cannot be decoded ({row.reason})"


def _too_large(what: str, size: int) -> PipelineError:
    return PipelineError(
        f"runtime.batch_size: {what}: a batch of {size} does not fit in the device's memory; free what else uses it "
        f"and run the same command again, or start over with --set runtime.batch_size={max(1, size // 2)} --overwrite."
    )


def _score(run: Run, batch: Batch, parts: Sequence[Part]) -> Scores:
    """The scores of a batch's valid rows."""
    labels, variants = batch.labels[batch.valid], run.variants
    if parts:
        logits = [torch.cat(chunks) for chunks in zip(*(part.logits for part in parts), strict=True)]
        predictions = torch.cat([part.predictions for part in parts], 2)
        classes = torch.cat([part.classes for part in parts], 1)
    else:  # every image was skipped
        logits = [torch.zeros((0, 2))] * len(variants)
        predictions = torch.zeros((len(run.models), len(variants), 0), dtype=torch.int64)
        classes = torch.zeros((len(run.attacks), 0), dtype=torch.int64)
    targets: list[Tensor | None] = [None]
    for each, own in zip(run.attacks, classes, strict=True):
        targets += [None if each.goal.target is None else own] * len(each.levels)
    return score(variants, logits, predictions, labels, targets, run.spaces)


def _draws(run: Run, batch: Batch) -> Tensor:
    """A random number for each row of a batch, (N,) int64."""
    draws = np.zeros(len(batch.labels), dtype=np.int64)
    if any(each.goal.target == "random" or each.attack.needs_draws for each in run.attacks):
        rows = run.plan.rows(batch.shard, batch.place)
        draws[: len(rows)] = draw_numbers(run.config.runtime.seed, batch.shard, rows)
    return torch.from_numpy(draws)


def draw_numbers(seed: int, shard: Shard, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """A random number for each of some source rows of a shard, (M,) int64, in [0, 2**31).

    They depend on the run's seed, the file of a streamed source, and the row numbers (M,) alone.
    """
    # Rows of a source that is streamed are counted in each file anew.
    key = [seed, *([zlib.crc32(shard.file.encode())] if shard.file else [])]
    return np.array([np.random.RandomState([*key, row]).randint(2**31) for row in rows], dtype=np.int64)


def _encode(
    encoders: ThreadPoolExecutor, parts: Sequence[Part], run: Run, busy: Busy
) -> list[list[Future[pa.StructArray]]]:
    """Begin to encode a batch: for each stored picture, its rows in pieces that follow each other."""
    encode = busy.timed("encode", run.layout.encode)
    size = max(1, min(IMAGES_PER_TASK, BYTES_PER_TASK // math.prod(run.reader.shape)))
    return [
        [
            encoders.submit(encode, column, piece, run.image_format)
            for part in parts
            for piece in part.pictures[index].split(size)
        ]
        for index, column in enumerate(run.pictures)
    ]


def _progress_counts(batch: Batch, scores: Scores) -> tuple[int, int, dict[str, int]]:
    right = scores.of_own(scores.correct).filled(False).sum(1).tolist()
    labelled, subsets = int(scores.label.count()), [variant.subset for variant in scores.variants]
    return batch.place.stop - batch.place.start, labelled, dict(zip(subsets, right, strict=True))


class _Sink:
    """The shard that is being written, batch by batch, and its counts so far. Only the writer's thread uses it."""

    def __init__(self, run: Run, folder: OutputFolder, busy: Busy) -> None:
        self.run, self.folder, self.busy = run, folder, busy
        self.schema = run.features.arrow_schema
        self.versions = versions(run.device)
        self._open: ShardWriter | None = None
        self._failed = False
        self._start()

    def _start(self) -> None:
        # Of each batch, in every variant.
        self._counts: list[list[VariantCounts]] = []
        self._skipped: list[Skipped] = []
        self._left_out: list[LeftOut] = []

    def add(
        self, batch: Batch, scores: Scores, zero_signs: Tensor, encoded: Sequence[Sequence[Future[pa.StructArray]]]
    ) -> Receipt | None:
        """Write a batch. If it was the last of its shard, commit that and return the receipt."""
        if self._failed:
            return None
        # Until all of it is done: batches that wait when one fails are dropped, as they must not complete its shard.
        self._failed = True
        run = self.run
        if self._open is None:
            columns = picture_columns(run.layout, run.variants)
            self._open = ShardWriter(self.folder, batch.shard, run.stored, self.schema, columns, run.edition)
        kinds = [self.schema.field(column).type for column in run.pictures]
        pictures = [
            pa.chunked_array([piece.result() for piece in pieces], kind)
            for kind, pieces in zip(kinds, encoded, strict=True)
        ]
        tables = run.layout.tables(batch, scores, pictures, self.schema)
        # By the wall, without the encoders: what holds a writer up is the disk.
        self.busy.timed("write", self._open.write, time.perf_counter)(tables)
        self._count(batch, dict(zip(run.stored, tables, strict=True)), zero_signs)
        receipt = None
        if batch.ends_shard:
            receipt = self.busy.timed("write", self._open.commit, time.perf_counter)(self._receipt(batch.shard))
            self.close()
            self._start()
        self._failed = False
        return receipt

    def _count(self, batch: Batch, tables: Mapping[str, pa.Table], zero_signs: Tensor) -> None:
        run, variants = self.run, self.run.variants
        rows = [run.layout.rows(tables, variant, variants) for variant in variants]
        self._counts.append(
            [
                count(variant, now, rows[0], tuple(run.models), zeros)
                for variant, now, zeros in zip(variants, rows, zero_signs.tolist(), strict=True)
            ]
        )
        self._left_out += batch.left_out
        self._skipped += batch.skipped

    def _receipt(self, shard: Shard) -> Receipt:
        counts = [
            add_up(variant, [batch[index] for batch in self._counts], tuple(self.run.models))
            for index, variant in enumerate(self.run.variants)
        ]
        return Receipt(
            run_id=self.run.run_id,
            shard=shard.name,
            split=shard.split,
            planned=len(shard),
            rows=counts[0].rows,
            skipped=tuple(self._skipped),
            counts=tuple(counts),
            files=(),
            versions=self.versions,
            left_out=sum_left_out(self._left_out),
        )

    def close(self) -> None:
        """Drop the shard being written, if any; committed files are elsewhere by then."""
        if self._open is not None:
            self._open.close()
            self._open = None
