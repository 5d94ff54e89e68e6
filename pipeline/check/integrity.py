"""Integrity: what `verify` checks of manifest, card, listing and shards without asking a model."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
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

from pipeline.attacks.load import load_attack
from pipeline.check.findings import DamageError, Findings, UnreadError, column_of, refuse_rows
from pipeline.check.recompute import Recomputation
from pipeline.core.batches import UNLABELLED, Batch
from pipeline.core.console import Bar
from pipeline.core.errors import ConfigError, PipelineError, first_line
from pipeline.core.images import OtherShapeError, UndecodableError, decode_image
from pipeline.core.lattice import common_sign, distance, step, stored_sign
from pipeline.core.plan import Plan, Shard
from pipeline.core.sign_bits import decode_cells
from pipeline.core.variants import by_attack
from pipeline.engine.execute import draw_numbers
from pipeline.engine.loader import Reader, load_batches
from pipeline.engine.run import PACKAGES
from pipeline.engine.scores import complete_scores, contents_of, count, own_models
from pipeline.layouts.base import LABEL, Scores, kept_columns, make_features, model_columns
from pipeline.models.label_space import LabelSpace, is_one_to_one, map_classes, recorded_indices
from pipeline.output.card import make_configs, read_configs
from pipeline.output.folder import FileEntry, OutputFolder, Receipt, VariantCounts, add_up, committed, shard_file
from pipeline.output.manifest import ON_RAY, Manifest, altered_manifest, contradictions, summarise
from pipeline.output.settings import version_changes
from pipeline.output.shards import FOOTER_KEY


def check_manifest(manifest: Manifest, folder: OutputFolder) -> None:
    """The parts of a manifest agree with each other. Where they do not, what follows from it would blame other files.

    Raises:
        PipelineError: they do not.
    """
    config = manifest.resolved
    wrong = contradictions(manifest)
    spaces = manifest.label_spaces
    wrong += [
        f"models.{name}.label_map"
        for name, model in config.all_models.items()
        if name in spaces and not _fits(model.label_map, spaces[name])
    ]
    # What code of the user's own says of itself only `recompute` asks, which may run it.
    wrong += [
        f"attacks.{name}.{ON_RAY}"
        for name, attack in config.all_attacks.items()
        if attack.own_code is None and load_attack(attack).attack.on_ray != manifest.on_ray(name)
    ]
    if wrong:
        raise altered_manifest(folder, f"it contradicts itself in {', '.join(wrong)}")


def _fits(asked: Any, space: LabelSpace) -> bool:
    """Whether a model's classes are recorded as its label map asks for, as far as its names are not needed."""
    count = len(space.to_recorded)
    if not np.array_equal(space.to_recorded, recorded_indices(space.to_model, count)):
        return False
    if is_one_to_one(space.to_model, count) and space.recorded_classes != space.dataset_classes:
        return False
    if not isinstance(asked, Mapping) or any(isinstance(value, str) for value in asked.values()):
        return True
    try:
        return np.array_equal(space.to_model, map_classes(asked, space.dataset_classes, None, count))
    except ConfigError:
        return False


def check_listing(
    manifest: Manifest, plan: Plan, receipts: Mapping[str, Receipt], sizes: Mapping[str, int], findings: Findings
) -> None:
    """Every shard of the plan has a receipt of this run, and no other file would be loaded along."""
    stored, edition = manifest.stored, manifest.edition  # once: the config is parsed each time
    files = {shard.name: [shard_file(subset, shard, edition) for subset in stored] for shard in plan.shards}
    absent = [name for name in files if name not in receipts and name not in findings.damaged]
    findings.missing = len(absent)
    missing = [name for name in absent if not sizes.keys() >= {*files[name]}]
    if missing:
        findings.problems.append(
            f"{len(missing)} of {len(files)} shards are missing, {missing[0]} first; generate writes them."
        )
    if unchecked := [name for name in absent if sizes.keys() >= {*files[name]}]:
        findings.problems.append(
            f"{len(unchecked)} of {len(files)} shards have no receipt in {OutputFolder.receipts}, {unchecked[0]} "
            "first, so they were not checked, though their files are there; copy that folder too, if the dataset was "
            "copied without it, or let generate write them again."
        )
    for name, receipt in receipts.items():
        if name in files and receipt.run_id != manifest.run_id:
            findings.damage(name, f".run/receipts/{name}-{edition}.json is of another run ({receipt.run_id}).")
    expected = set(itertools.chain.from_iterable(files.values()))
    others = sorted(name for name in sizes if name.split("/")[0] in stored and name not in expected)
    # By their names readers take these for the run's.
    strange = [f".run/receipts/{name}-{edition}.json" for name in receipts if name not in files]
    strange += [name for name in others if name.endswith(f"-{edition}.parquet")]
    findings.problems += [f"{file} belongs to no shard of this run; delete it." for file in strange]
    findings.others = [name for name in others if name not in strange]


