"""Generate: the whole flow, from a config to a complete dataset.

Loading, attacking, encoding and writing overlap: the loader's workers decode ahead, this thread drives the
device, a pool of threads encodes (the codecs release the GIL), and one thread writes and commits in order.
A bounded number of batches is in flight, so memory does not grow with the dataset.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.card import card_agrees, write_summaries
from pipeline.config import Config
from pipeline.errors import ConfigError, NonFiniteError, PipelineError
from pipeline.estimate import check_disk
from pipeline.fgsm import attack
from pipeline.loader import Batch, available_cores, load_batches
from pipeline.manifest import Manifest, read_manifest, summarise
from pipeline.outputs import LevelCounts, OutputFolder, Receipt, SkippedRow, committed, read_receipts
from pipeline.plan import Shard
from pipeline.progress import Progress
from pipeline.records import Scores, encode_column, score
from pipeline.runs import Run, differences, open_run, versions
from pipeline.shards import ShardWriter

# Attacked batches that wait for their encoding: one is written, one encoded, while a third is computed.
BATCHES_IN_FLIGHT = 2
# Images of one encoding task: enough to hide the hand-over, few enough to keep every core busy.
IMAGES_PER_TASK = 32

logger = logging.getLogger(__name__)


def generate(config: Config, *, overwrite: bool = False) -> Manifest:
    """Write the dataset that a config describes, or what is missing of it.

    Args:
        config: the run.
        overwrite: remove the run that is in the output folder first.

    Returns:
        The manifest of the complete dataset.

    Raises:
        ConfigError: the config, or what it names, cannot be used; nothing was written.
        PipelineError: the run failed; what was committed is kept.
    """
    folder = OutputFolder(Path(config.output.path))
    folder.check_usable()
    recorded = None if overwrite else read_manifest(folder)
    run = open_run(config, recorded)
    if not overwrite:
        _check_same(run, recorded, folder)
    shards = run.plan.shards
    done = {} if overwrite else committed(folder, run.run_id, shards)
    unchanged = recorded is not None and summarise(recorded, done) == recorded and card_agrees(folder, recorded)
    if recorded is not None and recorded.complete and unchanged:
        logger.info("All %d shards are already there.", len(shards))
        return recorded
    check_disk(run, folder, [shard for shard in shards if shard.name not in done], overwrite=overwrite)
    with folder.held():
        if overwrite:
            folder.clear()
        elif read_manifest(folder) != recorded:
            raise PipelineError(f"{folder.root} was changed by another run meanwhile; run the same command again.")
        done = committed(folder, run.run_id, shards)
        if done:
            logger.info("%d of %d shards are already there.", len(done), len(shards))
        manifest = write_summaries(folder, recorded or run.manifest())
        try:
            write_shards(run, folder, [shard for shard in shards if shard.name not in done], list(done.values()))
        except BaseException:
            # The card must describe the shards that are there; but what failed first is what the user must read.
            with contextlib.suppress(PipelineError):
                write_summaries(folder, manifest)
            raise
        return write_summaries(folder, manifest)


def _check_same(run: Run, recorded: Manifest | None, folder: OutputFolder) -> None:
    """Refuse to mix two runs in one folder."""
    if recorded is None:
        others = {receipt.run_id for receipt in read_receipts(folder)[0].values()} - {run.run_id}
        if others:
            raise ConfigError(
                f"output.path: {folder.root} holds shards of another run ({min(others)}) and no manifest; "
                "choose another folder, or start over with --overwrite."
            )
        return
    if recorded.run_id != run.run_id:
        raise ConfigError(
            f"output.path: {folder.root} holds another run ({recorded.run_id}), which differs in "
            f"{differences(recorded.identity, run.identity)}; choose another folder, or start over with --overwrite."
        )
    here = versions(run.device)
    changed = [
        f"{name} {recorded.versions.get(name)} then, {here[name]} now"
        for name in here
        if here[name] != recorded.versions.get(name)
    ]
    if changed:
        logger.warning("Resuming in another environment, where last digits may differ: %s.", "; ".join(changed))


def write_shards(run: Run, folder: OutputFolder, shards: Sequence[Shard], done: Sequence[Receipt]) -> None:
    """Attack, encode and commit some shards, in order.

    Args:
        run: the opened run.
        folder: where they go.
        shards: those to write.
        done: receipts of the shards that are there, for the progress and the count of skipped rows.

    Raises:
        PipelineError: a row or the numbers stop the run, or the disk refuses.
    """
    if not shards:
        return
    skipped = sum(len(receipt.skipped) for receipt in done)
    finished = sum(receipt.planned for receipt in done)
    sink = _Sink(run, folder)
    encoders = ThreadPoolExecutor(available_cores(), "encode")
    writer = ThreadPoolExecutor(1, "write")
    in_flight: deque[Future[None]] = deque()
    try:
        batches = load_batches(run.reader, run.plan, shards, run.device, run.config.runtime.workers)
        with contextlib.closing(batches), Progress(len(run.plan), finished, run.levels) as progress:
            for batch in batches:
                skipped += len(batch.skipped)
                _check_skipped(run, batch, skipped)
                pictures, scores, zero_signs = _attack(run, batch)
                encoded = [_encode(encoders, images, run) for images in pictures]
                in_flight.append(writer.submit(sink.add, batch, scores, zero_signs, encoded))
                progress.update(*_progress_counts(run, batch, scores))
                if len(in_flight) > BATCHES_IN_FLIGHT:
                    in_flight.popleft().result()
            while in_flight:
                in_flight.popleft().result()
    finally:
        # After a failure nothing waits for encodings that nobody will write.
        writer.shutdown(wait=False, cancel_futures=True)
        encoders.shutdown(cancel_futures=True)
        writer.shutdown()
        sink.close()


def _check_skipped(run: Run, batch: Batch, skipped: int) -> None:
    """Stop where undecodable images are not to be skipped, or are too many."""
    if not batch.skipped:
        return
    runtime, last = run.config.runtime, batch.skipped[-1]
    row = f"row {last.source_index} of split {batch.shard.split} cannot be decoded ({last.reason})"
    if runtime.on_error == "fail":
        raise PipelineError(f"source: {row}, and runtime.on_error is fail.")
    if skipped > runtime.max_skipped * len(run.plan):
        raise PipelineError(
            f"source: {skipped} of {len(run.plan)} rows could not be decoded, more than runtime.max_skipped = "
            f"{runtime.max_skipped:g} allows; the last: {row}."
        )


def _attack(run: Run, batch: Batch) -> tuple[list[Tensor], Scores, int]:
    """The valid rows' images that are stored, each (M, C, H, W) uint8 on the CPU, their scores, and the zero signs."""
    labels = batch.labels
    try:
        attacked = attack(
            run.victim,
            batch.images,
            run.space.model_labels(labels),
            batch.valid,
            levels=run.config.attack.levels,
            goal=run.goal,
            draws=_draws(run, batch).to(labels.device),
        )
        attacked.check_finite()
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} in {batch.name}; check the weights, and model.mean and std.") from None
    target = None if run.goal.target is None else attacked.classes
    scores = score(attacked.logits, labels, batch.valid, target, run.space)
    stored = run.layout.stored(attacked.images, attacked.sign)
    return [images[batch.valid].cpu() for images in stored], scores, int(attacked.zero_signs)


