"""Estimates before a run: how many bytes it needs, and, for `fgsm plan`, what it will take.

`generate` encodes a few images, which takes no time. `plan` calibrates: some rows of the real run go the whole way,
into a folder that is thrown away, and what that took is scaled up.
"""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.core.addresses import is_address
from pipeline.core.console import BLUE, as_text, duration, html_table, make_table
from pipeline.core.images import UndecodableError
from pipeline.core.lanes import lane_count
from pipeline.core.lattice import step
from pipeline.core.memory import PeakMemory
from pipeline.core.plan import Plan, Shard
from pipeline.engine.execute import BATCHES_IN_FLIGHT, write_shards
from pipeline.engine.processes import share_machine
from pipeline.engine.progress import Busy
from pipeline.engine.resolved import count, describe_run, planned
from pipeline.engine.run import Run, open_run
from pipeline.output.disk import free_bytes, in_flight
from pipeline.output.folder import OutputFolder
from pipeline.output.shards import ROW_GROUP_BYTES, ROW_GROUP_ROWS, column_options
from pipeline.output.summary import human_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

logger = logging.getLogger(__name__)

# Images encoded to estimate the size of all.
SAMPLES = 16
# Per row, for everything beside the image.
ROW_BYTES = 64
# A calibration lasts about so long, however fast the model, and reads so many batches at most.
CALIBRATION_SECONDS = 6.0
CALIBRATION_BATCHES = 16
# Shards over which it spreads: sources that are not shuffled hold one class after the other.
CALIBRATION_SHARDS = 4
# What the Hub allows: files in a folder, and in a repository.
HUB_FOLDER_FILES = 10_000
HUB_REPOSITORY_FILES = 100_000
# Of a repository's files, those that are not Parquet: the card, the manifest, the report and its pictures.
HUB_OTHER_FILES = 100


