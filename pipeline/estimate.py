"""Estimates before a run: how many bytes it will write, how long it will take, and whether the disk has room."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.images import Opener, UndecodableError, encode_images, read_image
from pipeline.lanes import Lanes, available_cores
from pipeline.lattice import step
from pipeline.loader import head_openers
from pipeline.outputs import OutputFolder
from pipeline.plan import Plan, Shard
from pipeline.runs import Run, open_run
from pipeline.streams import StreamedSource
from pipeline.summary import human_bytes

# Images encoded to estimate the size of all.
SAMPLES = 16
# Per row, for everything beside the image.
ROW_BYTES = 64


@dataclass(frozen=True)
class Estimate:
    """What a run will write: source images, rows over all subsets, files, bytes, and seconds.

    Where a source is streamed whose length is not known, images, rows, bytes and seconds are None; `rate` is images/s.
    """

    images: int | None
    rows: int | None
    shards: int
    files: int
    bytes: int | None
    seconds: float | None
    rate: float
    free: int


def estimate_bytes(run: Run, shards: Sequence[Shard]) -> int:
    """Bytes that some shards will take, as far as it is known how many rows they have, from encoding a few of their
    images with random signs.

    Random signs compress worse than a gradient's, so this leans to the high side. None is 0, as hardly one of a
    gradient's is.
    """
    images = _samples(run, shards)
    if not len(images):
        return 0
    signs = torch.randint(0, 2, images.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stored = run.layout.stored([step(images, signs, level) for level in run.levels], signs)
    sizes = [len(data) for pictures in stored for data in encode_images(pictures, run.image_format)]
    return int(sum(shard.rows or 0 for shard in shards) * (sum(sizes) / len(images) + ROW_BYTES * len(run.levels)))


def _samples(run: Run, shards: Sequence[Shard]) -> Tensor:
    """Some decoded images of the shards, (n, C, H, W) uint8, n up to SAMPLES."""
    found = []
    for opener in _openers(run, shards):
        try:
            found.append(read_image(opener, run.reader.preprocess, run.reader.max_pixels))
        except UndecodableError:
            continue
    return torch.stack(found) if found else torch.zeros((0, *run.reader.shape), dtype=torch.uint8)


def _openers(run: Run, shards: Sequence[Shard]) -> Iterator[Opener]:
    if isinstance(run.source, StreamedSource):
        yield from (opener for _, opener in head_openers(run.source, shards, SAMPLES))
    splits = {split.name: split.rows for split in run.source.splits}
    for shard in shards[:SAMPLES] if splits else ():
        yield from splits[shard.split].openers(run.plan.rows(shard)[: -(-SAMPLES // len(shards[:SAMPLES]))].tolist())


def free_bytes(path: Path) -> int:
    """Free space on the disk that will hold a path, which need not be there yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(run: Run, folder: OutputFolder, shards: Sequence[Shard], *, overwrite: bool) -> None:
    """Refuse to start a run that cannot end. Overwriting frees what is there.

    Raises:
        PipelineError: the free space is less than the estimate.
    """
    needed, free = estimate_bytes(run, shards), free_bytes(folder.root.resolve())
    if overwrite:
        free += sum(path.stat().st_size for path in folder.root.rglob("*.parquet"))
    if needed > free:
        raise PipelineError(
            f"output.path: about {human_bytes(needed)} are needed and {folder.root} has {human_bytes(free)} free; "
            "choose another disk, fewer epsilons or a source.limit."
        )


def estimate(run: Run, folder: OutputFolder) -> Estimate:
    """Estimate the whole run; its seconds from one timed batch of the real model and codec."""
    images = run.plan.total
    rate = run.plan.batch_size / max(_batch_seconds(run), 1e-9)
    return Estimate(
        images=images,
        rows=None if images is None else images * len(run.stored),
        shards=len(run.plan.shards),
        files=len(run.plan.shards) * len(run.stored),
        bytes=None if images is None else estimate_bytes(run, run.plan.shards),
        seconds=None if images is None else images / rate,
        rate=rate,
        free=free_bytes(folder.root.resolve()),
    )


def _batch_seconds(run: Run) -> float:
    """Seconds of a batch through attack and encoding with all lanes at work, after a round to warm up."""
    samples = _samples(run, run.plan.shards)
    if not len(samples):
        return 0.0
    images = samples[torch.arange(run.plan.batch_size) % len(samples)]
    labels = torch.zeros(len(images), dtype=torch.int64)
    with Lanes(run.device, run.chunk) as lanes:
        # Enough batches for two chunks in each lane, as in the run.
        batches = -(-2 * lanes.count * run.chunk // run.plan.batch_size)
        for _ in range(2):
            started = time.perf_counter()
            waiting = [
                future
                for _ in range(batches)
                for future in lanes.submit(run.attacker, images, labels, labels, valid=labels == 0)
            ]
            parts = [future.result() for future in waiting]
            computing = (time.perf_counter() - started) / batches
    started = time.perf_counter()
    for pictures in parts[0].pictures:
        encode_images(pictures[: len(samples)], run.image_format)
    encoded = min(len(samples), len(parts[0].classes))
    encoding = (time.perf_counter() - started) * len(images) / encoded / available_cores()
    # On the CPU both want the same cores; beside an accelerator the slower one sets the pace.
    return computing + encoding if run.device.type == "cpu" else max(computing, encoding)


def describe_plan(config: Config) -> tuple[str, str | None]:
    """What `fgsm plan` prints, and a warning where the disk is too small.

    Raises:
        ConfigError: as `open_run`.
    """
    folder = OutputFolder(Path(config.output.path))
    run = open_run(config)
    plan = estimate(run, folder)
    _, height, width = run.reader.shape
    epsilons = ", ".join(f"{level}/255" for level in run.config.attack.levels)
    splits = ", ".join(f"{name} {_count(rows)}" for name, rows in _planned(run.plan).items())
    rows = {
        "source images": f"{_count(plan.images)} ({splits}), {width}x{height} {run.config.preprocess.mode}",
        "epsilons": f"clean, {epsilons}",
        "rows": _count(plan.rows),
        "files": f"{plan.files:,} Parquet files in {plan.shards:,} shards",
        "bytes": f"{_about(plan.bytes, human_bytes)} ({run.image_format}), {human_bytes(plan.free)} free",
        "time": f"{_about(plan.seconds, tqdm.format_interval)} on {run.device.type}, {plan.rate:.0f} images/s",
        "batch": f"{run.plan.batch_size}",
        "output": f"{folder.root} (run {run.run_id})",
    }
    column = max(map(len, rows))
    text = "\n".join(f"{key.ljust(column)}  {value}" for key, value in rows.items())
    warning = None
    if plan.bytes is not None and plan.bytes > plan.free:
        warning = f"{folder.root} has {human_bytes(plan.free)} free, and about {human_bytes(plan.bytes)} are needed."
    return text, warning


def _planned(plan: Plan) -> dict[str, int | None]:
    """The rows of each split; None where that is not known."""
    splits: dict[str, int | None] = {}
    for shard in plan.shards:
        before = splits.get(shard.split, 0)
        splits[shard.split] = None if before is None or shard.rows is None else before + shard.rows
    return splits


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _about(number: float | None, form: Callable[[float], str]) -> str:
    return "unknown" if number is None else f"about {form(number)}"
