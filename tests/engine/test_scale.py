"""Thousands of shards, with simulated receipts: what is done is found at once, and nothing grows with its square.

Bounds are seconds of this process's own computing, generous: other work on the machine does not count.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pipeline.engine.execute
from pipeline.config.load import load_config
from pipeline.core.batches import Batch
from pipeline.core.left_out import Skipped
from pipeline.core.plan import Shard
from pipeline.engine.compute import Part
from pipeline.engine.progress import Busy, Progress
from pipeline.engine.run import Run, open_run, versions
from pipeline.output.card import render_card
from pipeline.output.folder import (
    FileEntry,
    OutputFolder,
    Receipt,
    VariantCounts,
    committed,
    shard_file,
)
from pipeline.output.manifest import MOST_SKIPPED, SkippedRow, summarise
from pipeline.output.summary import Summary
from tests.conftest import REPOSITORY, WriteConfig, fgsm, generate, png_bytes, random_pixels, write_parquet

FILE_BYTES = 12_345


def receipt_of(run: Run, shard: Shard, skipped: Sequence[Skipped] = ()) -> Receipt:
    """The receipt that a shard would have."""
    # Where more are skipped than it has, only those count.
    rows = max(0, len(shard) - len(skipped))
    return Receipt(
        run_id=run.run_id,
        shard=shard.name,
        split=shard.split,
        planned=len(shard),
        rows=rows,
        skipped=tuple(skipped),
        counts=tuple(
            VariantCounts(**vars(variant), rows=rows, labelled=rows, correct=rows, fooled=0, confidence_sum=0.5 * rows)
            for variant in run.variants
        ),
        files=tuple(
            FileEntry(path=shard_file(subset, shard, run.edition), rows=rows, bytes=FILE_BYTES, sha256="0" * 64)
            for subset in run.stored
        ),
        versions=versions(run.device),
    )


def simulate(run: Run, out: Path, shards: Sequence[Shard]) -> None:
    """What a run leaves that has committed some shards, but for what is in its files: holes of the right size."""
    receipts = out / ".run/receipts"
    receipts.mkdir(parents=True)
    for subset in run.stored:
        (out / subset).mkdir()
    first = receipt_of(run, shards[0]).model_dump_json()
    for shard in shards:
        assert len(shard) == len(shards[0])
        receipt = Receipt.model_validate_json(first.replace(shards[0].name, shard.name)).sealed()
        (out / OutputFolder(out).receipt(shard, run.edition)).write_text(receipt.model_dump_json(indent=1))
        for subset in run.stored:
            descriptor = os.open(out / shard_file(subset, shard, run.edition), os.O_WRONLY | os.O_CREAT)
            os.ftruncate(descriptor, FILE_BYTES)
            os.close(descriptor)


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Fail where this takes longer, in seconds of this process's computing."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    print(f"{what}: {took:.2f} s")
    assert took < seconds, f"{what} took {took:.1f} s"


@dataclass(frozen=True)
class Moment:
    """Seconds of this process's computing, and by the clock."""

    computing: float
    monotonic: float


@contextlib.contextmanager
def first_batch() -> Iterator[list[Moment]]:
    """Note when the first batch of a run has been attacked."""
    seen: list[Moment] = []
    unpatched = pipeline.engine.execute.attack_ahead

    def attack_ahead(run: Run, batches: Iterable[Batch], busy: Busy) -> Generator[tuple[Batch, list[Part]], None, None]:
        for item in unpatched(run, batches, busy):
            seen.append(Moment(time.process_time(), time.monotonic()))
            yield item

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline.engine.execute, "attack_ahead", attack_ahead)
        yield seen


