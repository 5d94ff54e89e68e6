"""A bounded sample of a dataset: what one model says of rows that one attack made of it, and the pictures of a few.

Nothing here grows with the dataset: scores are read by column from the first rows of a few shards, pictures from
the row groups that hold them. Shards are cut from a permutation, so the first rows of each are a fair sample of
its split; where `source.shuffle` is off they are spread over the source's order.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.errors import explained
from pipeline.core.variants import CLEAN, Variant, by_attack, own_model
from pipeline.layouts.base import LABEL, LAST, Picture, kept_columns, model_columns, picture_columns
from pipeline.output.folder import OutputFolder, split_of
from pipeline.output.manifest import Manifest

# Shards that a sample is taken from at most: each costs the footers of its files.
SAMPLE_SHARDS = 16


@dataclass(frozen=True)
class Sample:
    """What a model says of M rows of a split: clean, and as one attack on it made them at each of K epsilons.

    `rows` is how many of the split could be in it: those with a label, if the dataset is `labelled`, as it is if any
    of its rows has one.

    prediction (1 + K, M), in recorded indices; confidence (1 + K, M) in [0, 1], NaN where it is not stored; right
    (1 + K, M): predicted as labelled, or, without labels, as when clean; success (1 + K, M): fooled, on target or,
    where there are neither labels nor targets, changed, and not so when clean; target (M,) in recorded indices, None in
    other runs; shard (M,) into `shards`, and place (M,) within it.
    """

    split: str
    rows: int
    labelled: bool
    variants: tuple[Variant, ...]
    prediction: NDArray[np.int64]
    confidence: NDArray[np.float32]
    right: NDArray[np.bool_]
    success: NDArray[np.bool_]
    target: NDArray[np.int64] | None
    shards: tuple[str, ...]
    shard: NDArray[np.int64]
    place: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.place)

    @property
    def onset(self) -> NDArray[np.int64]:
        """(M,) the index of the first variant that succeeds, the number of variants where none does."""
        return np.where(self.success.any(0), self.success.argmax(0), len(self.variants))

    @property
    def aim(self) -> str:
        """What an image is where the attack succeeds."""
        return "on target" if self.target is not None else "fooled" if self.labelled else "changed"

    @property
    def words(self) -> tuple[str, str, str]:
        """What `right` answers are called, what the others are, and what the share of the former is."""
        return ("right", "wrong", "accuracy") if self.labelled else ("unchanged", "changed", "unchanged share")

    def at(self, variants: Sequence[Variant]) -> "Sample":
        """The same rows in some of the variants."""
        kept = [self.variants.index(variant) for variant in variants]
        return replace(
            self,
            variants=tuple(variants),
            prediction=self.prediction[kept],
            confidence=self.confidence[kept],
            right=self.right[kept],
            success=self.success[kept],
        )


def is_labelled(manifest: Manifest) -> bool:
    """Whether any row of a dataset has a label: then `right` and `fooled` are about labels."""
    return any(subset.labelled for subset in manifest.subsets)


def shown_variants(manifest: Manifest) -> tuple[Variant, ...]:
    """Clean, and one attack on one model at every epsilon: the first attack on the first model.

    Where no attack names the first model it is the first on any, and where none asks a model the first there is.
    """
    groups = [[manifest.variants[index] for index in group] for group in by_attack(manifest.variants)]
    first = next(iter(manifest.spaces))
    return CLEAN, *min(groups, key=lambda group: (group[0].model is None, group[0].model != first))


def read_sample(folder: OutputFolder, manifest: Manifest, split: str, most: int) -> Sample | None:
    """Read the scores of about `most` rows of a split in the `shown_variants`; None where it has none.

    The manifest lists the files that are there. Rows without a label are left out, if any row of the dataset has one.

    Raises:
        PipelineError: a file cannot be read, or holds other rows than the manifest says.
    """
    labelled, variants = is_labelled(manifest), shown_variants(manifest)
    attack, model = variants[1].attack or "", own_model(variants[1], list(manifest.spaces))
    targeted = manifest.resolved.all_attacks[attack].target is not None
    shares = _shares(_shard_rows(manifest, split), most)
    if not shares:
        return None
    scores = [_read_scores(folder, manifest, variants, name, rows) for name, rows in shares.items()]
    tables = [pa.concat_tables(parts) for parts in zip(*scores, strict=True)]
    known = np.full(tables[0].num_rows, True)
    if labelled:
        known = np.asarray(tables[0].column(LABEL).is_valid())

    def stacked(name: str, null: float) -> NDArray[Any]:
        """One column, (1 + K, M), with a stand-in for null, as `fooled` and `target` are on clean rows."""
        return np.stack([table.column(name).fill_null(null).to_numpy()[known] for table in tables])

    # Among several, each model has columns of its own: those without its name are the first model's on clean rows.
    answer, correct = model_columns(model) if len(manifest.spaces) > 1 else ("prediction", "correct")
    prediction, confidence = stacked(answer, 0), stacked("confidence", 0.0)
    if model != next(iter(manifest.spaces)):
        confidence[0] = np.nan
    same = prediction == prediction[:1]
    clean = next(subset for subset in manifest.subsets if subset.split == split and subset.variant == CLEAN)
    return Sample(
        split=split,
        rows=clean.labelled if labelled else clean.rows,
        labelled=labelled,
        variants=variants,
        prediction=prediction,
        confidence=confidence,
        right=stacked(correct, False).astype(bool) if labelled else same,
        success=~same & stacked("fooled", False).astype(bool) if labelled or targeted else ~same,
        target=stacked("target", 0)[-1] if targeted else None,
        shards=tuple(shares),
        shard=np.repeat(np.arange(len(shares)), list(shares.values()))[known],
        place=np.concatenate([np.arange(rows) for rows in shares.values()])[known],
    )


def _shard_rows(manifest: Manifest, split: str) -> dict[str, int]:
    """The rows of each shard of a split that is there, by its name."""
    first = f"{manifest.stored[0]}/"
    names = {Path(entry.path).stem: entry.rows for entry in manifest.files if entry.path.startswith(first)}
    return {name: rows for name, rows in names.items() if split_of(name) == split}


def _shares(rows: Mapping[str, int], most: int) -> dict[str, int]:
    """How many rows of each shard are read: as many of each, from shards that are spread over all of them."""
    names = list(rows)
    if len(names) > SAMPLE_SHARDS:
        names = [names[index * len(names) // SAMPLE_SHARDS] for index in range(SAMPLE_SHARDS)]
    return {name: min(rows[name], -(-most // len(names))) for name in names if rows[name]}


def _read_scores(
    folder: OutputFolder, manifest: Manifest, shown: Sequence[Variant], shard: str, rows: int
) -> list[pa.Table]:
    """For each variant shown, what the columns of layout images but the pictures say of a shard's first rows."""
    layout, variants = manifest.layout, manifest.variants
    pictures = picture_columns(layout, variants)
    files = {subset: f"{subset}/{shard}.parquet" for subset in dict.fromkeys(map(layout.subset, shown))}
    stored = {subset: _first_rows(folder, file, rows, pictures) for subset, file in files.items()}
    with _readable(folder, next(iter(files.values()))):
        tables = [layout.rows(stored, variant, variants) for variant in shown]
        if any(table.num_rows != rows or table.column(LAST) != tables[0].column(LAST) for table in tables):
            raise ValueError("its rows are not those of the other epsilons")
    return tables


