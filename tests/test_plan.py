"""The plan: every row once, in shards and batches that depend on the config alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import Plan, Shard, make_plan


def plan(split_rows: Mapping[str, int], **options: Any) -> Plan:
    defaults: dict[str, Any] = {"shuffle": True, "seed": 0, "limit": None, "images_per_shard": 16, "batch_size": 6}
    return make_plan(split_rows, **{**defaults, **options})


SPLITS = st.dictionaries(st.sampled_from(["train", "test", "validation"]), st.integers(1, 300), min_size=1)


@given(
    split_rows=SPLITS,
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    limit=st.none() | st.integers(1, 400),
    images_per_shard=st.integers(1, 70),
    batch_size=st.integers(1, 100),
)
def test_shards_and_batches_cover_every_row_once(
    split_rows: dict[str, int],
    shuffle: bool,
    seed: int,
    limit: int | None,
    images_per_shard: int,
    batch_size: int,
) -> None:
    cut = make_plan(
        split_rows,
        shuffle=shuffle,
        seed=seed,
        limit=limit,
        images_per_shard=images_per_shard,
        batch_size=batch_size,
    )
    kept = {name: min(rows, limit or rows) for name, rows in split_rows.items()}
    assert len(cut) == sum(kept.values())
    assert cut.batch_size == min(batch_size, max(map(len, cut.shards)))
    for name, count in kept.items():
        shards = [shard for shard in cut.shards if shard.split == name]
        assert [shard.index for shard in shards] == list(range(len(shards)))
        assert {shard.count for shard in shards} == {len(shards)}
        assert all(len(shard) == images_per_shard for shard in shards[:-1])
        assert 1 <= len(shards[-1]) <= images_per_shard
        rows = np.concatenate([cut.rows(shard) for shard in shards])
        assert rows.dtype == np.int64
        assert rows.tolist() == cut.orders[name].tolist()
        assert len(set(rows.tolist())) == count
        assert set(rows.tolist()) <= set(range(split_rows[name]))
        assert shuffle or rows.tolist() == list(range(count))
    for shard in cut.shards:
        batches = list(cut.batches(shard))
        batched = [row for batch in batches for row in cut.rows(shard)[batch].tolist()]
        assert batched == cut.rows(shard).tolist()
        assert all(batch.stop - batch.start == cut.batch_size for batch in batches[:-1])
        assert 1 <= batches[-1].stop - batches[-1].start <= cut.batch_size


@given(rows=st.integers(1, 300), limit=st.integers(1, 300), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_limit_keeps_a_prefix_of_the_order(rows: int, limit: int, shuffle: bool, seed: int) -> None:
    whole = plan({"test": rows}, shuffle=shuffle, seed=seed).orders["test"]
    limited = plan({"test": rows}, shuffle=shuffle, seed=seed, limit=limit).orders["test"]
    assert limited.tolist() == whole[:limit].tolist()


def test_shards_are_named_as_the_hub_names_them() -> None:
    assert [shard.name for shard in plan({"train": 5, "test": 33}).shards] == [
        "train-00000-of-00001",
        "test-00000-of-00003",
        "test-00001-of-00003",
        "test-00002-of-00003",
    ]
    assert len(Shard("test", 0, 1, 10, 15)) == 5


@pytest.mark.parametrize(
    ("rows", "images_per_shard", "wanted", "batch_size"),
    [(40, 16, 6, 6), (40, 16, 16, 16), (40, 16, 256, 16), (5, 16, 256, 5), (1, 16, 256, 1)],
)
def test_batch_is_no_larger_than_the_largest_shard(
    rows: int, images_per_shard: int, wanted: int, batch_size: int
) -> None:
    cut = plan({"train": 1, "test": rows}, images_per_shard=images_per_shard, batch_size=wanted)
    assert cut.batch_size == batch_size


def test_last_batch_of_a_shard_is_short() -> None:
    cut = plan({"test": 20}, images_per_shard=16, batch_size=6)
    assert [list(cut.batches(shard)) for shard in cut.shards] == [
        [slice(0, 6), slice(6, 12), slice(12, 16)],
        [slice(0, 4)],
    ]


def test_order_is_fixed_for_good() -> None:
    # A run that is resumed under another NumPy must find its rows where they were.
    assert plan({"test": 10}).orders["test"].tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    head = plan({"test": 50_000}, seed=7).orders["test"][:6]
    assert head.tolist() == [29430, 27750, 47782, 10498, 24747, 18647]


def test_seed_changes_the_order() -> None:
    orders = {tuple(plan({"test": 40}, seed=seed).orders["test"].tolist()) for seed in range(5)}
    assert len(orders) == 5
    unshuffled = {tuple(plan({"test": 40}, seed=seed, shuffle=False).orders["test"].tolist()) for seed in range(5)}
    assert unshuffled == {tuple(range(40))}


def test_splits_do_not_depend_on_each_other() -> None:
    alone = plan({"test": 40})
    beside = plan({"train": 7, "test": 40})
    assert beside.orders["test"].tolist() == alone.orders["test"].tolist()
