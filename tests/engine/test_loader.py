"""The loader: batches that are complete, in order and of one shape, whatever the files and the workers do."""

import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import PreprocessConfig, SourceConfig
from pipeline.core.batches import Batch, Skipped
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.images import Opener
from pipeline.core.plan import Plan, make_plan
from pipeline.engine.loader import Reader, find_shape, load_batches
from pipeline.sources.mapped import ArrayRows, FileRows, Rows, Source, Split, open_source
from tests.conftest import CLASSES, WriteConfig, fgsm, let_go, png_bytes, random_pixels, write_parquet

AS_IT_IS = PreprocessConfig()
MAX_PIXELS = 10_000


def plan_of(source: Source, *, shuffle: bool = True, images_per_shard: int = 7, batch_size: int = 3) -> Plan:
    return make_plan(
        {split.name: len(split.labels) for split in source.splits},
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


def one_split(rows: Rows, labels: Sequence[int], name: str = "test") -> Source:
    return Source((Split(name, np.array(labels, dtype=np.int64), rows),), CLASSES, "")


def files(folder: Path, contents: Sequence[bytes]) -> FileRows:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:03}.png" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return FileRows([str(path) for path in paths], str(folder))


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
    return one_split(files(tmp_path / "images", contents), labels)


# ------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_come_in_order_with_one_shape_and_never_cross_shards(shuffle: bool) -> None:
    pixels = random_pixels(12)
    source = one_split(ArrayRows(pixels), [row % 3 for row in range(12)])
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
    source = one_split(ArrayRows(random_pixels(12)), [0] * 12)
    plan, reader = plan_of(source), Reader(source, AS_IT_IS, MAX_PIXELS, (3, 16, 16))
    batches = list(load_batches(reader, plan, plan.shards[1:], 0))
    assert {batch.shard for batch in batches} == {plan.shards[1]}
    assert len(batches) == 2
    assert list(load_batches(reader, plan, [], 2)) == []


def test_each_split_is_read_from_its_own_rows() -> None:
    train, test = random_pixels(4, seed=1), random_pixels(3, seed=2)
    source = Source(
        (
            Split("train", np.zeros(4, dtype=np.int64), ArrayRows(train)),
            Split("test", np.ones(3, dtype=np.int64), ArrayRows(test)),
        ),
        CLASSES,
        "",
    )
    for batch in read(source, plan_of(source)):
        pixels, label = (train, 0) if batch.shard.split == "train" else (test, 1)
        assert torch.equal(batch.images[batch.valid], as_tensor(pixels)[batch.source_index])
        assert set(batch.labels[batch.valid].tolist()) == {label}


def test_consecutive_batches_share_no_memory() -> None:
    """A consumer may hold several batches at once."""
    source = one_split(ArrayRows(random_pixels(12)), [0] * 12)
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
    source = one_split(files(tmp_path / "images", [b""] * 2), [0, 1])
    (batch,) = read(source, plan_of(source))
    assert not batch.valid.any()
    assert len(batch.source_index) == batch.kept.num_rows == 0
    assert sorted(row.source_index for row in batch.skipped) == [0, 1]
    assert sorted(row.position for row in batch.skipped) == [0, 1]


def test_an_image_above_max_pixels_is_skipped_with_the_reason() -> None:
    source = one_split(ArrayRows(random_pixels(1)), [0])
    plan = plan_of(source)
    (batch,) = load_batches(Reader(source, AS_IT_IS, 255, (3, 16, 16)), plan, plan.shards, 0)
    assert batch.skipped == (Skipped(0, 0, "16x16 pixels are more than runtime.max_pixels = 255"),)


def test_workers_read_the_same_batches(damaged: Source) -> None:
    plan = plan_of(damaged)
    for here, there in zip(read(damaged, plan), read(damaged, plan, workers=2), strict=True):
        assert_same(here, there)


