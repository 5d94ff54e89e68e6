"""The loader: batches that are complete, in order and of one shape, whatever the files and the workers do."""

import errno
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import PreprocessConfig
from pipeline.core.batches import Batch
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.left_out import Skipped
from pipeline.core.plan import Plan, Shard, make_plan
from pipeline.engine.loader import Reader, find_shape, load_batches
from pipeline.sources.base import IndexedSource, Source
from pipeline.sources.digits import ArraySource
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.imagefolder import FolderSource
from pipeline.sources.registry import open_source
from tests.conftest import CLASSES, png_bytes, random_pixels, write_parquet

AS_IT_IS = PreprocessConfig()
MAX_PIXELS = 10_000


def plan_of(source: Source, *, shuffle: bool = True, images_per_shard: int = 7, batch_size: int = 3) -> Plan:
    return make_plan(
        {split: rows or 0 for split, rows in source.splits.items()},
        shuffle=shuffle,
        seed=0,
        limit=None,
        images_per_shard=images_per_shard,
        batch_size=batch_size,
    )


def read(
    source: Source,
    plan: Plan,
    *,
    workers: int = 0,
    preprocess: PreprocessConfig = AS_IT_IS,
    shape: tuple[int, int, int] = (3, 16, 16),
) -> list[Batch]:
    reader = Reader(source, preprocess, MAX_PIXELS, shape)
    return list(load_batches(reader, plan, plan.shards, workers))


def labelled(labels: Sequence[int], name: str = "test") -> dict[str, Any]:
    """What a source has to have beside its rows."""
    return {"labels": {name: np.array(labels, dtype=np.int64)}, "classes": CLASSES, "digest": ""}


def arrays(pixels: NDArray[np.uint8], labels: Sequence[int] | None = None) -> ArraySource:
    return ArraySource(rows={"test": pixels}, **labelled(labels or [0] * len(pixels)))


def files(folder: Path, contents: Sequence[bytes], labels: Sequence[int] | None = None) -> FolderSource:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:03}.png" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    own = labelled(labels or [0] * len(paths))
    return FolderSource(rows={"test": [str(path) for path in paths]}, root=str(folder), **own)


