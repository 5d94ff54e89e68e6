"""A source as everything else sees it: its splits, and its rows as tables of image, label and kept columns.

A kind of source is a class below `Source` in a module of its own and a line in `config/kinds.py`. Nobody asks which
kind it has. Most have an `IndexedSource`'s shape: any row can be read by its number, and all labels are known before
the run.
"""

import hashlib
import itertools
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import MOST_PIXELS, SourceConfig
from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.left_out import LeftOut
from pipeline.core.origin import UNKNOWN, Origin
from pipeline.core.plan import Plan, Shard

# Evenly spaced images whose bytes enter a source's digest; sizes and labels of all rows enter it too.
DIGEST_SAMPLES = 64
# Rows of a sample that are read at once, with the bytes of their images.
SAMPLE_ROWS = 16

logger = logging.getLogger(__name__)

Labels = NDArray[np.int64]
# What of a split an indexed source reads its rows from.
Rows = TypeVar("Rows")
Item = TypeVar("Item")
Indexed = TypeVar("Indexed", bound="IndexedSource[Any]")
# Some rows of a shard, and what of the source was left out where they are.
Read = tuple[Shard, pa.Table, tuple[LeftOut, ...]]


@dataclass(frozen=True)
class SampleRow:
    """A row that is looked at before a run: its shard, its number in the split or file, its image cell and label."""

    shard: Shard
    number: int
    cell: Any
    label: int


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """An opened dataset.

    classes: None where the dataset does not name them; then its labels are the model's own indices. digest: changes
    when the content does, and not when the dataset moves. kept: carried-through columns and their `datasets` features.
    origin: for the card. left_out: what of it is no row, as far as that is known before rows are read. labels: of each
    split whose rows are known before they are read, (N,) int64, -1 for unlabelled. need_labels: whether a row without
    a label is an error. max_pixels: of an image, where one is read before it is known to be one.
    """

    classes: tuple[str, ...] | None
    digest: str
    kept: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = UNKNOWN
    left_out: tuple[LeftOut, ...] = ()
    labels: Mapping[str, Labels] = field(default_factory=dict)
    need_labels: bool = False
    max_pixels: int = MOST_PIXELS

    @property
    @abstractmethod
    def splits(self) -> Mapping[str, int | None]:
        """The rows of each split, None where they are counted only when they are read."""

    def files(self, most: int) -> Mapping[str, Sequence[tuple[str, Sequence[int] | None]]]:
        """Of each split the files that are its shards, where rows are read in the order of the files.

        Args:
            most: rows of a shard.

        Returns:
            Names of files, each with the rows at which its shards end, None for one shard of unknown length. Nothing
            where shards are cut from a permutation of the rows.
        """
        return {}

    @abstractmethod
    def tables(self, plan: Plan, shards: Sequence[Shard]) -> Generator[Read, None, None]:
        """The rows of some shards, in order, in tables that cross no shard: at least one of each.

        The first two columns are the image cell, for `open`, and the label, int64 with -1 for unlabelled; those of
        `kept` follow. A bounded number of bytes is held at a time, and nothing between the shards is read.

        Raises:
            PipelineError: they cannot be read, have changed since the run was planned, or hold a label that is none.
        """

    @abstractmethod
    def sample(self, plan: Plan, shards: Sequence[Shard], count: int) -> Iterator[SampleRow]:
        """Up to `count` rows of some shards, one by one for who stops early: from all over them where that costs no
        more, else from their head. Errors are those of `tables`."""

    @abstractmethod
    def open(self, cell: Any) -> Image.Image:
        """Open the image of a cell; called in any thread.

        Raises:
            UndecodableError: there is none that may be opened.
            Exception: whatever the library raises that reads it.
        """

    def name_of(self, cell: Any) -> str | None:
        """The name of the file that a cell's image has to itself, for people, in valid UTF-8; None for none."""
        return None


@dataclass(frozen=True, kw_only=True)
class IndexedSource(Source, Generic[Rows]):
    """A source of which any row can be read by its number. `rows` is what each split's rows are read from."""

    rows: Mapping[str, Rows]

    @property
    def splits(self) -> Mapping[str, int]:
        return {name: len(labels) for name, labels in self.labels.items()}

    def table(self, split: str, rows: Sequence[int]) -> pa.Table:
        """Some rows of a split, as `tables` has them; cells are {split, row} unless a kind has its own."""
        cells = pa.array([{"split": split, "row": row} for row in rows])
        return joined(cells, self.labels[split][rows], pa.table({}))

    def tables(self, plan: Plan, shards: Sequence[Shard]) -> Generator[Read, None, None]:
        for shard in shards:
            for place in plan.batches(shard):
                yield shard, self.table(shard.split, plan.rows(shard, place).tolist()), ()

    def sample(self, plan: Plan, shards: Sequence[Shard], count: int) -> Iterator[SampleRow]:
        for split, places in itertools.groupby(_spread_over(shards, count), lambda place: place[0].split):
            size = 1
            while own := list(itertools.islice(places, size)):
                numbers = [int(plan.rows(shard, slice(start, start + 1))[0]) for shard, start in own]
                cells, labels = (column.to_pylist() for column in self.table(split, numbers).columns[:2])
                for (shard, _), number, cell, label in zip(own, numbers, cells, labels, strict=True):
                    yield SampleRow(shard, number, cell, label)
                # One row for who needs no more, then ever more: a table of one costs as much as one of several.
                size = min(2 * size, SAMPLE_ROWS)