def _first_rows(folder: OutputFolder, name: str, rows: int, pictures: Sequence[str]) -> pa.Table:
    """The first rows of a file without its pictures and kept columns; of the row groups that hold them, no more."""
    with _opened(folder, name) as file:
        names = file.schema_arrow.names
        left_out = {*pictures, *kept_columns(names)}
        starts = _group_starts(file)
        ours = [name for name in names if name not in left_out]
        return file.read_row_groups(np.flatnonzero(starts[:-1] < rows).tolist(), ours).slice(0, rows)


def read_picture(folder: OutputFolder, shard: str, picture: Picture, fields: Sequence[str], row: int) -> list[bytes]:
    """What some fields of a shard's row hold of a stored picture; its row group is read, and nothing else.

    Raises:
        PipelineError: the file cannot be read.
    """
    with _opened(folder, f"{picture.subset}/{shard}.parquet") as file:
        starts = _group_starts(file)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        cells = file.read_row_group(group, [f"{picture.column}.{field}" for field in fields]).column(picture.column)
        cell = cells[row - int(starts[group])].as_py()
        return [cell[field] for field in fields]


def _group_starts(file: pq.ParquetFile) -> NDArray[np.int64]:
    """Where each row group of a file begins, and where the last one ends."""
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    return np.cumsum([0, *sizes])


@contextlib.contextmanager
def _opened(folder: OutputFolder, name: str) -> Iterator[pq.ParquetFile]:
    # Row groups of a few columns are many small pieces, which an object store gives in a few larger ones.
    with _readable(folder, name), folder.store.open(name) as stream, pq.ParquetFile(stream, pre_buffer=True) as file:
        yield file


def _readable(folder: OutputFolder, name: str) -> contextlib.AbstractContextManager[None]:
    """What goes wrong in a file, as one sentence."""
    return explained(
        f"{folder.store.at(name)} cannot be read",
        "fgsm verify says what is damaged",
        errors=(OSError, ValueError, KeyError, IndexError, pa.ArrowException),
    )
