"""A bounded sample of a dataset: what the victim says of some rows in every variant, and the pictures of a few.

Nothing here grows with the dataset: scores are read by column from the first rows of a few shards, pictures from
the row groups that hold them. Shards are cut from a permutation, so the first rows of each are a fair sample of
its split; where `source.shuffle` is off they are spread over the source's order.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.errors import explained
from pipeline.core.variants import CLEAN, Variant
from pipeline.layouts.base import LABEL, LAST, picture_columns
from pipeline.output.folder import OutputFolder, split_of
from pipeline.output.manifest import Manifest

# Shards that a sample is taken from at most: each costs the footers of its files.
SAMPLE_SHARDS = 16


# What an attack is after: to fool, to reach a target, or, where there are neither labels nor targets, any change.
Aim = Literal["fooled", "target", "changed"]


@dataclass(frozen=True)
class Sample:
    """What the victim says of M rows of a split in every variant, clean first.

    `rows` is how many of the split could be in it: those with a label, if the dataset is `labelled`, as it is if any
    of its rows has one.

    prediction (1 + K, M), in recorded indices; confidence (1 + K, M) in [0, 1]; right (1 + K, M): predicted as
    labelled, or, without labels, as when clean; success (1 + K, M): the aim is reached, and not by the clean answer;
    target (M,) in recorded indices, None in other runs; shard (M,) into `shards`, and place (M,) within it.
    """

    split: str
    rows: int
    aim: Aim
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


def read_sample(folder: OutputFolder, manifest: Manifest, split: str, most: int) -> Sample:
    """Read the scores of at most so many rows of a split.

    Args:
        folder: of the dataset.
        manifest: with the files that are there.
        split: one of the manifest's.
        most: rows to read; those without a label are left out, if any row of the dataset has one.

    Raises:
        PipelineError: a file cannot be read, or holds other rows than the manifest says.
    """
    labelled, targeted = is_labelled(manifest), manifest.resolved.attack.target is not None
    recorded, shares = manifest.variants, _shares(_shard_rows(manifest, split), most)
    tables, shard, place = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for index, (name, rows) in enumerate(shares.items()):
        scores = _read_scores(folder, manifest, name, rows)
        known = np.flatnonzero(scores[0].column(LABEL).is_valid()) if labelled else np.arange(rows)
        tables.append([table.take(known) for table in scores])
        shard.append(np.full(len(known), index))
        place.append(known)

    def stacked(name: str, kind: Any) -> NDArray[Any]:
        """One column, (1 + K, M); null, as `fooled` and `target` are on clean rows, becomes 0."""
        columns = [
            [np.empty(0), *(table[index].column(name).cast(kind).fill_null(0).to_numpy() for table in tables)]
            for index in range(len(recorded))
        ]
        return np.stack([np.concatenate(column) for column in columns]).astype(kind.to_pandas_dtype())

    prediction = stacked("prediction", pa.int64())
    same = prediction == prediction[:1]
    clean = next(subset for subset in manifest.subsets if subset.split == split and subset.variant == CLEAN)
    return Sample(
        split=split,
        rows=clean.labelled if labelled else clean.rows,
        aim="target" if targeted else "fooled" if labelled else "changed",
        labelled=labelled,
        variants=recorded,
        prediction=prediction,
        confidence=stacked("confidence", pa.float32()),
        right=stacked("correct", pa.int8()).astype(bool) if labelled else same,
        success=~same & stacked("fooled", pa.int8()).astype(bool) if labelled or targeted else ~same,
        target=stacked("target", pa.int64())[-1] if targeted else None,
        shards=tuple(shares),
        shard=np.concatenate(shard),
        place=np.concatenate(place),
    )


def read_pictures(
    folder: OutputFolder, manifest: Manifest, sample: Sample, rows: Sequence[int]
) -> dict[int, tuple[bytes, bytes]]:
    """The encoded clean image of some rows of a sample, and the picture that says in which direction it was attacked.

    Raises:
        PipelineError: as `read_sample`.
    """
    variants = manifest.variants
    ray = manifest.layout.ray(variants[-1], variants)
    pictures: dict[int, tuple[bytes, bytes]] = {}
    for shard in sorted({int(sample.shard[row]) for row in rows}):
        own = [row for row in rows if sample.shard[row] == shard]
        places = [int(sample.place[row]) for row in own]
        cells = [
            _read_cells(folder, f"{subset}/{sample.shards[shard]}.parquet", column, places) for subset, column in ray
        ]
        beside = zip(*cells, strict=True)
        pictures.update(zip(own, beside, strict=True))
    return pictures


def _shard_rows(manifest: Manifest, split: str) -> dict[str, int]:
    """The rows of each shard of a split that is there, by its name."""
    first = f"{manifest.stored[0]}/"
    names = {Path(entry.path).stem: entry.rows for entry in manifest.files if entry.path.startswith(first)}
    return {name: rows for name, rows in names.items() if split_of(name) == split}


def _shares(rows: Mapping[str, int], most: int) -> dict[str, int]:
    """How many rows of each shard are read, so that they add up to `most` or to all there are."""
    names = list(rows)
    if len(names) > SAMPLE_SHARDS:
        names = [names[index * len(names) // SAMPLE_SHARDS] for index in range(SAMPLE_SHARDS)]
    shares, left = {}, most
    # The short ones first: what they lack the others give.
    for done, name in enumerate(sorted(names, key=lambda name: rows[name])):
        shares[name] = min(rows[name], left // (len(names) - done))
        left -= shares[name]
    return {name: shares[name] for name in names if shares[name]}


def _read_scores(folder: OutputFolder, manifest: Manifest, shard: str, rows: int) -> list[pa.Table]:
    """For each variant, what the columns of layout images but the pictures say of a shard's first rows."""
    layout, variants = manifest.layout, manifest.variants
    pictures = picture_columns(layout, variants)
    files = {subset: f"{subset}/{shard}.parquet" for subset in manifest.stored}
    stored = {subset: _first_rows(folder, file, rows, pictures) for subset, file in files.items()}
    with _readable(folder, next(iter(files.values()))):
        tables = [layout.rows(stored, variant, variants) for variant in variants]
        if any(table.num_rows != rows or table.column(LAST) != tables[0].column(LAST) for table in tables):
            raise ValueError("its rows are not those of the other epsilons")
    return tables


def _first_rows(folder: OutputFolder, name: str, rows: int, pictures: Sequence[str]) -> pa.Table:
    """The first rows of a file without its pictures and kept columns; of the row groups that hold them, no more."""
    with _opened(folder, name) as file:
        names = file.schema_arrow.names
        ours = [name for name in names[: names.index(LAST) + 1] if name not in pictures]
        starts = _group_starts(file)
        return file.read_row_groups(np.flatnonzero(starts[:-1] < rows).tolist(), ours).slice(0, rows)


def _read_cells(folder: OutputFolder, name: str, column: str, places: Sequence[int]) -> list[bytes]:
    """The encoded pictures in some rows of a file, one row group in memory at a time."""
    cells = {}
    with _opened(folder, name) as file:
        starts = _group_starts(file)
        groups = np.searchsorted(starts, places, side="right") - 1
        for group in np.unique(groups):
            pictures = file.read_row_group(int(group), [f"{column}.bytes"]).column(column)
            for place in np.array(places)[groups == group]:
                cells[int(place)] = pictures[int(place - starts[group])].as_py()["bytes"]
    return [cells[place] for place in places]


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