def test_a_reader_reaches_workers_that_are_spawned(damaged: Source) -> None:
    """macOS and newer Pythons pickle it."""
    plan = plan_of(damaged)
    reader = Reader(damaged, AS_IT_IS, MAX_PIXELS, (3, 16, 16))
    again, same_plan = pickle.loads(pickle.dumps((reader, plan)))
    place = next(plan.batches(plan.shards[0]))
    assert_same(reader.read(plan, plan.shards[0], place), again.read(same_plan, same_plan.shards[0], place))


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
    config = SourceConfig(kind="huggingface", path=str(folder), keep_columns=("score", "caption"))
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
    return one_split(files(tmp_path / "images", [png_bytes(image) for image in pixels]), [0] * 10)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_refuses_an_image_of_another_size(tmp_path: Path, workers: int) -> None:
    source = mixed_sizes(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read(source, plan_of(source), workers=workers)
    assert str(caught.value) == (
        "source: images differ in size: one is 16x16 and row 7 of split test (007.png) is 16x12; "
        "set preprocess.resize and preprocess.crop."
    )


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
    assert "set preprocess.resize and preprocess.crop" in sentence


@dataclass(frozen=True)
class TwoSizes(Rows):
    """Black images of one pixel, and of two pixels from some row on."""

    wide_from: int

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        return [partial(Image.new, "L", (2 if row >= self.wide_from else 1, 1)) for row in rows]


@pytest.mark.parametrize(
    ("train", "test", "wide_from"),
    [(100, 100, 0), (1000, 500, 0), (5000, 500, 0), (100, 1999, 1200), (100, 3000, 2900)],
)
def test_mixed_sizes_are_found_in_any_split_and_any_part_of_it(train: int, test: int, wide_from: int) -> None:
    """A large first split or first part does not use up the images that are looked at."""
    source = Source(
        (
            Split("train", np.zeros(train, dtype=np.int64), TwoSizes(train)),
            Split("test", np.zeros(test, dtype=np.int64), TwoSizes(wide_from)),
        ),
        CLASSES,
        "",
    )
    with pytest.raises(ConfigError, match=r"1x1 and row \d+ of split test is 2x1"):
        find_shape(source, plan_of(source, shuffle=False), AS_IT_IS, MAX_PIXELS)


@dataclass(frozen=True)
class Counted(Rows):
    """Rows that note which of them were opened."""

    rows: Rows
    opened: list[int] = field(default_factory=list)

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        return [partial(self._open, row, opener) for row, opener in zip(rows, self.rows.openers(rows), strict=True)]

    def _open(self, row: int, opener: Opener) -> Image.Image:
        self.opened.append(row)
        return opener()


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
    rows = Counted(ArrayRows(random_pixels(20)))
    source = one_split(rows, [0] * 20)
    assert find_shape(source, plan_of(source), preprocess, MAX_PIXELS) == shape
    assert len(rows.opened) == opened
    assert read(source, plan_of(source), preprocess=preprocess, shape=shape)[0].images.shape == (3, *shape)


def test_find_shape_passes_over_broken_images(damaged: Source) -> None:
    plan = plan_of(damaged, shuffle=False)
    for order in ([BROKEN, EMPTY, 0], [0, BROKEN, EMPTY]):
        turned = Plan({"test": np.array(order)}, plan.shards, plan.batch_size)
        assert find_shape(damaged, turned, PreprocessConfig(resize=16, crop=8), MAX_PIXELS) == (3, 8, 8)
        assert find_shape(damaged, turned, AS_IT_IS, MAX_PIXELS) == (3, 16, 16)


def test_a_source_of_broken_images_is_refused(tmp_path: Path) -> None:
    source = one_split(files(tmp_path / "images", [b"no image"] * 3), [0] * 3)
    with pytest.raises(
        PipelineError,
        match=r"^source: none of its images .* row \d of split test \(00\d\.png\) \(cannot identify image file\)\.$",
    ):
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


# ----------------------------------------------------------------------------------------- worker processes


@dataclass(frozen=True)
class Signalling(Rows):
    """Small images; opening row 4 sends a signal to the worker process that opens it."""

    signum: int
    main: int = field(default_factory=os.getpid)

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        return [partial(self._open, row) for row in rows]

    def _open(self, row: int) -> Image.Image:
        if row == 4 and os.getpid() != self.main:
            os.kill(os.getpid(), self.signum)
        return Image.new("RGB", (16, 16), (row, row, row))


def test_a_worker_that_is_killed_ends_the_run_with_one_sentence() -> None:
    source = one_split(Signalling(signal.SIGKILL), [0] * 12)
    with pytest.raises(PipelineError) as caught:
        read(source, plan_of(source, shuffle=False), workers=1)
    assert type(caught.value) is PipelineError
    sentence = str(caught.value)
    assert sentence.startswith("A decoding worker died (DataLoader worker (pid")
    assert "runtime.workers" in sentence
    assert "\n" not in sentence


def test_a_worker_that_dies_while_the_attack_runs_is_one_sentence_too(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killing(*_: object) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
        time.sleep(30)  # until DataLoader's handler of signals raises here

    monkeypatch.setattr("pipeline.engine.execute._score", killing)
    config = write_config(runtime={"workers": 1}, output={"images_per_shard": 6})
    result = fgsm("generate", config)
    assert result.exit_code == 1
    assert "Error: A decoding worker died (DataLoader worker (pid" in result.stderr
    monkeypatch.undo()
    assert fgsm("generate", config).exit_code == 0


def test_workers_that_give_nothing_end_the_run(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(runtime={"workers": 1})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.engine.loader.SILENT_SECONDS", 1.0)
        patch.setattr(Reader, "read", lambda *_: time.sleep(60))
        result = fgsm("generate", config)
    assert result.exit_code == 1
    assert "Error: The decoding workers gave nothing for 1 s; they hang, or the source's disk does." in result.stderr
    assert fgsm("generate", config).exit_code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)"),
        pytest.param(
            RuntimeError("unable to mmap 6144 bytes from file </torch_7>: Cannot allocate memory (12)"),
            marks=pytest.mark.drill,
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_ends_the_run(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    # Torch would do it in a thread of the queue, which drops what fails: the run would wait for ever.
    def refusing(_: Batch) -> Batch:
        raise error

    monkeypatch.setattr(Batch, "share_memory", refusing)
    source = one_split(ArrayRows(random_pixels(12)), [0] * 12)
    before = {*multiprocessing.active_children()}
    with pytest.raises(PipelineError, match=r"for want of memory .* smaller runtime\.workers") as caught:
        read(source, plan_of(source), workers=1)
    assert caught.tb
    assert {*multiprocessing.active_children()} <= before, "no worker lives as long as the traceback"
    assert read(source, plan_of(source), workers=0)


def test_a_batch_is_shared_by_the_worker_that_read_it() -> None:
    source = one_split(ArrayRows(random_pixels(12)), [0] * 12)
    (batch, *_) = read(source, plan_of(source), workers=0)
    assert not batch.images.is_shared()
    shared = batch.share_memory()
    assert all(tensor.is_shared() for tensor in (shared.images, shared.labels, shared.valid))


def test_workers_that_cannot_be_started_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    source = one_split(ArrayRows(random_pixels(12)), [0] * 12)
    monkeypatch.setattr(os, "fork", refusing)
    with pytest.raises(PipelineError, match=r"cannot be started \(Resource temporarily unavailable\); set a smaller"):
        read(source, plan_of(source), workers=1)


def test_a_worker_leaves_ctrl_c_to_the_main_process() -> None:
    source = one_split(Signalling(signal.SIGINT), [0] * 12)
    batches = read(source, plan_of(source, shuffle=False), workers=1)
    assert [int(batch.images[0, 0, 0, 0]) for batch in batches] == [0, 3, 6, 7, 10]


def test_reading_may_stop_early() -> None:
    """What happens after a failure or Ctrl-C: the workers are told to go, and nothing hangs or warns."""
    source = one_split(ArrayRows(random_pixels(12)), [0] * 12)
    plan = plan_of(source)
    batches = load_batches(Reader(source, AS_IT_IS, MAX_PIXELS, (3, 16, 16)), plan, plan.shards, 1)
    assert next(batches).place == slice(0, 3)
    del batches


# --------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_is_pinned_before_it_is_copied() -> None:
    source = one_split(ArrayRows(random_pixels(3)), [0] * 3)
    (batch,) = read(source, plan_of(source))
    pinned = batch.pin_memory()
    assert pinned.images.is_pinned()
    assert pinned.labels.is_pinned()
    assert pinned.valid.is_pinned()
    assert_same(pinned, batch)


def test_a_bug_in_a_worker_is_not_called_a_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    source = mixed_sizes(tmp_path)
    monkeypatch.setattr(Reader, "read", broken)
    with pytest.raises(RuntimeError, match="a bug of ours") as caught:
        read(source, plan_of(source), workers=1)
    let_go(caught)
