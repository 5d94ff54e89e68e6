"""Verify: does the dataset hold what its receipts and its manifest say, down to the pixel?

Always: every file's digest, schema, row count and columns, every source row accounted for, and no pixel
outside its epsilon ball. With `recompute`: the victim looks at the stored bytes again, in the batches of
the run, and every recorded prediction is derived anew. From either layout a batch is first read back as its
images at every epsilon, and a table for each of what is recorded of them.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline.card import card_agrees, write_summaries
from pipeline.columns import FILE, evaluator_columns, kept_columns
from pipeline.compute import check_repeatable, compile_victim, own_copy
from pipeline.config import EvaluatorConfig, is_factory_file
from pipeline.errors import ConfigError, PipelineError, first_line
from pipeline.fgsm import Goal
from pipeline.images import OtherShapeError, UndecodableError, decode_image
from pipeline.labels import LabelSpace
from pipeline.lanes import Lanes, available_cores, chunk_images
from pipeline.manifest import Manifest, Space, require_manifest, summarise
from pipeline.outputs import (
    EvaluatorCounts,
    FileEntry,
    LevelCounts,
    OutputFolder,
    Receipt,
    committed,
    count_evaluator,
    read_receipts,
    shard_file,
    subset_name,
)
from pipeline.plan import Plan, Shard
from pipeline.records import LAYOUTS, Opinion, Scores, make_features, opinions, score
from pipeline.runs import Evaluator, choose_device, load_model, make_attacker, naming_evaluator, versions
from pipeline.sources import UNLABELLED
from pipeline.victims import Victim

logger = logging.getLogger(__name__)

# Outside the recorded environment logits may differ by this much: a prediction may fall otherwise where the two
# top ones are closer, and probabilities may be off by as much.
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 2e-2}
# Problems listed in full; the rest are counted.
LISTED = 20


@dataclass
class Findings:
    """What verification saw. `problems` are sentences; `damaged` names the shards to write again."""

    problems: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    missing: int = 0
    shards: int = 0
    rows: int = 0
    skipped: int = 0
    outside_ball: int = 0
    recomputed: int = 0
    mismatches: int = 0
    near_ties: int = 0
    same_environment: bool = True

    def damage(self, shard: str, problem: str) -> None:
        self.damaged.add(shard)
        self.problems.append(problem)


@dataclass(frozen=True)
class Judge:
    """The models that are asked again, and the environment in which they answer."""

    victim: Victim
    space: LabelSpace
    evaluators: dict[str, Evaluator]
    lanes: Lanes
    versions: dict[str, str]
    compiled_alike: bool


def verify(path: str | Path, *, recompute: bool = False, repair: bool = False) -> Findings:
    """Check a dataset.

    Args:
        path: the output folder.
        recompute: derive every prediction anew from the stored bytes.
        repair: drop the receipts and files of damaged shards, so that `generate` writes them again.

    Raises:
        PipelineError: there is no run in the folder, or its victim cannot be loaded again.
    """
    folder = OutputFolder(path)
    manifest = require_manifest(folder)
    findings = Findings()
    plan = manifest.plan
    sizes = folder.store.sizes()
    receipts, broken = read_receipts(folder, sizes)
    for name in broken:
        findings.damage(Path(name).stem, f".run/receipts/{name} cannot be read as a receipt.")
    _check_listing(manifest, plan, receipts, sizes, findings)
    _check_summaries(folder, manifest, plan, findings)
    with contextlib.ExitStack() as stack:
        shards = [shard for shard in plan.shards if shard.name in receipts and shard.name not in findings.damaged]
        # Loading a victim may run code that the manifest names: never for a dataset of which nothing was made here.
        judge = None
        if recompute and shards:
            announce_factories(folder, manifest)
            judge = stack.enter_context(_judge(manifest))
        decoders = stack.enter_context(ThreadPoolExecutor(available_cores()))
        checker = _Checker(folder, manifest, plan, sizes, findings, judge, decoders)
        for shard in tqdm(shards, unit="shard", desc="verify", disable=None):
            checker.check(shard, receipts[shard.name])
    if repair:
        _drop(folder, manifest, plan, findings.damaged)
    return findings


def announce_factories(folder: OutputFolder, manifest: Manifest) -> None:
    """Say what code of the user's is about to run because a manifest names it; a dataset never brings its own along.

    Raises:
        ConfigError: the code may lie in the dataset's own folder.
    """
    config = manifest.resolved
    # Nothing that lies in an object store is imported from there.
    own = [Path(folder.root).resolve()] if folder.store.local else []
    for model in (config.model, *config.evaluators):
        if model.kind != "factory":
            continue
        file = Path(str(model.name).rpartition(":")[0])
        inside = any(Path.cwd().resolve().is_relative_to(root) for root in own)
        if is_factory_file(str(model.name)):
            # `generate` records whole paths; what is relative was published, or written by hand.
            inside = not file.is_absolute() or any(file.resolve().is_relative_to(root) for root in own)
        if inside:
            raise ConfigError(
                f"model.name: {model.name} would be code out of the dataset itself, which is never run; "
                "put it elsewhere and name it in the manifest by its whole path, or work from another folder."
            )
        logger.warning("Running code that the manifest names: %s. Only for datasets that you trust.", model.name)


@contextlib.contextmanager
def _judge(manifest: Manifest) -> Iterator[Judge]:
    config = manifest.resolved
    precision = config.runtime.precision
    try:
        device = choose_device(config.runtime.device, precision)
    except ConfigError:
        device = choose_device("auto")
    victim = load_model(config.model, config, device)
    if victim.digest != manifest.identity.get("model.content"):
        raise ConfigError(
            "model: the victim that the config names has changed since the run, so it cannot be asked again."
        )
    evaluators = {other.id: _open_evaluator(other, manifest, device) for other in config.evaluators}
    _check_repeatable(victim, evaluators, manifest, device)
    compiled_alike = not config.runtime.compile or _compiles(victim, evaluators, manifest, device)
    chunk = chunk_images(device, config.runtime.batch_size, manifest.shape)
    recorded = manifest.identity.get("runtime.chunk")
    if device.type == config.runtime.device and isinstance(recorded, int) and recorded > 0:
        chunk = recorded
    with Lanes(device, chunk) as lanes:
        space = _space(manifest, manifest)
        yield Judge(victim, space, evaluators, lanes, versions(device), compiled_alike)


def _check_repeatable(
    victim: Victim, evaluators: Mapping[str, Evaluator], manifest: Manifest, device: torch.device
) -> None:
    """Ask each model twice about noise: one that draws random numbers cannot tell damage from chance.

    Raises:
        ConfigError: a model is not deterministic.
    """
    count = chunk_images(torch.device("cpu"), manifest.resolved.runtime.batch_size, manifest.shape)
    noise = torch.randint(
        0, 256, (count, *manifest.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    noise = noise.to(device)
    found = check_repeatable(victim, noise)
    for name, evaluator in evaluators.items():
        with naming_evaluator(name):
            found += [f"evaluators, {name}: {sentence}" for sentence in check_repeatable(evaluator.model, noise)]
    for sentence in found:
        logger.warning("%s.", sentence)


def _open_evaluator(config: EvaluatorConfig, manifest: Manifest, device: torch.device) -> Evaluator:
    with naming_evaluator(config.id):
        model = load_model(config, manifest.resolved, device)
        unchanged = model.digest == manifest.identity.get(f"evaluators.{config.id}.content")
        if config.id not in manifest.evaluators or not unchanged:
            raise ConfigError("it has changed since the run, so it cannot be asked again.")
    return Evaluator(model, _space(manifest, manifest.evaluators[config.id]))


def _compiles(victim: Victim, evaluators: Mapping[str, Evaluator], manifest: Manifest, device: torch.device) -> bool:
    """Compile the models as the run's were; where that fails they run as they are, with other last digits."""
    config = manifest.resolved
    attacker = make_attacker(config, victim, Goal(), evaluators)
    try:
        compile_victim(attacker, device, manifest.shape, config.runtime.batch_size)
    except PipelineError as error:
        logger.warning("%s; its predictions are compared as from another environment.", error)
        return False
    return True