def many(write_config: WriteConfig, folder: Path, shards: int, epsilons: Sequence[str]) -> tuple[Path, Run]:
    """A config over so many images in as many shards, and its run."""
    images = [png_bytes(pixels) for pixels in random_pixels(16)]
    source = write_parquet(folder / "many", [images[i % 16] for i in range(shards)], [i % 3 for i in range(shards)])
    config = write_config(
        source={"path": str(source)}, attack={"epsilons": list(epsilons)}, output={"images_per_shard": 1}
    )
    run = open_run(load_config(str(config)))
    assert len(run.plan.shards) == shards
    return config, run


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("shards", [2_000, pytest.param(10_000, marks=pytest.mark.drill)])
def test_thousands_of_shards(shards: int, write_config: WriteConfig, tmp_path: Path) -> None:
    config, run = many(write_config, tmp_path, shards, ["8/255"])
    out = tmp_path / "out"
    share = shards / 10_000
    simulate(run, out, run.plan.shards[:-1])
    folder = OutputFolder(out)
    with at_most(share, "listing the folder"):
        sizes = folder.store.sizes()
    assert sum(name.startswith(f"{folder.receipts}/") for name in sizes) == shards - 1
    with at_most(1.5 * share, "what is committed"):
        assert len(committed(folder, run.edition, run.plan.shards)) == shards - 1
    # A second for what a run takes however small it is.
    with first_batch() as seen, at_most(1 + 14 * share, "the last shard"):
        began = time.process_time()
        assert f"complete; {shards:,} of {shards:,} source images" in generate(config)
    assert seen[0].computing - began < 1 + 9 * share
    with at_most(1 + 11 * share, "nothing left to do"):
        generate(config)
    with at_most(6 * share, "inspect"):
        assert fgsm("inspect", out).exit_code == 0
    assert (out / "manifest.json").stat().st_size < 400 * 2 * shards


@pytest.mark.drill
@pytest.mark.timeout(240)
def test_a_resumed_run_starts_within_ten_seconds_by_the_clock(write_config: WriteConfig, tmp_path: Path) -> None:
    """At 10,000 shards in five subsets; they are listed within one, and what is committed is known soon after."""
    shards = 10_000
    config, run = many(write_config, tmp_path, shards, ["1/255", "2/255", "4/255", "8/255"])
    simulate(run, tmp_path / "out", run.plan.shards[:-1])
    folder = OutputFolder(tmp_path / "out")
    began = time.monotonic()
    sizes = folder.store.sizes()
    assert time.monotonic() - began < 1
    assert sum(name.startswith(f"{folder.receipts}/") for name in sizes) == shards - 1
    began = time.monotonic()
    assert len(committed(folder, run.edition, run.plan.shards)) == shards - 1
    assert time.monotonic() - began < 1.5
    with first_batch() as seen:
        began = time.monotonic()
        generate(config)
    assert seen[0].monotonic - began < 10


def measure_streaming(images: int, held: int, log: Path) -> None:
    """The body of a process: scripts/measure_streaming.py, in a run that keeps so many bytes of each image."""
    kept, update = [], Progress.update

    def leaking(self: Progress, images: int, *counts: Any) -> None:
        kept.append(b"x" * (held * images))
        update(self, images, *counts)

    Progress.update = leaking  # type: ignore[assignment,method-assign]
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["measure_streaming.py", "--images", str(images), "--files", "20"]
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            runpy.run_path(str(REPOSITORY / "scripts/measure_streaming.py"), run_name="__main__")
        except SystemExit as end:
            file.write(str(end))
            raise


@pytest.mark.drill
@pytest.mark.parametrize(("images", "held", "code"), [(20_000, 0, 0), (4_000, 2**15, 1)])
def test_the_memory_of_a_stream_is_measured(processes: Any, tmp_path: Path, images: int, held: int, code: int) -> None:
    log = tmp_path / "log"
    process = processes.Process(target=measure_streaming, args=(images, held, log))
    process.start()
    process.join(100)
    said = log.read_text()
    assert process.exitcode == code, said
    assert said.count("peak RSS") == 4
    assert ("Memory grows" in said) == bool(held)


def test_all_skipped_rows_are_counted_and_some_listed(write_config: WriteConfig) -> None:
    run = open_run(load_config(str(write_config())))
    few, many, none = run.plan.shards
    rows = [Skipped(position=i, source_index=i, reason="cannot identify image file") for i in range(MOST_SKIPPED)]
    receipts = {
        few.name: receipt_of(run, few, rows[:3]),
        many.name: receipt_of(run, many, rows),
        none.name: receipt_of(run, none),
    }
    manifest = summarise(run.manifest(), receipts)
    assert manifest.skipped_rows == MOST_SKIPPED + 3
    assert len(manifest.skipped) == MOST_SKIPPED
    assert manifest.skipped[:4] == tuple(
        SkippedRow(split="test", source_index=index, reason="cannot identify image file") for index in (0, 1, 2, 0)
    )
    assert "10,003 skipped" in str(Summary(manifest))
    assert "10,003 source images that cannot be decoded, the first 10,000 of them listed" in render_card(manifest)
    whole = summarise(run.manifest(), {few.name: receipts[few.name]})
    assert "3 source images that cannot be decoded, listed" in render_card(whole)