def check_summaries(folder: OutputFolder, manifest: Manifest, plan: Plan, findings: Findings) -> None:
    """The manifest's totals and the card's subsets follow from the receipts, if those are sound themselves."""
    if findings.damaged:
        return
    expected = summarise(manifest, committed(folder, manifest.edition, plan.shards))
    differing = [key for key in type(manifest).model_fields if getattr(manifest, key) != getattr(expected, key)]
    card = read_configs(folder)
    if manifest.files == expected.files and card == make_configs(manifest) != make_configs(expected):
        # Two to one: manifest and card were made from other receipts of the same files.
        findings.problems.append(
            f"{folder.receipts} holds an altered receipt: manifest.json and README.md were made from another. Restore "
            "it, as generate would take it for what it says now."
        )
        return
    if differing:
        findings.problems.append(
            f"manifest.json does not agree with the receipts in {', '.join(differing)}; generate writes it again."
        )
    if card != make_configs(expected):
        findings.problems.append("README.md does not list the subsets as they are; generate writes it again.")


def _features(manifest: Manifest, folder: OutputFolder) -> datasets.Features:
    """The columns that a manifest says its files have, which are those that a run of its config writes."""
    config = manifest.resolved
    try:
        features = datasets.Features.from_dict(manifest.features)
        kept = {name: features[name] for name in config.source.kept}
        expected = make_features(manifest.layout, contents_of(config, manifest.label_spaces, kept))
    except Exception as error:  # what is no feature can raise anything there
        place = folder.store.at(folder.manifest)
        raise PipelineError(f"{place}: its features cannot be read: {first_line(error)}") from None
    # As JSON too: what `datasets` does not know of a feature it leaves out.
    if features != expected or json.loads(json.dumps(expected.to_dict())) != manifest.features:
        raise altered_manifest(folder, "its features are not those that a run of its config writes")
    return features