def _space(manifest: Manifest, model: Manifest | Space) -> LabelSpace:
    """How labels and predictions of a model translate; the victim's stand in the manifest itself."""
    return LabelSpace(
        manifest.dataset_classes,
        np.array(model.to_model),
        model.recorded_classes,
        np.array(model.to_recorded),
    )


def _check_listing(
    manifest: Manifest,
    plan: Plan,
    receipts: Mapping[str, Receipt],
    sizes: Mapping[str, int],
    findings: Findings,
) -> None:
    """Every shard of the plan has a receipt of this run, and no other file would be loaded along."""
    missing = [shard.name for shard in plan.shards if shard.name not in receipts and shard.name not in findings.damaged]
    findings.missing = len(missing)
    if missing:
        findings.problems.append(
            f"{len(missing)} of {len(plan.shards)} shards are missing, {missing[0]} first; generate writes them."
        )
    planned = {shard.name for shard in plan.shards}
    for name, receipt in receipts.items():
        if name not in planned:
            findings.problems.append(f".run/receipts/{name}.json belongs to no shard of this run; delete it.")
        elif receipt.run_id != manifest.run_id:
            findings.damage(name, f"The receipt of {name} is of another run ({receipt.run_id}).")
    # Once: it is derived from the config, which is parsed each time.
    stored = manifest.stored
    expected = {shard_file(subset, shard) for shard in plan.shards for subset in stored}
    there = {name for name in sizes if name.split("/")[0] in stored}
    findings.problems += [f"{file} belongs to no shard of this run; delete it." for file in sorted(there - expected)]


