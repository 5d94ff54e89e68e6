"""The plan: which source rows go into which shard, fixed before the first image is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError

# Far more than any place takes as files. A manifest of others may ask for any number, and each is an object in memory.
MOST_SHARDS = 1_000_000


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` (exclusive) of a split's order; the unit of work, commit and resume.

    In a source that is streamed they are rows of one `file`, to its end where `stop` is None: how many those are is
    then not known before they have been read.
    """

    split: str
    index: int
    count: int
    start: int
    stop: int | None
    file: str | None = None

    @property
    def name(self) -> str:
        """The stem of its files, as the Hub names them."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"

    @property
    def rows(self) -> int | None:
        """How many rows it has, None where that is not known."""
        return None if self.stop is None else self.stop - self.start

    def __len__(self) -> int:
        if self.stop is None:
            raise ValueError(f"how many rows {self.name} has is not known yet")
        return self.stop - self.start

    def with_rows(self, rows: int) -> "Shard":
        """The same shard, where it has turned out how many rows it has."""
        return replace(self, stop=self.start + rows)


@dataclass(frozen=True)
class Plan:
    """The shards, and each split's rows in the order they are written; a source that is streamed has its own order.

    An order is made when it is first asked for: the names of shards, all that a summary needs, do not wait for the
    permutation of a billion rows.
    """

    orders: Mapping[str, NDArray[np.int64]]
    shards: tuple[Shard, ...]
    batch_size: int

    def rows(self, shard: Shard, place: slice | None = None) -> NDArray[np.int64]:
        """The source rows of a shard, (len(shard),), or of one of its batches."""
        place = slice(0, len(shard)) if place is None else place
        if shard.file is not None:
            return np.arange(shard.start + place.start, shard.start + place.stop, dtype=np.int64)
        return self.orders[shard.split][shard.start : shard.stop][place]

    def batches(self, shard: Shard) -> Iterator[slice]:
        """Where each batch of a shard lies within it. Batches do not cross shards; the last may be short."""
        for start in range(0, len(shard), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(shard)))

    # Asked for with every batch that has a skipped row: shards are counted once.
    @cached_property
    def total(self) -> int | None:
        """Rows of all shards, None where that is not known."""
        return None if any(shard.stop is None for shard in self.shards) else len(self)

    def __len__(self) -> int:
        return sum(map(len, self.shards))


class _Orders(dict[str, NDArray[np.int64]]):
    """The order of each split's rows, made on first use."""

    def __init__(self, split_rows: Mapping[str, int], shuffle: bool, seed: int, limit: int | None) -> None:
        self._split_rows, self._shuffle, self._seed, self._limit = split_rows, shuffle, seed, limit

    def __missing__(self, split: str) -> NDArray[np.int64]:
        rows = self._split_rows[split]
        order = np.random.RandomState(self._seed).permutation(rows) if self._shuffle else np.arange(rows)
        self[split] = order[: self._limit].astype(np.int64, copy=False)
        return self[split]


def make_plan(
    split_rows: Mapping[str, int],
    *,
    shuffle: bool,
    seed: int,
    limit: int | None,
    images_per_shard: int,
    batch_size: int,
) -> Plan:
    """Cut every split into shards of consecutive rows of its (shuffled) order.

    The permutation comes from NumPy's legacy generator, whose stream is frozen for good: the same seed
    gives the same shards under every version. The batch is no larger than the largest shard, so that a
    short run computes no padding.

    Args:
        split_rows: rows of each split.
        shuffle: cut from a permutation, which follows from `seed`, rather than in the source's order.
        limit: keep the first so many of each split's order.
        images_per_shard: rows of a full shard.
        batch_size: rows of a batch at most.

    Raises:
        ConfigError: there would be more than MOST_SHARDS shards.
    """
    shards: list[Shard] = []
    for name, rows in split_rows.items():
        kept = rows if limit is None else min(rows, limit)
        count = -(-kept // images_per_shard)
        if len(shards) + count > MOST_SHARDS:
            raise ConfigError(
                f"output.images_per_shard: {images_per_shard} cuts {kept:,} rows of {name} into more than "
                f"{MOST_SHARDS:,} shards; make it larger."
            )
        for index in range(count):
            start = index * images_per_shard
            shards.append(Shard(name, index, count, start, min(start + images_per_shard, kept)))
    orders = _Orders(split_rows, shuffle, seed, limit)
    return Plan(orders, tuple(shards), min(batch_size, max(map(len, shards))))


def stream_plan(files: Mapping[str, Sequence[tuple[str, Sequence[int] | None]]], *, batch_size: int) -> Plan:
    """The plan of a source that is streamed: its files are the shards, in their order.

    Args:
        files: of each split, by name, with the rows at which shards end in it; None for one shard of unknown length.
        batch_size: rows of a batch at most.
    """
    shards = []
    for split, listed in files.items():
        cuts = [(name, start, stop) for name, ends in listed for start, stop in _stretches(ends)]
        shards += [Shard(split, i, len(cuts), start, stop, name) for i, (name, start, stop) in enumerate(cuts)]
    longest = max(batch_size if shard.rows is None else shard.rows for shard in shards)
    return Plan({}, tuple(shards), min(batch_size, longest))


def _stretches(ends: Sequence[int] | None) -> list[tuple[int, int | None]]:
    return [(0, None)] if ends is None else list(zip([0, *ends], ends, strict=False))