def estimate_bytes(run: Run, shards: Sequence[Shard]) -> int:
    """Bytes that some shards will take, as far as it is known how many rows they have.

    A few of their images are encoded with random signs. None of these is 0; of a gradient's hardly any is. They
    compress worse than a gradient's, so the estimate is rather too high.
    """
    images = _samples(run, shards)
    if not len(images):
        return 0
    signs = torch.randint(0, 2, images.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = [step(images, signs, variant.level) for variant in run.variants]
    stored = run.layout.stored(moved, [signs] * len(run.attacks))
    encoded = [run.layout.encode(*one, run.image_format) for one in zip(run.pictures, stored, strict=True)]
    table, file = pa.table(encoded, names=[str(index) for index in range(len(encoded))]), pa.BufferOutputStream()
    pq.write_table(table, file, **column_options(table.schema, table.column_names))
    size = _data_bytes(pa.BufferReader(file.getvalue())) / len(images)
    return int(sum(shard.rows or 0 for shard in shards) * (size + ROW_BYTES * len(run.variants)))


def _samples(run: Run, shards: Sequence[Shard]) -> Tensor:
    """Some decoded images of the shards, (n, C, H, W) uint8, n up to SAMPLES."""
    reader, found = run.reader, []
    for row in run.source.sample(run.plan, shards, SAMPLES):
        with contextlib.suppress(UndecodableError):
            found.append(reader.decode(row.cell))
    return torch.stack(found) if found else torch.zeros((0, *reader.shape), dtype=torch.uint8)


@dataclass(frozen=True)
class Calibration:
    """What some rows of a run took on this machine.

    images: source rows that went the whole way, in the largest of the passes. start: seconds before the first image
    flows; seconds: of each image. row_bytes: stored for each source row, in all subsets; file_bytes: of each file
    beside its rows. memory: the most bytes resident in this process and its workers together; device_memory: the most
    that PyTorch had allocated on CUDA, None elsewhere.
    """

    images: int
    start: float
    seconds: float
    row_bytes: float
    file_bytes: float
    memory: int
    device_memory: int | None


def calibrate(run: Run) -> Calibration:
    """Send some rows of a run the whole way: read, attacked, encoded, written and committed, to a temporary folder.

    First a chunk for each lane, to warm up; once more, for what starting costs; then as many rows as fit into
    CALIBRATION_SECONDS, and four times as many as before at least: what that took longer is the price of its further
    rows. Where the model is so slow that starting is nothing beside it, there is no further pass.

    Raises:
        PipelineError: what stops these rows would stop the run.
    """
    least = min(run.plan.batch_size, lane_count(run.device) * run.chunk)
    with PeakMemory() as memory:
        last = first = _pass(run, least)
        if first.seconds < CALIBRATION_SECONDS:
            last = first = _pass(run, least)
        if first.seconds < CALIBRATION_SECONDS / 2:
            wanted = max(4 * first.images, int(CALIBRATION_SECONDS * first.images / first.seconds))
            last = _pass(run, min(wanted, CALIBRATION_BATCHES * run.plan.batch_size))
    seconds = last.seconds / last.images
    if last.images > first.images:
        # Beside other work a short pass may take as long as a long one, which then was half start at most.
        seconds = max(seconds / 2, (last.seconds - first.seconds) / (last.images - first.images))
    return Calibration(
        images=last.images,
        start=max(0.0, last.seconds - seconds * last.images),
        seconds=seconds,
        row_bytes=last.row_bytes,
        file_bytes=last.file_bytes,
        memory=memory.peak + _unseen_bytes(run, last),
        device_memory=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
    )


@dataclass(frozen=True)
class _Pass:
    """One pass of a calibration: source rows, the most of them in one shard, seconds, and bytes as in `Calibration`."""

    images: int
    longest: int
    seconds: float
    row_bytes: float
    file_bytes: float


def _pass(run: Run, rows: int) -> _Pass:
    """Execute about so many rows of a run, in front parts of its shards."""
    parts = _parts(run.plan, rows)
    with tempfile.TemporaryDirectory(prefix="fgsm-plan-") as place:
        folder = OutputFolder(Path(place))
        with folder.store.held():
            began = time.perf_counter()
            receipts = [*write_shards(run, folder, parts, [], Busy(), lambda *_: None)]
            seconds = time.perf_counter() - began
        files = [entry for receipt in receipts for entry in receipt.files]
        data = sum(_data_bytes(Path(place) / entry.path) for entry in files)
    beside = (sum(entry.bytes for entry in files) - data) / len(files)
    planned = [receipt.planned for receipt in receipts]
    images = max(1, sum(planned))
    return _Pass(images, max(planned), seconds, data / images, beside)


def _parts(plan: Plan, rows: int) -> list[Shard]:
    """The first rows of some shards that lie spread over the plan, about so many together."""
    # No part is shorter than a batch where there are rows enough for one: padding would be computed for nothing.
    count = min(CALIBRATION_SHARDS, max(1, rows // plan.batch_size))
    # Short shards make up for it by their number.
    count = min(
        len(plan.shards),
        max(count, -(-rows // max(rows if shard.rows is None else shard.rows for shard in plan.shards))),
    )
    chosen = [plan.shards[index * len(plan.shards) // count] for index in range(count)]
    each = -(-rows // count)
    return [shard.with_rows(each if shard.rows is None else min(each, shard.rows)) for shard in chosen]


def _data_bytes(file: Path | pa.NativeFile) -> int:
    """Bytes of a Parquet file's rows, without what it says of them."""
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return sum(group.column(index).total_compressed_size for group in groups for index in range(group.num_columns))


def _unseen_bytes(run: Run, seen: _Pass) -> int:
    """What a run holds and a calibration of few rows did not: full batches, pixels and encoded, and full row groups."""
    missing = run.plan.batch_size - seen.longest
    if missing <= 0:
        return 0
    pixels = torch.Size(run.reader.shape).numel() * len(run.pictures)
    # Being attacked, waiting for it, being encoded, and waiting to be written.
    batches = missing * (pixels + seen.row_bytes) * (2 + BATCHES_IN_FLIGHT)
    group = min(ROW_GROUP_BYTES * len(run.stored), ROW_GROUP_ROWS * seen.row_bytes)
    return int(batches + max(0.0, group - seen.longest * seen.row_bytes))


@dataclass(frozen=True, repr=False)
class PlannedRun:
    """What a run would take, as `fgsm plan` shows it, and with `--json` gives it.

    Counts, bytes and seconds are None where a source is streamed whose length is not known. disk: the folder in which
    bytes lie, at_once the most of them there; free_bytes of its disk. start_seconds: to open the run and to start;
    seconds: all of it, with that; both are those of one process, however many share the work. memory and device_memory:
    the most bytes at once, in all processes; the latter is None without CUDA.
    warnings: what will not fit on the disk or the Hub.
    """

    source_images: int | None
    splits: dict[str, int | None]
    image_size: tuple[int, int]
    mode: str
    variants: list[str]
    rows: int | None
    files: int
    shards: int
    bytes: int | None
    image_format: str
    disk: str
    at_once: int | None
    free_bytes: int
    seconds: float | None
    start_seconds: float
    images_per_second: float
    measured_images: int
    device: str
    processes: int
    memory: int
    device_memory: int | None
    batch_size: int
    output: str
    run_id: str
    warnings: list[str]

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the same in HTML."""
        return html_table(self._columns(), head=False)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["RenderableType"]:
        del console, options
        yield make_table(self._columns(), 2, {"": BLUE}, head=False)

    def _columns(self) -> dict[str, list[str]]:
        """What is estimated, and how much."""
        width, height = self.image_size
        splits = ", ".join(f"{name} {count(rows)}" for name, rows in self.splits.items())
        memory = f"about {human_bytes(self.memory)}"
        if self.device_memory is not None:
            memory += f", {human_bytes(self.device_memory)} on the device"
        files = f"{self.files:,} Parquet files in {self.shards:,} shards"
        size = f"{_about(self.bytes, human_bytes)} ({self.image_format}), {human_bytes(self.free_bytes)} free"
        if self.bytes is not None:
            files += f", about {human_bytes(self.bytes / self.files)} each"
        if self.at_once is not None and is_address(self.output):
            size += f" in {self.disk}, where about {human_bytes(self.at_once)} are needed at a time"
        facts = {
            "source images": f"{count(self.source_images)} ({splits}), {width}x{height} {self.mode}",
            "variants": f"{len(self.variants)}: {', '.join(self.variants)}",
            "rows": count(self.rows),
            "files": files,
            "bytes": size,
            "time": f"{_about(self.seconds, duration)} on {self.device}, {_rate(self.images_per_second)} images/s",
            "processes": f"{self.processes}{', measured with one' if self.processes > 1 else ''}",
            "memory": f"{memory}, at its peak",
            "measured": f"on {self.measured_images:,} images, after {self.start_seconds:.1f} s to open and to start",
            "batch": f"{self.batch_size}",
            "output": f"{self.output} (run {self.run_id})",
        }
        return {"": [*facts], " ": [*facts.values()]}


def plan_run(config: Config) -> PlannedRun:
    """Say what a run would take, measured on some rows of it.

    Raises:
        ConfigError: as `open_run`.
        PipelineError: as `calibrate`.
    """
    folder = OutputFolder(config.output.path)
    began = time.perf_counter()
    run = open_run(config)
    opening = time.perf_counter() - began
    for line in describe_run(run):
        logger.info("%s", line)
    logger.info("Measuring on some batches.")
    seen, images, shards = calibrate(run), run.plan.total, run.plan.shards
    processes = share_machine(run, shards)
    files = len(shards) * len(run.stored)
    size = None if images is None else int(images * seen.row_bytes + files * seen.file_bytes)
    disk = folder.store.disk
    free = free_bytes(disk.resolve())
    warnings = hub_warnings(run.plan, len(run.stored), size)
    needed = None
    if size is not None and images:
        needed = int(size * sum(shard.rows or 0 for shard in in_flight(folder, shards, processes.count)) / images)
        if needed > free:
            warnings.append(f"{disk} has {human_bytes(free)} free, and about {human_bytes(needed)} are needed.")
    _, height, width = run.reader.shape
    return PlannedRun(
        source_images=images,
        splits=dict(planned(run.plan)),
        image_size=(width, height),
        mode=run.config.preprocess.mode,
        variants=[variant.subset for variant in run.variants],
        rows=None if images is None else images * len(run.stored),
        files=files,
        shards=len(shards),
        bytes=size,
        image_format=run.image_format,
        disk=str(disk),
        at_once=needed,
        free_bytes=free,
        seconds=None if images is None else opening + seen.start + images * seen.seconds,
        start_seconds=opening + seen.start,
        images_per_second=1 / seen.seconds,
        measured_images=seen.images,
        device=run.device.type,
        processes=processes.count,
        memory=seen.memory * processes.count,
        device_memory=None if seen.device_memory is None else seen.device_memory * processes.on_each_device,
        batch_size=run.plan.batch_size,
        output=folder.root,
        run_id=run.run_id,
        warnings=warnings,
    )


def _about(number: float | None, form: Callable[[float], str]) -> str:
    return "unknown" if number is None else f"about {form(number)}"


def _rate(per_second: float) -> str:
    """Images a second, with a decimal where that is much of it."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def hub_warnings(plan: Plan, subsets: int, size: float | None) -> list[str]:
    """What the Hub would not take of a dataset with a folder for each subset, and the setting that helps.

    `size` are the bytes of all files, None where that is not known.
    """
    shards, splits = len(plan.shards), planned(plan)
    folder, repository = shards > HUB_FOLDER_FILES, shards * subsets > HUB_REPOSITORY_FILES - HUB_OTHER_FILES
    if not folder and not repository:
        return []
    over = [f"{shards:,} files in a folder (the Hub takes {HUB_FOLDER_FILES:,})"] * folder
    over += [f"{shards * subsets:,} in a repository (it takes under {HUB_REPOSITORY_FILES:,})"] * repository
    if plan.shards[0].file is not None or size is None:
        return [f"source.streaming: {' and '.join(over)}; a streamed source's files are the shards: take one of fewer."]
    # Each split may end with a short shard.
    most = min(HUB_FOLDER_FILES, (HUB_REPOSITORY_FILES - HUB_OTHER_FILES) // subsets) - len(splits)
    enough = -(-len(plan) // most)
    enough = -(-enough // 1024) * 1024
    each = human_bytes(size * enough / len(plan) / subsets)
    return [f"output.images_per_shard: {' and '.join(over)}; {enough} would do, with files of about {each}."]
