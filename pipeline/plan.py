"""The plan: which source rows go into which shard, fixed before the first image is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` (exclusive) of a split's order; the unit of work, commit and resume."""

    split: str
    index: int
    count: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The stem of its files, as the Hub names them."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Each split's rows in the order they are written, and the shards cut from it."""

    orders: Mapping[str, NDArray[np.int64]]
    shards: tuple[Shard, ...]
    batch_size: int

    def rows(self, shard: Shard) -> NDArray[np.int64]:
        """The source rows of a shard, (len(shard),)."""
        return self.orders[shard.split][shard.start : shard.stop]

    def batches(self, shard: Shard) -> Iterator[slice]:
        """Where each batch of a shard lies within it. Batches do not cross shards; the last may be short."""
        for start in range(0, len(shard), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(shard)))

    def __len__(self) -> int:
        return sum(map(len, self.shards))


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
        shuffle: cut from a seeded permutation rather than in the source's order.
        seed: of the permutation.
        limit: keep the first so many of each split's order.
        images_per_shard: rows of a full shard.
        batch_size: rows of a batch at most.
    """
    orders = {
        name: (np.random.RandomState(seed).permutation(rows) if shuffle else np.arange(rows))[:limit].astype(np.int64)
        for name, rows in split_rows.items()
    }
    shards = []
    for name, order in orders.items():
        count = -(-len(order) // images_per_shard)
        for index in range(count):
            start = index * images_per_shard
            shards.append(Shard(name, index, count, start, min(start + images_per_shard, len(order))))
    return Plan(orders, tuple(shards), min(batch_size, max(map(len, shards))))