def _check_summaries(folder: OutputFolder, manifest: Manifest, plan: Plan, findings: Findings) -> None:
    """The manifest's totals and the card's subsets follow from the receipts."""
    expected = summarise(manifest, committed(folder, manifest.run_id, plan.shards))
    if manifest != expected:
        findings.problems.append("manifest.json does not agree with the receipts; generate writes it again.")
    if not card_agrees(folder, expected):
        findings.problems.append("README.md does not list the subsets as they are; generate writes it again.")


def _drop(folder: OutputFolder, manifest: Manifest, plan: Plan, damaged: set[str]) -> None:
    """Remove what is damaged, the receipts first: a shard without a receipt does not exist."""
    if not damaged:
        return
    with folder.held():
        folder.store.delete(map(folder.receipt, damaged))
        shards = [shard for shard in plan.shards if shard.name in damaged]
        folder.store.delete(shard_file(subset, shard) for subset in manifest.stored for shard in shards)
        write_summaries(folder, manifest)


def _look_again(victim: Victim, evaluators: Sequence[Victim], *chunk: Tensor) -> list[Tensor]:
    """Each model's logits (1 + K, M, classes) of the valid rows of a chunk, the victim's first.

    Args:
        victim: the victim.
        evaluators: those that looked at the same images.
        chunk: 1 + K times (N, C, H, W) uint8, then (N,) bool.
    """
    *images, valid = chunk
    # The clean logits of the run came with the gradient, and some layers (attention) have another kernel for
    # that, with other last digits.
    own = own_copy(victim)
    clean = own(own.unit(images[0]).requires_grad_()).detach()
    answers = [torch.stack([clean, *map(own.predict, images[1:])])]
    answers += [torch.stack([*map(model.predict, images)]) for model in map(own_copy, evaluators)]
    return [logits[:, valid].cpu() for logits in answers]


def _features(manifest: Manifest, place: str) -> datasets.Features:
    """The columns that a manifest says its files have.

    Raises:
        PipelineError: they cannot be read, or are not those that a run of its config writes.
    """
    config = manifest.resolved
    try:
        features = datasets.Features.from_dict(manifest.features)
        expected = make_features(
            LAYOUTS[config.output.layout],
            _space(manifest, manifest),
            targeted=config.attack.target is not None,
            kept={name: features[name] for name in config.source.keep_columns},
            evaluators={name: _space(manifest, space) for name, space in manifest.evaluators.items()},
            streamed=bool(manifest.streamed),
        )
    except Exception as error:  # what is no feature can raise anything there
        raise PipelineError(f"{place}: its features cannot be read: {first_line(error)}") from None
    if features != expected:
        raise PipelineError(f"{place}: its features are not those that a run of its config writes.")
    return features


class _DamageError(Exception):
    """Ends the check of one shard; the message is the problem."""