def _spread_over(shards: Sequence[Shard], count: int) -> Iterator[tuple[Shard, int]]:
    """Up to `count` rows, evenly spaced over some shards: the shard of each, and where in it the row lies."""
    ends = np.cumsum([0, *map(len, shards)])
    for position in spread(int(ends[-1]), count):
        number = int(np.searchsorted(ends, position, side="right")) - 1
        yield shards[number], position - int(ends[number])


def joined(cells: Any, labels: Any, kept: pa.Table) -> pa.Table:
    """A table of rows; the first two columns have no names, as those of kept columns are free."""
    return pa.Table.from_arrays(
        [cells, pa.array(labels, pa.int64()), *kept.columns], names=["", "", *kept.column_names]
    )


def checked(source: Indexed) -> Indexed:
    """The source with its splits as files and the Hub call them.

    Raises:
        ConfigError: a split is empty, a label is none or missing, or two splits would have the same name.
    """
    source = replace(source, labels=file_names(source.labels), rows=file_names(source.rows))
    for name, labels in source.labels.items():
        if len(labels) == 0:
            raise ConfigError(f"source: split {name} is empty.")
        check_labels(labels, f"split {name}", ConfigError)
        if source.need_labels and (labels == UNLABELLED).any():
            raise ConfigError(
                f"source: split {name} has {int((labels == UNLABELLED).sum())} unlabelled rows, and "
                "attack.label: dataset needs every label; drop those rows, or set attack.label=prediction."
            )
    return source


def check_labels(labels: Labels, where: str, kind: type[PipelineError]) -> None:
    if len(labels) and labels.min() < UNLABELLED:
        raise kind(f"source: {where} has a label {labels.min()}; labels are 0 or more, and -1 or null for unlabelled.")


def file_names(splits: Mapping[str, Item]) -> dict[str, Item]:
    """What belongs to each split, by the split's name in file names and on the Hub; a ConfigError if two splits would
    have the same name, or one a name that no file may have."""
    renamed = {re.sub(r"[^\w.]", "_", name): content for name, content in splits.items()}
    for name in renamed:
        if not re.match(r"\w", name):
            raise ConfigError(f"source.split: {name!r} cannot be the name of files; save the dataset under another.")
    if len(renamed) < len(splits):
        raise ConfigError(
            f"source.split: two of {', '.join(splits)} would have the same name as files, where - becomes _."
        )
    return renamed


def digest_of(parts: Iterable[bytes | str]) -> str:
    """A sha256 over all parts, in order, that tells where each ends."""
    total = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part  # names of files may be no UTF-8
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def class_names(config: SourceConfig, own: Sequence[str] | None) -> tuple[str, ...] | None:
    """The dataset's class names: its own, or `source.classes` where it has none; a ConfigError where they differ."""
    if own is None:
        return config.class_names
    if config.class_names is not None and tuple(config.class_names) != tuple(own):
        raise ConfigError("source.classes: the source names its classes itself; remove the key.")
    return tuple(own)


def chosen_splits(config: SourceConfig, own: Sequence[str]) -> Sequence[str]:
    """The splits that the config names, or the only one; a ConfigError where one is not there, or none is named of
    several."""
    if config.split is None and len(own) > 1:
        raise ConfigError(f"source.split: name one or more of the source's splits: {', '.join(own)}.")
    check_splits(config.split or own, own)
    return config.split or own


def tell_unsplit(name: str) -> None:
    """Say what the images of a source without splits are called, where `source.split` does not."""
    logger.info("%s has no splits: its images are called train. For another name set source.split, such as test.", name)


def check_splits(asked: Sequence[str], own: Sequence[str]) -> None:
    for name in asked:
        if name not in own:
            raise ConfigError(f"source.split: there is no split {name}; the source has {', '.join(own)}.")


def spread(count: int, samples: int) -> list[int]:
    """Up to `samples` row numbers, evenly spaced over `count` rows."""
    return np.unique(np.linspace(0, count - 1, min(samples, count)).astype(np.int64)).tolist() if count else []