@dataclass
class ShardCheck:
    """Checks one shard after another: its files side by side, batch by batch."""

    folder: OutputFolder
    manifest: Manifest
    plan: Plan
    sizes: Mapping[str, int]
    findings: Findings
    recomputation: Recomputation | None
    reader: Reader | None
    decoders: Executor
    progress: Bar

    def __post_init__(self) -> None:
        manifest = self.manifest
        self.variants, self.stored, self.edition = manifest.variants, manifest.stored, manifest.edition
        self.levels = [variant.level for variant in self.variants]
        self.layout, self.shape, config = manifest.layout, manifest.shape, manifest.resolved
        # Of each attack on each model: the indices of its variants.
        self.attacks = by_attack(self.variants)
        self.on_ray = [index > 0 and manifest.on_ray(one.attack) for index, one in enumerate(self.variants)]
        self.features = _features(manifest, self.folder)
        self.schema = self.features.arrow_schema
        self.listed = {entry.path: entry for entry in manifest.files}
        self.spaces = manifest.label_spaces
        self.models = list(self.spaces)
        self.own_classes = [len(self.spaces[name].to_recorded) for name in own_models(self.variants, self.models)]
        targets = {name: attack.target for name, attack in config.all_attacks.items()}
        self.targeted = [one.attack is not None and targets[one.attack] is not None for one in self.variants]

    def check(self, shard: Shard, receipt: Receipt) -> None:
        """Check a shard; what is wrong goes to the findings."""
        try:
            self._check_receipt(shard, receipt)
            if self.recomputation is not None:
                self.recomputation.compare_environment(receipt)
            for entry in receipt.files:
                if entry.path not in self.sizes:
                    raise DamageError(f"{entry.path} is missing.")
                self._compare_file(shard, entry, "bytes", self.sizes[entry.path])
            with contextlib.ExitStack() as stack:
                root = self._fetch(stack, receipt)
                for entry in receipt.files:
                    with (root / entry.path).open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    self._compare_file(shard, entry, "sha256", digest)
                self._check_rows(shard, receipt, root)
        except DamageError as damage:
            self.findings.damage(shard.name, str(damage))
        except (UnreadError, OSError) as error:
            self.findings.cannot_read(shard.name, first_line(error))
            return
        self.findings.shards += 1

    def _check_receipt(self, shard: Shard, receipt: Receipt) -> None:
        """What a receipt says of its shard is what the plan says, as far as no row tells."""
        planned = receipt.planned if shard.rows is None else shard.rows
        if (receipt.shard, receipt.split, receipt.planned) != (shard.name, shard.split, planned):
            raise DamageError(f"{self._receipt(shard)} is of another shard, or of another number of rows.")
        if [entry.path for entry in receipt.files] != self._files(shard):
            raise DamageError(f"{self._receipt(shard)} lists other files than the run has.")
        # Before anything is made for each row: the numbers may be any.
        if len(receipt.skipped) + receipt.rows != planned or {e.rows for e in receipt.files} != {receipt.rows}:
            raise DamageError(f"{self._receipt(shard)} does not account for all source rows of its shard.")
        # Datasets that were made before imagecodecs wrote WebP do not name it.
        if not {"python", "device", *PACKAGES} - {"imagecodecs"} <= set(receipt.versions):
            raise DamageError(f"{self._receipt(shard)} does not say all versions.")

    def _files(self, shard: Shard) -> list[str]:
        """The files of a shard, one for each of the stored subsets."""
        return [shard_file(subset, shard, self.edition) for subset in self.stored]

    def _receipt(self, shard: Shard) -> str:
        return self.folder.receipt(shard, self.edition)

    def _fetch(self, stack: contextlib.ExitStack, receipt: Receipt) -> Path:
        """A local folder with a shard's files, until the stack is left."""
        try:
            return stack.enter_context(self.folder.store.fetched([entry.path for entry in receipt.files]))
        except PipelineError as error:  # a store's sentence
            raise UnreadError(str(error)) from None

    def _compare_file(self, shard: Shard, entry: FileEntry, key: str, found: Any) -> None:
        """A file is as its receipt says. Where the manifest lists it as it was found, the receipt was altered."""
        said = getattr(entry, key)
        if found == said:
            return
        if self.listed.get(entry.path) == entry.model_copy(update={key: found}):
            raise DamageError(f"{self._receipt(shard)} says {key} {said} of {entry.path}, which has {found}.")
        raise DamageError(f"{entry.path} has {key} {found}; its receipt says {said}.")

    def _check_rows(self, shard: Shard, receipt: Receipt, root: Path) -> None:
        if shard.stop is None:
            shard = shard.with_rows(receipt.planned)
        self._check_skipped(shard, receipt)
        skipped = {row.position for row in receipt.skipped}
        places = list(self.plan.batches(shard))
        masks = [np.array([row not in skipped for row in range(place.start, place.stop)]) for place in places]
        counts = [int(mask.sum()) for mask in masks]
        tables = zip(*(self._read(shard, subset, root, counts) for subset in self.stored), strict=True)
        with contextlib.closing(self._originals(shard)) as originals:
            checked = [
                self._check_batch(shard, place, mask, subsets, next(originals), receipt)
                for place, mask, subsets in zip(places, masks, tables, strict=True)
            ]
        found = [
            add_up(variant, [batch[index] for batch, _ in checked], self.models)
            for index, variant in enumerate(self.variants)
        ]
        zero = sum((signs for _, signs in checked), np.zeros((2, len(found)), dtype=np.int64))
        self._check_counts(shard, receipt, found, *zero)
        self.findings.rows += receipt.rows * len(self.stored)
        self.findings.skipped += len(skipped)

    def _check_skipped(self, shard: Shard, receipt: Receipt) -> None:
        """Skipped rows are in order, each at a place of the shard, and the source row that the plan has there."""
        positions = [row.position for row in receipt.skipped]
        if not positions:
            return
        if positions != sorted(set(positions)) or positions[-1] >= len(shard):
            raise DamageError(f"{self._receipt(shard)} lists skipped rows outside of its shard.")
        if [row.source_index for row in receipt.skipped] != self.plan.rows(shard)[positions].tolist():
            raise DamageError(f"{self._receipt(shard)} lists skipped rows that the plan has elsewhere.")

    def _check_counts(
        self,
        shard: Shard,
        receipt: Receipt,
        found: Sequence[VariantCounts],
        least: NDArray[np.int64],
        most: NDArray[np.int64],
    ) -> None:
        """The counts of a receipt are those of its rows; of the values that do not move bounds are known, (V,) each."""
        if len(receipt.counts) != len(found):
            raise DamageError(f"{self._receipt(shard)} counts other epsilons than the run has.")
        for index, (said, here, name) in enumerate(zip(receipt.counts, found, self._names(shard), strict=True)):
            if not least[index] <= said.zero_signs <= most[index]:
                raise DamageError(f"{self._receipt(shard)} has a zero_signs that is not that of the images of {name}.")
            # The order of a sum changes its last digits: relatively, by at most the rows times 2**-53.
            close = math.isclose(said.confidence_sum, here.confidence_sum, rel_tol=1e-9)
            known = {"confidence_sum": said.confidence_sum, "zero_signs": said.zero_signs}
            if not close or said != here.model_copy(update=known):
                raise DamageError(f"{self._receipt(shard)} has other counts than the rows of {name}.")
        for indices in self.attacks:
            # Along one direction the same values stay at every epsilon, those that clipping hides too.
            if self.on_ray[indices[0]] and len({receipt.counts[index].zero_signs for index in indices}) > 1:
                raise DamageError(f"{self._receipt(shard)} has a zero_signs of one epsilon that is not the others'.")

    def _count_zero_signs(self, variant: int, images: Sequence[Tensor], signs: Sequence[Tensor]) -> tuple[int, int]:
        """How many values of a batch the attack did not move: the least and the most that there can be."""
        clean, moved = images[0], images[variant]
        if not self.on_ray[variant]:
            return (still := int((moved == clean).sum())), still
        sign = next(own for indices, own in zip(self.attacks, signs, strict=True) if variant in indices)
        # Where the sign itself is not stored, 0 is not told from a step beyond black or white, which is clipped.
        sure = sign == 0 if self.layout.stores_sign else (sign == 0) & (clean > 0) & (clean < 255)
        return int(sure.sum()), int((sign == 0).sum())

    def _names(self, shard: Shard) -> list[str]:
        """What messages call each epsilon's rows: their file, and the epsilon where they share it."""
        files = [shard_file(self.layout.subset(variant), shard, self.edition) for variant in self.variants]
        if not self.layout.per_image:
            return files
        made = [f" of {one.maker}" if one.pair else "" for one in self.variants]
        return [f"{file} at {k}/255{of}" for file, k, of in zip(files, self.levels, made, strict=True)]

    def _read(self, shard: Shard, subset: str, root: Path, counts: Sequence[int]) -> Iterator[pa.Table]:
        """One file's rows in tables of so many rows each, without holding the file in memory."""
        name = shard_file(subset, shard, self.edition)
        try:
            file = pq.ParquetFile(root / name)
            self._check_schema(name, file.schema_arrow)
            self._check_footer(name, file.metadata.metadata, shard, subset, sum(counts))
            if file.metadata.num_rows != sum(counts):
                raise DamageError(f"{name} has {file.metadata.num_rows} rows; its receipt says {sum(counts)}.")
            waiting = self.schema.empty_table()
            batches = file.iter_batches(batch_size=max([1, *counts]))
            for count in counts:
                while waiting.num_rows < count:
                    batch = next(batches, None)
                    if batch is None:
                        raise DamageError(f"{name} holds fewer rows than its own footer says.")
                    waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch]).cast(self.schema)])
                yield waiting.slice(0, count)
                waiting = waiting.slice(count)
        except MemoryError:  # Arrow has one of its own, which is of both kinds
            raise
        except (pa.ArrowException, OSError) as error:
            # Only what the operating system refuses has a number.
            kind = UnreadError if isinstance(error, OSError) and error.errno is not None else DamageError
            raise kind(f"{name} cannot be read: {first_line(error)}") from None

    def _originals(self, shard: Shard) -> Generator[Batch | None, None, None]:
        """A shard's batches as the source has them, and without end None where it cannot be asked."""
        try:
            if self.reader is not None:
                yield from load_batches(self.reader, self.plan, [shard], 0)
        except PipelineError as error:
            self.reader = None
            self.findings.problems.append(f"From {shard.name} on nothing was compared with the source: {error}")
        yield from itertools.repeat(None)

    def _check_schema(self, name: str, schema: pa.Schema) -> None:
        # Not the Arrow schemas: Parquet has its own name for the items of a list.
        features = datasets.Features.from_arrow_schema(schema)
        if features == self.features:
            return
        # Our own columns follow from the config. Those that are carried through, only the files and the manifest tell.
        kept = kept_columns(self.schema.names)
        if {**features, **{column: self.features[column] for column in kept}} == self.features:
            raise altered_manifest(self.folder, f"its features are not those of {name}, whose digest is its receipt's")
        raise DamageError(f"{name} has other columns than the manifest says.")

    def _check_footer(self, name: str, metadata: Mapping[bytes, bytes], shard: Shard, subset: str, rows: int) -> None:
        """What the file says of itself is what it is taken for."""
        expected = {"run_id": self.manifest.run_id, "shard": shard.name, "rows": rows, "subset": subset}
        try:
            found = json.loads(metadata.get(FOOTER_KEY.encode(), b""))
        except ValueError:
            found = None
        if found != expected:
            raise DamageError(f"{name} is marked as a file of another run, shard or subset.")

    def _check_batch(
        self,
        shard: Shard,
        place: slice,
        mask: NDArray[np.bool_],
        subsets: Sequence[pa.Table],
        original: Batch | None,
        receipt: Receipt,
    ) -> tuple[list[VariantCounts], NDArray[np.int64]]:
        """What one batch of every subset adds up to in each variant, and its least and most zero signs, (2, V)."""
        rows = self.plan.rows(shard, place)[mask]
        files, names = dict(zip(self.stored, self._files(shard), strict=True)), self._names(shard)
        stored = dict(zip(self.stored, subsets, strict=True))
        images, signs, tables = self._unpack(files, stored)
        for index, (name, table) in enumerate(zip(names, tables, strict=True)):
            self._check_ranges(name, table, index)
        clean = tables[0]
        # The batch that the run wrote, as far as the plan and the rows themselves say.
        labels = torch.full((len(mask),), UNLABELLED, dtype=torch.int64)
        labels[torch.from_numpy(mask)] = torch.from_numpy(column_of(clean, LABEL, UNLABELLED).astype(np.int64))
        kept = clean.select(kept_columns(self.schema.names))
        batch = Batch(shard, place, images[0], labels, torch.from_numpy(mask), rows, kept, (), 0.0)
        if original is not None:
            batch = self._compare_source(original, batch, files[self.stored[0]], receipt)
        recorded = self._recorded(tables, batch.labels[batch.valid].numpy())
        self._compare_columns(names, stored, batch, recorded, tables)
        for indices, sign in zip(self.attacks, signs, strict=True):
            for index in indices:
                self._check_pixels(index, names[index], images, sign, clean)
        if self.recomputation is not None and len(rows):
            draws = draw_numbers(self.manifest.resolved.runtime.seed, shard, rows)
            self.recomputation.check(names, mask, images, signs, recorded, clean, draws)
        counts = [count(one, table, clean, self.models) for one, table in zip(self.variants, tables, strict=True)]
        zero = [(0, 0), *(self._count_zero_signs(index, images, signs) for index in range(1, len(images)))]
        self.progress.advance(len(mask))
        return counts, np.array(zero).T

    def _recorded(self, tables: Sequence[pa.Table], labels: NDArray[np.int64]) -> Scores:
        """What the rows record of the models' answers, and what follows from these and the labels."""

        def stacked(name: str, null: float) -> NDArray[Any]:
            return np.stack([column_of(table, name, null) for table in tables])

        several = len(self.models) > 1
        predictions = [stacked(model_columns(name)[0] if several else "prediction", -1) for name in self.models]
        targets = np.zeros((len(tables), len(labels)), np.int64)
        for indices in self.attacks:  # an attack aims at the same classes at each epsilon
            if self.targeted[indices[-1]]:
                targets[indices] = column_of(tables[indices[-1]], "target", 0)
        return complete_scores(
            self.variants,
            np.stack(predictions),
            stacked("confidence", 0.0),
            stacked("label_confidence", 0.0),
            labels,
            np.ma.MaskedArray(targets, np.repeat(~np.array(self.targeted)[:, None], len(labels), 1)),
            self.spaces,
        )

    def _check_ranges(self, name: str, table: pa.Table, variant: int) -> None:
        """Classes are classes, and probabilities are such."""
        own = self.own_classes[variant]
        classes_of = {LABEL: len(self.manifest.dataset_classes), "prediction": own}
        if self.targeted[variant]:
            classes_of["target"] = own
        if len(self.models) > 1:
            classes_of |= {model_columns(name)[0]: len(space.to_recorded) for name, space in self.spaces.items()}
        for column, classes in classes_of.items():
            values = column_of(table, column, 0)
            if ((values < 0) | (values >= classes)).any():
                raise DamageError(f"{name} has a {column} that is no class.")
        for column in ("confidence", "label_confidence"):
            values = column_of(table, column, 0.0)
            # A softmax may exceed 1 by its rounding.
            if not ((values >= 0) & (values < 1.001)).all():
                raise DamageError(f"{name} has a {column} that is no probability.")

    def _compare_columns(
        self,
        names: Sequence[str],
        stored: Mapping[str, pa.Table],
        batch: Batch,
        recorded: Scores,
        tables: Sequence[pa.Table],
    ) -> None:
        """The rows are those that a run writes which knows this batch, and of the models' answers what is recorded."""
        pictures = [stored[subset].column(column) for subset, column in self.layout.pictures(self.variants)]
        written = self.layout.tables(batch, recorded, pictures, self.schema)
        again = dict(zip(stored, written, strict=True))
        for variant, name, table in zip(self.variants, names, tables, strict=True):
            expected = self.layout.rows(again, variant, self.variants)
            for column in table.column_names:
                if not _same(table.column(column), expected.column(column)):
                    raise DamageError(
                        f"{name} has other values in {column} than follow from plan, source and its other columns."
                    )

    def _check_pixels(self, variant: int, name: str, images: Sequence[Tensor], sign: Tensor, clean: pa.Table) -> None:
        """An image is the clean one, moved along the one sign if the attack has one, and in any case in its ball."""
        level, pixels, on_ray = self.levels[variant], images[variant], self.on_ray[variant]
        moved = step(images[0], sign, level)
        if on_ray and torch.equal(moved, pixels):
            return
        outside = (distance(pixels, images[0]) > level).flatten(1).any(1).numpy()
        self.findings.outside_ball += int(outside.sum())
        refuse_rows(name, outside, f"images outside the epsilon ball of {level}/255", clean)
        if on_ray:
            other = (moved != pixels).flatten(1).any(1).numpy()
            what = f"images that are not the clean ones moved by {level}/255 along one sign for all epsilons"
            refuse_rows(name, other, what, clean)

    def _compare_source(self, original: Batch, batch: Batch, name: str, receipt: Receipt) -> Batch:
        """The clean images of a batch are the source's; the batch with the source's labels and kept columns."""
        rows = len(batch.valid)
        self.findings.compared += len(batch.source_index)
        decodes = torch.equal(original.valid[:rows], batch.valid)
        other = int((original.images[original.valid] != batch.images).flatten(1).any(1).sum()) if decodes else 0
        if other or not decodes:
            self._report_decoded(name, receipt, f"{other} clean images" if decodes else "skipped rows")
        return replace(batch, labels=original.labels[:rows], kept=original.kept if decodes else batch.kept)

    def _report_decoded(self, name: str, receipt: Receipt, what: str) -> None:
        """What is decoded otherwise than in the run is damage only where the same libraries decode."""
        here = {package: importlib.metadata.version(package) for package in ("pillow", "torchvision")}
        changes = version_changes({name: then for name, then in receipt.versions.items() if name in here}, here)
        if not changes:
            raise DamageError(f"{name} has {what} that are not the source's.")
        self.findings.problems.append(
            f"{name} has {what} that are not the source's as it is decoded here ({', '.join(changes)}); nothing is "
            "dropped for it."
        )

    def _unpack(
        self, files: Mapping[str, str], stored: Mapping[str, pa.Table]
    ) -> tuple[list[Tensor], list[Tensor], list[pa.Table]]:
        """The images of every variant, V times (M, C, H, W) uint8, the sign of each attack, and what is recorded."""
        layout, variants = self.layout, self.variants
        try:
            pictures = {
                picture: self._pictures(stored[picture.subset], picture.column, files[picture.subset])
                for picture in layout.pictures(variants)
            }
            images, signs = [pictures[layout.pictures(variants)[0]]], []
            tables = [layout.rows(stored, variant, variants) for variant in variants]
            for indices in self.attacks:
                levels = [self.levels[index] for index in indices]
                sources = [[pictures[one] for one in layout.source(variants[index], variants)] for index in indices]
                # An image that is not stored follows from two pictures, the same ones for all levels of an attack.
                ray = next(([each.numpy() for each in source] for source in sources if source[1:]), None)
                if ray is None:
                    own = [source[0] for source in sources]
                    sign = common_sign([images[0], *own], [0, *levels])
                else:
                    sign = torch.from_numpy(stored_sign(*ray, is_map=layout.stores_sign))
                    pairs = zip(sources, levels, strict=True)
                    own = [step(images[0], sign, level) if source[1:] else source[0] for source, level in pairs]
                images += own
                signs.append(sign)
        except ValueError as error:
            raise DamageError(f"{files[self.stored[0]]}: {error}.") from None
        return images, signs, tables

    def _pictures(self, table: pa.Table, column: str, name: str) -> Tensor:
        if not len(table):
            return torch.zeros((0, *self.shape), dtype=torch.uint8)
        stored = table.column(column).combine_chunks()
        cells = zip(*(stored.field(field).to_pylist() for field in self.layout.fields(column)), strict=True)
        try:
            pixels = decode_cells(list(cells), self.shape, self._decode)
        except OtherShapeError:
            raise DamageError(f"{name} holds an image of another size.") from None
        except UndecodableError as error:
            raise DamageError(f"{name} holds a broken image: {error}") from None
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _decode(self, data: Sequence[bytes]) -> NDArray[np.uint8]:
        pixels = torch.stack(list(self.decoders.map(partial(decode_image, shape=self.shape), data)))
        return pixels.permute(0, 2, 3, 1).numpy()


def _same(these: pa.ChunkedArray, those: pa.ChunkedArray) -> bool:
    """Whether two columns are equal. NaN, which a source may hold, is what Arrow never calls equal."""
    if these.equals(those) or not pa.types.is_floating(these.type):
        return bool(these.equals(those))
    nulls = these.is_null().equals(those.is_null())
    return bool(nulls and np.array_equal(these.to_numpy(), those.to_numpy(), equal_nan=True))