class _Checker:
    """Checks one shard after another: its files side by side, batch by batch."""

    def __init__(
        self,
        folder: OutputFolder,
        manifest: Manifest,
        plan: Plan,
        sizes: Mapping[str, int],
        findings: Findings,
        judge: Judge | None,
        decoders: Executor,
    ) -> None:
        self.folder, self.plan, self.sizes = folder, plan, sizes
        self.findings, self.judge, self.decoders = findings, judge, decoders
        self.shape = torch.Size(manifest.shape)
        self.levels, self.stored = manifest.levels, manifest.stored
        self.layout = LAYOUTS[manifest.resolved.output.layout]
        self.targeted = manifest.resolved.attack.target is not None
        self.features = _features(manifest, folder.store.at(folder.manifest))
        self.schema = self.features.arrow_schema
        self.exact = True
        self.tolerance = TOLERANCE[manifest.resolved.runtime.precision]
        # What does not depend on epsilon.
        files = [FILE] if FILE in self.schema.names else []
        self.shared = ("label", "source_index", *files, *kept_columns(self.schema.names))
        self.evaluators = tuple(manifest.evaluators)

    def check(self, shard: Shard, receipt: Receipt) -> None:
        """Check a shard; what is wrong goes to the findings."""
        try:
            if [entry.path for entry in receipt.files] != [shard_file(subset, shard) for subset in self.stored]:
                raise _DamageError(f"The receipt of {shard.name} lists other files than the run has.")
            # Each shard has its own: a run may have been resumed elsewhere.
            self.exact = self.judge is None or (receipt.versions == self.judge.versions and self.judge.compiled_alike)
            self.findings.same_environment &= self.exact
            for entry in receipt.files:
                self._check_size(entry)
            try:
                with self.folder.store.fetched([entry.path for entry in receipt.files]) as root:
                    for entry in receipt.files:
                        _check_digest(root, entry)
                    self._check_rows(shard, receipt, root)
            except OSError as error:
                raise _DamageError(f"A file of {shard.name} cannot be read: {first_line(error)}") from None
        except _DamageError as damage:
            self.findings.damage(shard.name, str(damage))
        self.findings.shards += 1

    def _check_size(self, entry: FileEntry) -> None:
        size = self.sizes.get(entry.path)
        if size is None:
            raise _DamageError(f"{entry.path} is missing.")
        if size != entry.bytes:
            raise _DamageError(f"{entry.path} has {size} bytes; its receipt says {entry.bytes}.")

    def _check_rows(self, shard: Shard, receipt: Receipt, root: Path) -> None:
        if shard.stop is None:
            shard = shard.with_rows(receipt.planned)
        skipped = {row.position for row in receipt.skipped}
        # Before anything is made for each row: the numbers may be any.
        if len(skipped) + receipt.rows != shard.rows:
            raise _DamageError(f"The receipt of {shard.name} does not account for all its source rows.")
        places = list(self.plan.batches(shard))
        masks = [
            np.array([place.start + i not in skipped for i in range(place.stop - place.start)]) for place in places
        ]
        counts = [int(mask.sum()) for mask in masks]
        if sum(counts) != receipt.rows:
            raise _DamageError(f"The receipt of {shard.name} does not account for all its source rows.")
        tables = zip(*(self._read(root, entry.path, counts) for entry in receipt.files), strict=True)
        width = 3 + len(EvaluatorCounts.model_fields) * len(self.evaluators)
        totals = np.zeros((len(self.levels), width), dtype=np.int64)
        for place, mask, subsets in zip(places, masks, tables, strict=True):
            rows = self.plan.rows(shard, place)[mask]
            totals += self._check_batch(shard, rows, mask, subsets)
        there = [(count.level, count.rows, self._flat(count)) for count in receipt.counts]
        for name, level, found in zip(self._names(shard), self.levels, totals.tolist(), strict=True):
            if (level, receipt.rows, found) not in there:
                raise _DamageError(f"{name} has other counts than its receipt.")
        self.findings.rows += receipt.rows * len(self.stored)
        self.findings.skipped += len(skipped)

    def _names(self, shard: Shard) -> list[str]:
        """What messages call each epsilon's rows: their file, and the epsilon where they share it."""
        return [
            shard_file(subset_name(level), shard)
            if subset_name(level) in self.stored
            else f"{shard_file(self.stored[0], shard)} at {level}/255"
            for level in self.levels
        ]

    def _read(self, root: Path, name: str, counts: Sequence[int]) -> Iterator[pa.Table]:
        """One file's rows in tables of so many rows each, without holding the file in memory."""
        try:
            file = pq.ParquetFile(root / name)
            # Not the Arrow schemas: Parquet has its own name for the items of a list.
            if datasets.Features.from_arrow_schema(file.schema_arrow) != self.features:
                raise _DamageError(f"{name} has other columns than the manifest says.")
            if file.metadata.num_rows != sum(counts):
                raise _DamageError(f"{name} has {file.metadata.num_rows} rows; its receipt says {sum(counts)}.")
            waiting = self.schema.empty_table()
            batches = file.iter_batches(batch_size=max([1, *counts]))
            for count in counts:
                while waiting.num_rows < count:
                    batch = next(batches, None)
                    if batch is None:
                        raise _DamageError(f"{name} holds fewer rows than its own footer says.")
                    waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch]).cast(self.schema)])
                yield waiting.slice(0, count)
                waiting = waiting.slice(count)
        except (pa.ArrowException, OSError) as error:
            raise _DamageError(f"{name} cannot be read: {first_line(error)}") from None

    def _check_batch(
        self, shard: Shard, rows: NDArray[np.int64], mask: NDArray[np.bool_], subsets: Sequence[pa.Table]
    ) -> NDArray[np.int64]:
        """Check one batch of every subset; (1 + K, n) counts, as `_flat` orders them."""
        files = [shard_file(subset, shard) for subset in self.stored]
        if not np.array_equal(subsets[0].column("source_index").to_numpy(), rows):
            raise _DamageError(f"{files[0]} holds other source rows than the plan says.")
        if shard.file is not None and set(subsets[0].column(FILE).to_pylist()) - {shard.file}:
            raise _DamageError(f"{files[0]} holds rows of another source file than the plan says.")
        images, tables = self._unpack(files, subsets)
        names = self._names(shard)
        totals = []
        for level, name, table, pixels in zip(self.levels, names, tables, images, strict=True):
            self._check_columns(name, level, table, tables[0])
            distance = (pixels.to(torch.int16) - images[0].to(torch.int16)).abs()
            outside = int((distance > level).flatten(1).any(1).sum())
            if outside:
                self.findings.outside_ball += outside
                raise _DamageError(f"{name} has {outside} images outside the epsilon ball of {level}/255.")
            totals.append(self._count(level, table, tables[0]))
        if self.judge is not None and len(rows):
            self._recompute(self.judge, names, mask, images, tables)
        return np.array(totals)

    def _count(self, level: int, table: pa.Table, clean: pa.Table) -> list[int]:
        """What a batch's rows at one epsilon add up to."""
        known = np.asarray(table.column("label").is_valid())
        correct, fooled = (_column(table, flag, False).astype(np.bool_) for flag in ("correct", "fooled"))
        evaluators = {}
        for name in self.evaluators:
            _, right = evaluator_columns(name)
            before, now = (_column(rows, right, False).astype(np.bool_)[known] for rows in (clean, table))
            evaluators[name] = count_evaluator(before, now, fooled[known])
        return self._flat(
            LevelCounts(
                level=level,
                rows=len(known),
                labelled=int(known.sum()),
                correct=int(correct.sum()),
                fooled=int(fooled.sum()),
                confidence_sum=0.0,
                evaluators=evaluators,
            )
        )

    def _flat(self, counts: LevelCounts) -> list[int]:
        """Whole numbers of one epsilon that its rows must add up to, evaluators last."""
        evaluators = [counts.evaluators.get(name, EvaluatorCounts()) for name in self.evaluators]
        values = [value for evaluator in evaluators for value in evaluator.model_dump().values()]
        return [counts.labelled, counts.correct, counts.fooled, *values]

    def _unpack(self, files: Sequence[str], subsets: Sequence[pa.Table]) -> tuple[list[Tensor], list[pa.Table]]:
        """The images at every epsilon, 1 + K times (M, C, H, W) uint8, and what is recorded of them."""
        pictures = [
            self._pictures(table.column(column), file)
            for file, table in zip(files, subsets, strict=True)
            for column in self.layout.pictures
        ]
        try:
            return self.layout.images(pictures, self.levels), self.layout.by_level(subsets, self.levels)
        except ValueError as error:
            raise _DamageError(f"{files[0]}: {error}.") from None

    def _check_columns(self, name: str, level: int, table: pa.Table, clean: pa.Table) -> None:
        if not np.array_equal(table.column("epsilon").to_numpy(), np.full(table.num_rows, level / 255)):
            raise _DamageError(f"{name} has another epsilon than {level}/255.")
        pairs = [("clean_prediction", "prediction"), *((column, column) for column in self.shared)]
        for column, original in pairs:
            if not table.column(column).equals(clean.column(original)):
                raise _DamageError(f"{name} has a {column} that differs from the clean subset's {original}.")
        self._check_nulls(name, level, table)

    def _check_nulls(self, name: str, level: int, table: pa.Table) -> None:
        """Null is what cannot be said, and nothing else."""
        everywhere, nowhere = pa.repeat(True, table.num_rows), pa.repeat(False, table.num_rows)
        unlabelled = table.column("label").is_null()
        fooled = everywhere if not level else nowhere if self.targeted else unlabelled
        expected = {
            "prediction": nowhere,
            "confidence": nowhere,
            "label_confidence": unlabelled,
            "correct": unlabelled,
            "fooled": fooled,
            **({"target": nowhere if level else everywhere} if self.targeted else {}),
        }
        for evaluator in self.evaluators:
            expected |= dict(zip(evaluator_columns(evaluator), (nowhere, unlabelled), strict=True))
        for column, nulls in expected.items():
            if not table.column(column).is_null().equals(pa.chunked_array(nulls)):
                raise _DamageError(f"{name} has a {column} that is null in other rows than it should be.")

    def _pictures(self, column: pa.ChunkedArray, name: str) -> Tensor:
        try:
            pixels = list(
                self.decoders.map(
                    partial(decode_image, shape=self.shape), column.combine_chunks().field("bytes").to_pylist()
                )
            )
        except OtherShapeError:
            raise _DamageError(f"{name} holds an image of another size.") from None
        except UndecodableError as error:
            raise _DamageError(f"{name} holds a broken image: {error}") from None
        return torch.stack(pixels) if pixels else torch.zeros((0, *self.shape), dtype=torch.uint8)

    def _recompute(
        self,
        judge: Judge,
        names: Sequence[str],
        mask: NDArray[np.bool_],
        images: Sequence[Tensor],
        subsets: Sequence[pa.Table],
    ) -> None:
        """Ask the models again, in the same batch of the same shape, with the same holes."""
        slots = torch.from_numpy(np.flatnonzero(mask))
        valid = torch.zeros(self.plan.batch_size, dtype=torch.bool)
        valid[slots] = True
        padded = []
        for pixels in images:
            batch = torch.zeros((self.plan.batch_size, *self.shape), dtype=torch.uint8)
            batch[slots] = pixels
            padded.append(batch)
        models = [evaluator.model for evaluator in judge.evaluators.values()]
        futures = judge.lanes.submit(partial(_look_again, judge.victim, models), *padded, valid=valid)
        try:
            chunks = [future.result() for future in futures]
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"A batch of {self.plan.batch_size}, as the run had it, does not fit in this device's memory; free "
                "what else uses it, or verify on the machine of the run."
            ) from error
        logits, *others = (torch.cat(parts, 1) for parts in zip(*chunks, strict=True))
        labels = torch.from_numpy(_column(subsets[0], "label", UNLABELLED).astype(np.int64))
        again = score(logits, labels, self._target(judge, subsets), judge.space)
        close = self._close(logits)
        for index, (name, table) in enumerate(zip(names, subsets, strict=True)):
            self._compare(again, index, name, table, close)
        for (evaluator, opened), answers in zip(judge.evaluators.items(), others, strict=True):
            (opinion,) = opinions(answers.argmax(-1)[None], labels, {evaluator: opened.space}).values()
            close = self._close(answers)
            for index, (name, table) in enumerate(zip(names, subsets, strict=True)):
                self._compare_opinion(evaluator, opinion, index, name, table, close[index])

    def _close(self, logits: Tensor) -> NDArray[np.bool_]:
        """(1 + K, M): whether a prediction may fall otherwise outside the recorded environment."""
        margins = logits.topk(2, dim=-1).values.diff(dim=-1).abs().squeeze(-1)
        close: NDArray[np.bool_] = (margins < self.tolerance).numpy()
        return close

    def _target(self, judge: Judge, subsets: Sequence[pa.Table]) -> Tensor | None:
        """The recorded targets as model indices; None for the plain attack."""
        if not self.targeted:
            return None
        recorded = _column(subsets[-1], "target", 0).astype(np.int64)
        return torch.from_numpy(np.argsort(judge.space.to_recorded)[recorded])

    def _compare_predictions(
        self, expected: NDArray[np.int64], column: str, name: str, table: pa.Table, close: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Compare one model's predictions at one epsilon; (M,) those that fell otherwise on a near tie."""
        findings = self.findings
        differs = _column(table, column, -1) != expected
        ties: NDArray[np.bool_] = np.zeros_like(differs) if self.exact else differs & close
        wrong = differs & ~ties
        findings.recomputed += len(differs)
        findings.near_ties += int(ties.sum())
        findings.mismatches += int(wrong.sum())
        if wrong.any():
            first = table.slice(int(wrong.argmax()), 1).to_pydict()
            row = f"row {first['source_index'][0]}{f' of {first[FILE][0]}' if FILE in first else ''}"
            of = "" if column == "prediction" else f" in {column}"
            raise _DamageError(
                f"{name} records {int(wrong.sum())} predictions{of} that its pixels do not give; the first is {row}."
            )
        return ties

    def _compare_opinion(
        self, evaluator: str, opinion: Opinion, index: int, name: str, table: pa.Table, close: NDArray[np.bool_]
    ) -> None:
        prediction, correct = evaluator_columns(evaluator)
        ties = self._compare_predictions(opinion.prediction[index], prediction, name, table, close)
        known = np.asarray(table.column("label").is_valid()) & ~ties
        if (_column(table, correct, False).astype(np.bool_) != opinion.correct[index])[known].any():
            raise _DamageError(f"{name} has a wrong value in {correct}.")

    def _compare(self, again: Scores, index: int, name: str, table: pa.Table, close: NDArray[np.bool_]) -> None:
        ties = self._compare_predictions(again.prediction[index], "prediction", name, table, close[index])
        # What follows from a prediction that lay on a tie cannot be held against it, nor on the clean one's.
        checked = ~(ties | (close[0] & (not self.exact)))
        labelled, known = again.labelled & checked, again.fooled_known(index) & checked
        flags = (("correct", again.correct[index], labelled), ("fooled", again.fooled[index], known))
        for column, expected, where in flags:
            if (_column(table, column, False).astype(np.bool_) != expected)[where].any():
                raise _DamageError(f"{name} has a wrong value in {column}.")
        # In the recorded environment every digit is the same.
        tolerance = 0.0 if self.exact else self.tolerance
        chances = (
            ("confidence", again.confidence[index], checked),
            ("label_confidence", again.label_confidence[index], labelled),
        )
        for column, expected, where in chances:
            if (np.abs(_column(table, column, 0.0) - expected)[where] > tolerance).any():
                raise _DamageError(f"{name} has a {column} that its pixels do not give.")


def _check_digest(root: Path, entry: FileEntry) -> None:
    with (root / entry.path).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise _DamageError(f"{entry.path} was altered: its sha256 is not its receipt's.")


def _column(table: pa.Table, name: str, null: Any) -> NDArray[Any]:
    """A column as NumPy, with a stand-in for null."""
    values: NDArray[Any] = table.column(name).fill_null(null).to_numpy()
    return values


def describe(findings: Findings, recompute: bool) -> str:
    """What was checked, in a few lines."""
    lines = [
        f"{findings.shards:,} shards and {findings.rows:,} rows checked; {findings.skipped:,} source rows were skipped",
        f"{findings.outside_ball:,} images outside their epsilon ball",
    ]
    if recompute:
        where = (
            "the recorded environment, exactly"
            if findings.same_environment
            else (
                f"another environment than the recorded one, with {findings.near_ties:,} near ties that fell otherwise"
            )
        )
        lines.append(
            f"{findings.recomputed:,} predictions re-derived from the stored pixels, {findings.mismatches:,} differ; "
            f"compared in {where}"
        )
    lines.append(f"{len(findings.problems):,} problems in {len(findings.damaged):,} shards")
    return "\n".join(lines)


def damage_report(findings: Findings) -> list[str]:
    """The problems as lines, the first ones in full."""
    rest = len(findings.problems) - LISTED
    return findings.problems[:LISTED] + ([f"and {rest} more."] if rest > 0 else [])
