"""Estimates before a run: how many bytes it will write, how long it will take, and whether the disk has room."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.images import UndecodableError, encode_images, read_image
from pipeline.lanes import Lanes, available_cores
from pipeline.lattice import step
from pipeline.outputs import OutputFolder
from pipeline.plan import Shard
from pipeline.runs import Run, open_run
from pipeline.summary import human_bytes

# Images encoded to estimate the size of all.
SAMPLES = 16
# Per row, for everything beside the image.
ROW_BYTES = 64


@dataclass(frozen=True)
class Estimate:
    """What a run will write: source images, rows over all subsets, files, bytes, and seconds.

    `needed` of the bytes lie on the local disk at once, which has `free`.
    """

    images: int
    rows: int
    shards: int
    files: int
    bytes: int
    needed: int
    seconds: float
    free: int


def estimate_bytes(run: Run, shards: Sequence[Shard]) -> int:
    """Bytes that some shards will take, from encoding a few of their images with random signs.

    Random signs compress worse than a gradient's, so this leans to the high side. None is 0, as hardly one of a
    gradient's is.
    """
    images = _samples(run, shards)
    if not len(images):
        return 0
    signs = torch.randint(0, 2, images.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stored = run.layout.stored([step(images, signs, level) for level in run.levels], signs)
    sizes = [len(data) for pictures in stored for data in encode_images(pictures, run.image_format)]
    return int(sum(map(len, shards)) * (sum(sizes) / len(images) + ROW_BYTES * len(run.levels)))


def _samples(run: Run, shards: Sequence[Shard]) -> Tensor:
    """Some decoded images of the shards, (n, C, H, W) uint8, n up to SAMPLES."""
    splits = {split.name: split.rows for split in run.source.splits}
    found = []
    for shard in shards[:SAMPLES]:
        rows = run.plan.rows(shard)[: -(-SAMPLES // len(shards[:SAMPLES]))].tolist()
        for opener in splits[shard.split].openers(rows):
            try:
                found.append(read_image(opener, run.reader.preprocess, run.reader.max_pixels))
            except UndecodableError:
                continue
    return torch.stack(found) if found else torch.zeros((0, *run.reader.shape), dtype=torch.uint8)


def free_bytes(path: Path) -> int:
    """Free space on the disk that will hold a path, which need not be there yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def in_flight(folder: OutputFolder, shards: Sequence[Shard]) -> Sequence[Shard]:
    """Of some shards those that are on the local disk at once: all, or for an object store one at a time."""
    return shards if folder.store.local else sorted(shards, key=len)[-1:]


def check_disk(needed: int, folder: OutputFolder, *, overwrite: bool) -> None:
    """Refuse to start a run that cannot end. Overwriting frees what is there.

    Args:
        needed: bytes that it will write.
        folder: where they go.
        overwrite: whether what is there goes first.

    Raises:
        PipelineError: the free space is less than the estimate.
    """
    local, disk = folder.store.local, folder.store.disk
    free = free_bytes(disk.resolve())
    if overwrite and local:
        free += sum(size for name, size in folder.store.sizes().items() if name.endswith(".parquet"))
    if needed > free:
        what, mend = "", "choose another disk, fewer epsilons or a source.limit."
        if not local:
            what = " for a shard before its upload"
            mend = "name a larger one with TMPDIR, or make output.images_per_shard smaller."
        raise PipelineError(
            f"output.path: about {human_bytes(needed)} are needed{what} and {disk} has {human_bytes(free)} free; {mend}"
        )


def estimate(run: Run, folder: OutputFolder) -> Estimate:
    """Estimate the whole run; its seconds from one timed batch of the real model and codec."""
    images, total = len(run.plan), estimate_bytes(run, run.plan.shards)
    largest = sum(map(len, in_flight(folder, run.plan.shards)))
    return Estimate(
        images=images,
        rows=images * len(run.stored),
        shards=len(run.plan.shards),
        files=len(run.plan.shards) * len(run.stored),
        bytes=total,
        needed=total * largest // max(1, images),
        seconds=images / run.plan.batch_size * _batch_seconds(run),
        free=free_bytes(folder.store.disk.resolve()),
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
    folder = OutputFolder(config.output.path)
    run = open_run(config)
    plan = estimate(run, folder)
    _, height, width = run.reader.shape
    epsilons = ", ".join(f"{level}/255" for level in run.config.attack.levels)
    splits = ", ".join(f"{name} {len(order):,}" for name, order in run.plan.orders.items())
    rate = plan.images / max(plan.seconds, 1e-9)
    disk = folder.store.disk
    staging = "" if folder.store.local else f" in {disk}, where about {human_bytes(plan.needed)} lie at once"
    rows = {
        "source images": f"{plan.images:,} ({splits}), {width}x{height} {run.config.preprocess.mode}",
        "epsilons": f"clean, {epsilons}",
        "rows": f"{plan.rows:,}",
        "files": f"{plan.files:,} Parquet files in {plan.shards:,} shards",
        "bytes": f"about {human_bytes(plan.bytes)} ({run.image_format}), {human_bytes(plan.free)} free{staging}",
        "time": f"about {tqdm.format_interval(plan.seconds)} on {run.device.type}, {rate:.0f} images/s",
        "batch": f"{run.plan.batch_size}",
        "output": f"{folder.root} (run {run.run_id})",
    }
    column = max(map(len, rows))
    text = "\n".join(f"{key.ljust(column)}  {value}" for key, value in rows.items())
    warning = None
    if plan.needed > plan.free:
        warning = f"{disk} has {human_bytes(plan.free)} free, and about {human_bytes(plan.needed)} are needed."
    return text, warning