def as_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """(N, H, W, C) to (N, C, H, W)."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.shard, one.place, one.skipped) == (other.shard, other.place, other.skipped)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.valid, other.valid)
    np.testing.assert_array_equal(one.source_index, other.source_index)
    assert one.kept.equals(other.kept)


BROKEN, EMPTY = 5, 8


@pytest.fixture
def damaged(tmp_path: Path) -> Source:
    """Twelve images, of which one is cut short and one has no bytes; row 3 is unlabelled."""
    contents = [png_bytes(pixels) for pixels in random_pixels(12)]
    contents[BROKEN] = contents[BROKEN][:150]
    contents[EMPTY] = b""
    labels = [row % 3 for row in range(12)]
    labels[3] = -1
    return files(tmp_path / "images", contents, labels)


# ------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_come_in_order_with_one_shape_and_never_cross_shards(shuffle: bool) -> None:
    pixels = random_pixels(12)
    source = arrays(pixels, [row % 3 for row in range(12)])
    plan = plan_of(source, shuffle=shuffle)
    batches = read(source, plan)

    assert [(batch.shard.index, batch.place.start, batch.place.stop) for batch in batches] == [
        (0, 0, 3),
        (0, 3, 6),
        (0, 6, 7),
        (1, 0, 3),
        (1, 3, 5),
    ]
    assert [batch.ends_shard for batch in batches] == [False, False, True, False, True]
    assert batches[-1].name == "shard test-00001-of-00002, rows 3 to 4"
    order = np.concatenate([batch.source_index for batch in batches])
    np.testing.assert_array_equal(order, plan.orders["test"])
    assert (order.tolist() == list(range(12))) is not shuffle
    for batch in batches:
        rows = batch.place.stop - batch.place.start
        assert batch.images.shape == (3, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.valid.tolist() == [slot < rows for slot in range(3)]
        assert torch.equal(batch.images[:rows], as_tensor(pixels)[batch.source_index])
        assert not batch.images[rows:].any(), "padding is zero"
        assert batch.labels.tolist() == [*(batch.source_index % 3).tolist(), *[-1] * (3 - rows)]
        assert batch.skipped == ()
        assert batch.kept.num_columns == 0


def test_only_the_shards_asked_for_are_read() -> None:
    source = arrays(random_pixels(12))
    plan, reader = plan_of(source), Reader(source, AS_IT_IS, MAX_PIXELS, (3, 16, 16))
    batches = list(load_batches(reader, plan, plan.shards[1:], 0))
    assert {batch.shard for batch in batches} == {plan.shards[1]}
    assert len(batches) == 2
    assert list(load_batches(reader, plan, [], 2)) == []


def test_each_split_is_read_from_its_own_rows() -> None:
    train, test = random_pixels(4, seed=1), random_pixels(3, seed=2)
    labels = {"train": np.zeros(4, dtype=np.int64), "test": np.ones(3, dtype=np.int64)}
    source = ArraySource(rows={"train": train, "test": test}, labels=labels, classes=CLASSES, digest="")
    for batch in read(source, plan_of(source)):
        pixels, label = (train, 0) if batch.shard.split == "train" else (test, 1)
        assert torch.equal(batch.images[batch.valid], as_tensor(pixels)[batch.source_index])
        assert set(batch.labels[batch.valid].tolist()) == {label}


def test_consecutive_batches_share_no_memory() -> None:
    """A consumer may hold several batches at once."""
    source = arrays(random_pixels(12))
    batches = read(source, plan_of(source))
    for one, other in pairwise(batches):
        assert one.images.data_ptr() != other.images.data_ptr()


def test_an_image_that_cannot_be_decoded_leaves_a_masked_hole(damaged: Source) -> None:
    plan = plan_of(damaged)
    batches = read(damaged, plan)
    pixels = as_tensor(random_pixels(12))

    skipped = [(batch, row) for batch in batches for row in batch.skipped]
    assert sorted(row.source_index for _, row in skipped) == [BROKEN, EMPTY]
    for batch, row in skipped:
        assert plan.rows(batch.shard)[row.position] == row.source_index
        assert batch.place.start <= row.position < batch.place.stop
        slot = row.position - batch.place.start
        assert not batch.valid[slot]
        assert not batch.images[slot].any()
        reason = {BROKEN: "OSError: ", EMPTY: "cannot identify image file"}[row.source_index]
        assert row.reason.startswith(reason)
        assert row.file == f"{row.source_index:03}.png"
        assert "\n" not in row.reason

    found = np.concatenate([batch.source_index for batch in batches])
    assert sorted(found) == [row for row in range(12) if row not in (BROKEN, EMPTY)]
    for batch in batches:
        assert torch.equal(batch.images[batch.valid], pixels[batch.source_index])
        expected = [-1 if row == 3 else row % 3 for row in batch.source_index]
        assert batch.labels[batch.valid].tolist() == expected


def test_a_batch_may_hold_no_image_at_all(tmp_path: Path) -> None:
    source = files(tmp_path / "images", [b""] * 2)
    (batch,) = read(source, plan_of(source))
    assert not batch.valid.any()
    assert len(batch.source_index) == batch.kept.num_rows == 0
    assert sorted(row.source_index for row in batch.skipped) == [0, 1]
    assert sorted(row.position for row in batch.skipped) == [0, 1]


def test_an_image_above_max_pixels_is_skipped_with_the_reason() -> None:
    source = arrays(random_pixels(1))
    plan = plan_of(source)
    (batch,) = load_batches(Reader(source, AS_IT_IS, 255, (3, 16, 16)), plan, plan.shards, 0)
    assert batch.skipped == (Skipped(0, 0, "16x16 pixels are more than runtime.max_pixels = 255"),)


def test_workers_read_the_same_batches(damaged: Source) -> None:
    plan = plan_of(damaged)
    for here, there in zip(read(damaged, plan), read(damaged, plan, workers=2), strict=True):
        assert_same(here, there)


def test_kept_columns_follow_the_valid_rows(tmp_path: Path) -> None:
    images: list[bytes | None] = [png_bytes(pixels) for pixels in random_pixels(12)]
    images[BROKEN], images[EMPTY] = b"no image", None
    names = [f"image {row}" for row in range(12)]
    folder = write_parquet(
        tmp_path / "source",
        images,
        [row % 3 for row in range(12)],
        caption=(datasets.Value("string"), names),
        score=(datasets.Value("float32"), [row / 4 for row in range(12)]),
    )
    config = HuggingFaceConfig(kind="huggingface", path=str(folder), keep_columns=("score", "caption"))
    source = open_source(config, need_labels=True)
    batches = read(source, plan_of(source))
    assert sum(len(batch.source_index) for batch in batches) == 10
    for batch in batches:
        assert batch.kept.column_names == ["score", "caption"]
        assert batch.kept.column("caption").to_pylist() == [names[row] for row in batch.source_index]
        assert batch.kept.column("score").to_pylist() == [row / 4 for row in batch.source_index]


# --------------------------------------------------------------------------------------------------- sizes


def mixed_sizes(tmp_path: Path) -> Source:
    """One image in ten is 16 wide and 12 high; the others are 16x16."""
    pixels = list(random_pixels(10))
    pixels[7] = pixels[7][:12]
    return files(tmp_path / "images", [png_bytes(image) for image in pixels])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_refuses_an_image_of_another_size(tmp_path: Path, workers: int) -> None:
    source = mixed_sizes(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^source: .* 16x16 .* 7 .*\btest \(007\.png\) .* 16x12\b.*preprocess\.resize"
    ):
        read(source, plan_of(source), workers=workers)


@pytest.mark.parametrize(
    ("preprocess", "sizes"),
    [(AS_IT_IS, ("16x16", "16x12")), (PreprocessConfig(resize=8), ("8x8", "10x8"))],
)
def test_mixed_sizes_are_found_before_anything_is_written(
    tmp_path: Path, preprocess: PreprocessConfig, sizes: tuple[str, str]
) -> None:
    source = mixed_sizes(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_shape(source, plan_of(source), preprocess, MAX_PIXELS)
    sentence = str(caught.value)
    assert all(size in sentence for size in sizes)
    assert "preprocess.resize" in sentence


class TwoSizes(IndexedSource[int]):
    """Black images of one pixel, and of two pixels from some row of a split on."""

    def open(self, cell: Any) -> Image.Image:
        return Image.new("L", (2 if cell["row"] >= self.rows[cell["split"]] else 1, 1))


@pytest.mark.parametrize(
    ("train", "test", "wide_from"),
    [(100, 100, 0), (1000, 500, 0), (5000, 500, 0), (100, 1999, 1200), (100, 3000, 2900)],
)
def test_mixed_sizes_are_found_in_any_split_and_any_part_of_it(train: int, test: int, wide_from: int) -> None:
    """A large first split or first part does not use up the images that are looked at."""
    labels = {"train": np.zeros(train, dtype=np.int64), "test": np.zeros(test, dtype=np.int64)}
    source = TwoSizes(rows={"train": train, "test": wide_from}, labels=labels, classes=CLASSES, digest="")
    with pytest.raises(ConfigError, match=r"^source: .* 1x1 .*\d+ of split test .* 2x1\b"):
        find_shape(source, plan_of(source, shuffle=False), AS_IT_IS, MAX_PIXELS)


@dataclass(frozen=True, kw_only=True)
class Counted(ArraySource):
    """Notes which rows were opened."""

    opened: list[int] = field(default_factory=list)

    def open(self, cell: Any) -> Image.Image:
        self.opened.append(cell["row"])
        return super().open(cell)


@pytest.mark.parametrize(
    ("preprocess", "shape", "opened"),
    [
        (PreprocessConfig(resize=16, crop=8), (3, 8, 8), 1),
        (PreprocessConfig(crop=(4, 6), mode="L"), (1, 4, 6), 1),
        (PreprocessConfig(resize=(10, 20)), (3, 10, 20), 1),
        (PreprocessConfig(resize=8), (3, 8, 8), 20),
        (AS_IT_IS, (3, 16, 16), 20),
        (PreprocessConfig(mode="L"), (1, 16, 16), 20),
    ],
)
def test_one_image_is_read_where_the_crop_fixes_the_size(
    preprocess: PreprocessConfig, shape: tuple[int, int, int], opened: int
) -> None:
    source = Counted(rows={"test": random_pixels(20)}, **labelled([0] * 20))
    assert find_shape(source, plan_of(source), preprocess, MAX_PIXELS) == shape
    assert len(source.opened) == opened
    assert read(source, plan_of(source), preprocess=preprocess, shape=shape)[0].images.shape == (3, *shape)


def test_find_shape_passes_over_broken_images(damaged: Source) -> None:
    plan = plan_of(damaged, shuffle=False)
    for order in ([BROKEN, EMPTY, 0], [0, BROKEN, EMPTY]):
        turned = Plan({"test": np.array(order)}, (Shard("test", 0, 1, 0, 3),), plan.batch_size)
        assert find_shape(damaged, turned, PreprocessConfig(resize=16, crop=8), MAX_PIXELS) == (3, 8, 8)
        assert find_shape(damaged, turned, AS_IT_IS, MAX_PIXELS) == (3, 16, 16)


def test_a_source_of_broken_images_is_refused(tmp_path: Path) -> None:
    source = files(tmp_path / "images", [b"no image"] * 3)
    with pytest.raises(PipelineError, match=r"^source: .* \d of split test \(00\d\.png\) \(.*identify"):
        find_shape(source, plan_of(source), AS_IT_IS, MAX_PIXELS)


def test_a_sample_is_spread_over_the_split_and_leaves_out_what_it_cannot_take(damaged: Source) -> None:
    plan, reader = plan_of(damaged, shuffle=False), Reader(damaged, AS_IT_IS, MAX_PIXELS, (3, 16, 16), classes=2)
    images, labels = reader.sample(plan, 100)
    pixels = torch.from_numpy(random_pixels(12)).permute(0, 3, 1, 2)
    kept = [row for row in range(12) if row not in (BROKEN, EMPTY)]
    assert torch.equal(images, pixels[kept])
    # Row 3 has no label, and class 2 is none of the two.
    assert labels.tolist() == [-1 if row == 3 or row % 3 == 2 else row % 3 for row in kept]
    few, _ = reader.sample(plan, 2)
    assert torch.equal(few, pixels[[0, 11]])
    other = Reader(damaged, AS_IT_IS, MAX_PIXELS, (3, 8, 8)).sample(plan, 100)
    assert [tensor.shape for tensor in other] == [(0, 3, 8, 8), (0,)]


# ------------------------------------------------------------------------------------------------ threads


@dataclass(frozen=True, kw_only=True)
class Failing(ArraySource):
    """Reading row 4 fails as the given error does."""

    error: BaseException

    def open(self, cell: Any) -> Image.Image:
        if cell["row"] == 4:
            raise self.error
        return super().open(cell)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("error", "named"),
    [(MemoryError(), "memory"), (OSError(errno.EIO, os.strerror(errno.EIO)), os.strerror(errno.EIO))],
)
def test_what_the_machine_does_to_a_thread_ends_the_run(workers: int, error: Exception, named: str) -> None:
    source = Failing(rows={"test": random_pixels(12)}, error=error, **labelled([0] * 12))
    before = threading.active_count()
    with pytest.raises(PipelineError, match=f"^source: .*{named}"):
        read(source, plan_of(source, shuffle=False), workers=workers)
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before, "no thread outlives the loader"


@dataclass(frozen=True, kw_only=True)
class Noting(ArraySource):
    """Notes how many tables were asked for, and in which threads images were opened."""

    fetched: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def table(self, split: str, rows: Sequence[int]) -> pa.Table:
        self.fetched.append(len(rows))
        return super().table(split, rows)

    def open(self, cell: Any) -> Image.Image:
        self.threads.add(threading.current_thread().name)
        return super().open(cell)


def test_a_bounded_number_of_batches_is_read_ahead() -> None:
    source = Noting(rows={"test": random_pixels(60)}, **labelled([0] * 60))
    plan = plan_of(source, batch_size=3, images_per_shard=60)
    batches = load_batches(Reader(source, AS_IT_IS, MAX_PIXELS, (3, 16, 16)), plan, plan.shards, 2)
    next(batches)
    time.sleep(0.3)
    # Two that are decoded and one that waits, as many as the first; what tells that it is not the last; one ahead.
    assert len(source.fetched) <= 6
    batches.close()
    assert all(name.startswith("decode") for name in source.threads)


def test_without_workers_all_is_done_in_the_thread_that_asks() -> None:
    source = Noting(rows={"test": random_pixels(12)}, **labelled([0] * 12))
    plan = plan_of(source)
    batches = load_batches(Reader(source, AS_IT_IS, MAX_PIXELS, (3, 16, 16)), plan, plan.shards, 0)
    next(batches)
    assert source.threads == {threading.current_thread().name}
    assert len(source.fetched) <= 2
    batches.close()


def test_reading_may_stop_early() -> None:
    """What happens after a failure or Ctrl-C: the threads are told to go, and nothing hangs or warns."""
    source = arrays(random_pixels(12))
    plan = plan_of(source)
    batches = load_batches(Reader(source, AS_IT_IS, MAX_PIXELS, (3, 16, 16)), plan, plan.shards, 1)
    assert next(batches).place == slice(0, 3)
    del batches


# --------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_is_pinned_before_it_is_copied() -> None:
    source = arrays(random_pixels(3))
    (batch,) = read(source, plan_of(source))
    pinned = batch.pin_memory()
    assert pinned.images.is_pinned()
    assert pinned.labels.is_pinned()
    assert pinned.valid.is_pinned()
    assert_same(pinned, batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_thread_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    source = mixed_sizes(tmp_path)
    monkeypatch.setattr(Reader, "read", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        read(source, plan_of(source), workers=workers)