def _draws(run: Run, batch: Batch) -> Tensor:
    """A random number for each row that depends on the seed and its source row only, (N,) int64."""
    draws = np.zeros(len(batch.labels), dtype=np.int64)
    if run.goal.target == "random":
        rows = run.plan.rows(batch.shard)[batch.place]
        draws[: len(rows)] = [np.random.RandomState([run.config.runtime.seed, row]).randint(2**31) for row in rows]
    return torch.from_numpy(draws)


def _encode(encoders: ThreadPoolExecutor, images_u8: Tensor, run: Run) -> list[Future[pa.StructArray]]:
    return [encoders.submit(encode_column, part, run.image_format) for part in images_u8.split(IMAGES_PER_TASK)]


def _progress_counts(run: Run, batch: Batch, scores: Scores) -> tuple[int, int, dict[int, int]]:
    right = (scores.correct & scores.labelled).sum(1).tolist()
    return batch.place.stop - batch.place.start, int(scores.labelled.sum()), dict(zip(run.levels, right, strict=True))


class _Sink:
    """Where encoded batches go, in order: the shard being written, and its counts so far.

    Used by one thread, the writer's.
    """

    def __init__(self, run: Run, folder: OutputFolder) -> None:
        self.run, self.folder = run, folder
        self.schema = run.features.arrow_schema
        self.versions = versions(run.device)
        self._open: ShardWriter | None = None
        self._failed = False
        self._start()

    def _start(self) -> None:
        self._totals: dict[int, dict[str, Any]] = {
            level: {"rows": 0, "labelled": 0, "correct": 0, "fooled": 0, "confidence_sum": 0.0}
            for level in self.run.levels
        }
        self._skipped: list[SkippedRow] = []
        self._zero_signs = 0

    def add(
        self, batch: Batch, scores: Scores, zero_signs: int, encoded: Sequence[Sequence[Future[pa.StructArray]]]
    ) -> None:
        """Write a batch, and commit its shard if it was the last one.

        Batches that were already waiting when one failed are dropped: they must not complete its shard.
        """
        if self._failed:
            return
        try:
            self._add(batch, scores, zero_signs, encoded)
        except BaseException:
            self._failed = True
            raise

    def _add(
        self, batch: Batch, scores: Scores, zero_signs: int, encoded: Sequence[Sequence[Future[pa.StructArray]]]
    ) -> None:
        run = self.run
        if self._open is None:
            self._open = ShardWriter(self.folder, batch.shard, run.stored, self.schema, run.layout.pictures, run.run_id)
        pictures = [pa.chunked_array([part.result() for part in parts]) for parts in encoded]
        self._open.write(run.layout.tables(self.schema, pictures, scores, run.levels, batch))
        self._count(batch, scores, zero_signs)
        if batch.ends_shard:
            self._open.commit(self._receipt(batch.shard))
            self.close()
            self._start()

    def _count(self, batch: Batch, scores: Scores, zero_signs: int) -> None:
        for index, level in enumerate(self.run.levels):
            totals = self._totals[level]
            totals["rows"] += len(scores.label)
            totals["labelled"] += int(scores.labelled.sum())
            totals["correct"] += int((scores.correct[index] & scores.labelled).sum())
            totals["fooled"] += int((scores.fooled[index] & scores.fooled_known(index)).sum())
            totals["confidence_sum"] += float(scores.confidence[index].sum(dtype=np.float64))
        self._zero_signs += zero_signs
        self._skipped += [
            SkippedRow(position=row.position, source_index=row.source_index, reason=row.reason) for row in batch.skipped
        ]

    def _receipt(self, shard: Shard) -> Receipt:
        rows = int(self._totals[0]["rows"])
        return Receipt(
            run_id=self.run.run_id,
            shard=shard.name,
            split=shard.split,
            planned=len(shard),
            rows=rows,
            skipped=tuple(self._skipped),
            zero_sign_share=self._zero_signs / max(1, rows * int(np.prod(self.run.reader.shape))),
            counts=tuple(LevelCounts(level=level, **totals) for level, totals in self._totals.items()),
            files=(),
            versions=self.versions,
        )

    def close(self) -> None:
        """Drop the shard being written, if any; committed files are elsewhere by then."""
        if self._open is not None:
            self._open.close()
            self._open = None
