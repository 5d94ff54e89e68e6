"""The plan: every row once, in shards and batches that depend on the config alone. And `fgsm plan`, which tries it."""

import json
import pickle
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pipeline.engine.estimate
from pipeline.config.load import load_config
from pipeline.core.lanes import lane_count
from pipeline.core.memory import PeakMemory
from pipeline.core.plan import Plan, Shard, make_plan
from pipeline.engine.estimate import _Pass, calibrate, hub_warnings, plan_run
from pipeline.engine.execute import write_shards
from pipeline.engine.run import Run, open_run
from pipeline.output.folder import OutputFolder, Receipt
from tests.conftest import (
    FACTORY,
    WriteConfig,
    fgsm,
    generate,
    generate_once,
    manifest,
    png_bytes,
    random_pixels,
    write_parquet,
)


def plan(split_rows: Mapping[str, int], **options: Any) -> Plan:
    defaults: dict[str, Any] = {"shuffle": True, "seed": 0, "limit": None, "images_per_shard": 16, "batch_size": 6}
    return make_plan(split_rows, **{**defaults, **options})


class Counted(tuple[Shard, ...]):
    """Shards that know how often they were walked."""

    walks = 0

    def __iter__(self) -> Iterator[Shard]:
        self.walks += 1
        return super().__iter__()


def test_rows_are_summed_once_and_change_nothing_of_a_plan() -> None:
    """Of 10,000 shards that takes 2 ms, and it is asked for with every batch that has a skipped row."""
    shards = Counted(plan({"train": 100}).shards)
    one, other = Plan({}, shards, 6), Plan({}, shards, 6)
    assert one.total == 100
    walks = shards.walks
    assert one.total == 100
    assert shards.walks == walks
    assert one == other
    assert pickle.loads(pickle.dumps(Plan({}, tuple(shards), 6))) == one


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


def test_a_trillion_rows_are_planned_at_once() -> None:
    # Neither a permutation nor a list of batches, which no memory would hold.
    cut = plan({"train": 10**12}, images_per_shard=10**9, batch_size=256, limit=10**12 - 1)
    assert len(cut.shards) == 1000
    assert len(cut) == 10**12 - 1


# ------------------------------------------------------------------------------------------------ `fgsm plan`


@pytest.fixture
def slow_config(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> Path:
    """480 images whose time is the model's alone, and the same however busy the machine is."""
    slow = "\n\nclass Slow(Net):\n    def forward(self, x):\n        import time\n\n"
    factory_file.write_text(f"{FACTORY}{slow}        time.sleep(0.002 * len(x))\n        return super().forward(x)\n")
    images = [png_bytes(pixels) for pixels in random_pixels(480)]
    return write_config(
        source={"path": str(write_parquet(tmp_path / "many", images, [i % 3 for i in range(480)]))},
        model={"name": f"{factory_file}:Slow"},
        output={"images_per_shard": 120},
        runtime={"batch_size": 24},
    )


@pytest.mark.slow
def test_what_is_predicted_comes_true(slow_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.engine.estimate, "CALIBRATION_SECONDS", 1.5)
    predicted = plan_run(load_config(str(slow_config)))
    assert 24 <= predicted.measured_images < 480
    assert predicted.bytes is not None and predicted.seconds is not None
    # Four forwards of each image sleep, in as many lanes as there are; half of a pass at most is taken for its start.
    least = 4 * 0.002 / lane_count(torch.device(predicted.device))
    assert 1 / predicted.images_per_second > least / 2
    assert predicted.seconds > 480 * least / 2
    generate(slow_config)
    files = list((tmp_path / "out").rglob("*.parquet"))
    assert predicted.files == len(files) == 12
    assert 0.9 < predicted.bytes / sum(path.stat().st_size for path in files) < 1.1


@pytest.mark.drill
def test_what_is_predicted_comes_true_by_the_clock(slow_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.engine.estimate, "CALIBRATION_SECONDS", 1.5)
    predicted = plan_run(load_config(str(slow_config)))
    began = time.perf_counter()
    generate(slow_config)
    assert predicted.seconds is not None
    # The card and the manifest come on top.
    assert 0.5 < predicted.seconds / (time.perf_counter() - began) < 1.5


def test_it_takes_seconds_however_slow_the_model(slow_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.engine.estimate, "CALIBRATION_SECONDS", 0.01)
    seen = calibrate(open_run(load_config(str(slow_config))))
    # One round of the lanes, and no second one.
    assert seen.images <= 24
    assert seen.seconds > 0.002


def test_it_reads_a_bounded_number_of_batches(slow_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.engine.estimate, "CALIBRATION_SECONDS", 60.0)
    monkeypatch.setattr(pipeline.engine.estimate, "CALIBRATION_BATCHES", 3)
    assert calibrate(open_run(load_config(str(slow_config)))).images == 3 * 24


def test_nothing_is_left_behind(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    result = fgsm("plan", write_config())
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert lines["processes"].strip() == "1"
    assert re.search(r"\b40 images\b", lines["measured"])
    assert not list(scratch.iterdir())
    assert not (tmp_path / "out").exists()
    assert "Busy" not in result.stderr


def test_the_memory_is_that_of_all_processes(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.estimate.PeakMemory", _OneByte)
    monkeypatch.setattr("pipeline.engine.estimate._unseen_bytes", lambda *_: 0)
    config = write_config(output={"images_per_shard": 8})
    found = [
        json.loads(fgsm("plan", config, "--json", "--set", f"runtime.processes={count}").stdout) for count in (1, 3)
    ]
    assert [(plan["processes"], plan["memory"]) for plan in found] == [(1, 1), (3, 3)]


class _OneByte:
    peak = 1

    def __enter__(self) -> "_OneByte":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_beside_a_run_it_changes_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert fgsm("plan", write_config()).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert manifest(tmp_path / "out")["complete"]


def test_what_would_stop_the_run_stops_the_plan(write_config: WriteConfig, factory_file: Path) -> None:
    config = write_config(model={"name": f"{factory_file}:Broken"})
    planned, generated = fgsm("plan", config), fgsm("generate", config)
    assert planned.exit_code == generated.exit_code == 1
    for result in (planned, generated):
        assert re.search(r"Error: .*\bBroken\b.*\bNaN\b.*model\.mean", result.stderr)


def test_a_few_broken_images_do_not_stop_the_plan(write_config: WriteConfig, tmp_path: Path) -> None:
    # Of 12 rows looked at one is a larger share than runtime.max_skipped, of all 400 it is not.
    images: list[bytes | None] = [png_bytes(pixels) for pixels in random_pixels(400)]
    images[0] = b"broken"
    source = write_parquet(tmp_path / "some", images, [i % 3 for i in range(400)])
    config = write_config(source={"path": str(source), "shuffle": False}, output={"images_per_shard": 400})
    assert fgsm("plan", config).exit_code == 0


@pytest.mark.parametrize(("images_per_shard", "shuffle"), [(1, True), (7, False), (480, True)])
def test_calibration_spreads_over_the_shards(
    slow_config: Path, images_per_shard: int, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[Shard]] = []

    def write(run: Run, folder: OutputFolder, shards: Sequence[Shard], *others: Any) -> Iterator[Receipt]:
        passes.append(list(shards))
        return write_shards(run, folder, shards, *others)

    monkeypatch.setattr(pipeline.engine.estimate, "CALIBRATION_SECONDS", 60.0)
    monkeypatch.setattr(pipeline.engine.estimate, "CALIBRATION_BATCHES", 8)
    monkeypatch.setattr(pipeline.engine.estimate, "write_shards", write)
    overrides = [f"output.images_per_shard={images_per_shard}", f"source.shuffle={shuffle}", "runtime.batch_size=6"]
    run = open_run(load_config(str(slow_config), overrides))
    calibrate(run)
    whole = {shard.name: shard for shard in run.plan.shards}
    seen = passes[-1]
    assert len({shard.name for shard in seen}) == len(seen)
    assert all(shard.start == whole[shard.name].start and len(shard) <= len(whole[shard.name]) for shard in seen)
    assert sum(map(len, seen)) == {1: 8, 7: 49, 480: 48}[images_per_shard]
    if images_per_shard < 480:
        assert seen[-1].start > 400


def test_the_hub_s_limits_come_with_a_value_that_keeps_them() -> None:
    rows = {"train": 50_000_000, "test": 1_000_000}
    cut = plan(rows, images_per_shard=4096)
    (warning,) = hub_warnings(cut, 9, 1e12)
    numbers = re.findall(r"\d[\d,.]*(?= )", warning.removeprefix("output.images_per_shard: "))
    assert numbers == ["12,453", "112,077", "5120", "11.2"]
    assert hub_warnings(plan(rows, images_per_shard=5120), 9, 1e12) == []
    assert hub_warnings(plan(rows, images_per_shard=4096), 1, 1e12)[0].startswith(
        "output.images_per_shard: 12,453 files"
    )
    assert hub_warnings(plan(rows, images_per_shard=5120), 10, 1e12) == []
    assert "in a folder" not in hub_warnings(plan(rows, images_per_shard=5120), 20, 1e12)[0]


def test_plan_warns_of_too_many_files(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.engine.estimate, "HUB_FOLDER_FILES", 2)
    stderr = fgsm("plan", write_config()).stderr
    assert re.search(r"Warning: output\.images_per_shard: 3 .*\b2\b.* 1024 ", stderr)


def test_peak_memory_is_the_most_at_once() -> None:
    with PeakMemory() as nothing:
        time.sleep(0.2)
    with PeakMemory() as memory:
        kept = bytearray(b"1") * 200_000_000  # written to, or the pages would not be there
        time.sleep(0.2)
        del kept
    assert 190e6 < memory.peak - nothing.peak < 300e6


def test_what_starting_takes_is_told_from_what_images_take(slow_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(load_config(str(slow_config)))

    def calibrated(*passes: tuple[int, float]) -> tuple[float, float]:
        made = iter([_Pass(images, 24, seconds, 100.0, 10.0) for images, seconds in passes])
        monkeypatch.setattr(pipeline.engine.estimate, "_pass", lambda *_: next(made))
        seen = calibrate(run)
        assert next(made, None) is None
        return seen.seconds, seen.start

    assert calibrated((24, 4.0), (24, 2.0), (224, 6.0)) == pytest.approx((0.02, 1.52))
    # Other work held the short pass up: half of the long one is its images' at least.
    assert calibrated((24, 4.0), (24, 2.0), (200, 2.0)) == pytest.approx((0.005, 1.0))
    assert calibrated((24, 4.0), (24, 4.0)) == pytest.approx((4 / 24, 0.0))
    assert calibrated((24, 60.0)) == pytest.approx((2.5, 0.0))


def test_memory_of_full_batches_is_added_where_none_was_seen(
    slow_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(load_config(str(slow_config)))
    peaks = {}
    for longest in (24, 4):
        monkeypatch.setattr(
            pipeline.engine.estimate, "_pass", lambda *_, rows=longest: _Pass(rows, rows, 60.0, 1e6, 0.0)
        )
        peaks[longest] = calibrate(run).memory
    # 20 rows more in each of four batches, the pixels of three subsets and a megabyte encoded; then full row groups.
    unseen = 20 * (3 * 16 * 16 * 3 + 1e6) * 4 + 3 * 32 * 2**20 - 4e6
    assert peaks[4] - peaks[24] == pytest.approx(unseen, abs=20e6)
