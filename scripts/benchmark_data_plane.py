"""Measure what a run costs apart from the model: the CPU time that a source image takes in each stage.

    pip install -e '.[bench]'
    python scripts/benchmark_data_plane.py --images FOLDER --parquet FOLDER --json out/data-plane.json

The victim is free: one linear layer on 16x16 averages. Every case runs `generate` in processes of their own, on fewer
and on more images: the difference is what the further images took, and start-up drops out.

- CPU milliseconds are those of all threads of a stage: `load` reads, decodes and resizes, `attack` is the arithmetic of
  attack and victim, `encode`, `write` makes tables and Parquet, `main` hands batches on and scores them. `rest` is what
  the process took beyond these threads. `sum` is all of it.
- `lock`, with `--lock`, is how long Python's interpreter lock was held for an image, whatever the number of cores: its
  inverse bounds what one process can carry. py-spy samples it in two runs of their own, as it slows a run down.
- Memory is the most that the process had resident in the longer run.
- `images/s` are those of the machine, of one core and of all at hand; what 16 cores would carry is a straight line
  through the two: an estimate. `others` is how many cores the machine spent on something else meanwhile: rates count on
  an idle machine only, CPU milliseconds suffer less.
- `floor` is decoding and resizing with Pillow, encoding with imagecodecs or NumPy and writing with pyarrow, alone in
  one thread, of the same images and of attacked ones as the victim's are.
"""

import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from benchmark import COST_LEVELS, busy_cores, check_choice, machine, rotated, table
from numpy.typing import NDArray
from PIL import Image
from workloads import IMAGENET, WORKLOADS, Encoded, encoded_images, write_source

from pipeline.config.load import load_config
from pipeline.core.cores import available_cores
from pipeline.core.images import encode_images
from pipeline.core.lattice import sign_to_picture, step
from pipeline.core.sign_bits import picture_to_bits
from pipeline.flow import generate

LAYOUTS = {
    "images": {"layout": "images"},
    "signs": {"layout": "signs"},
    "bits": {"layout": "signs", "sign_format": "bits"},
    "wide": {"layout": "wide"},
}
# The stage of a thread, by what its name begins with.
THREADS = {"decode": "load", "fetch": "load", "lane": "attack", "encode": "encode", "write": "write"}
STAGES = ("load", "attack", "encode", "write", "main", "rest")
# Images from which a case is measured, and how many more: a multiple of the batch.
SIZES = {32: (2_048, 14_336), 224: (128, 1_024)}
SOURCES = {32: WORKLOADS["cifar"], 224: WORKLOADS["resnet18"]}
CLASSES = {32: 10, 224: 1000}
FLOOR_IMAGES = 512
ESTIMATED_CORES = 16
LOCK_SAMPLES_PER_S = 200

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is run."""

    side: int
    layout: str
    epsilons: int

    @property
    def name(self) -> str:
        return f"{self.side} px {self.layout} K={self.epsilons}"


@dataclass(frozen=True)
class Spent:
    """What one process took: CPU seconds by stage and in all, seconds of the clock, and bytes at its peak."""

    stages: Mapping[str, float]
    cpu: float
    wall: float
    memory: int


@dataclass(frozen=True)
class Measurement:
    """One round of a case: CPU milliseconds a source image by stage and in all, and images a second."""

    stages: Mapping[str, float]
    sum: float
    images_per_s: float
    peak_memory: int
    others_cores: float


# ---------------------------------------------------------------------------------------------- measuring


def spend(config: Mapping[str, Any], cores: int) -> Spent:
    """Generate a dataset with some of the cores; to be called in a process of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    spent = count_threads()
    path = Path(config["output"]["path"]).with_suffix(".yaml")
    path.write_text(json.dumps(config))  # YAML without aliases
    began = time.perf_counter()
    generate(load_config(str(path)))
    wall = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    stages = {**dict.fromkeys(STAGES, 0.0), **spent, "main": time.thread_time()}
    stages["rest"] = cpu - sum(seconds for stage, seconds in stages.items() if stage != "rest")
    return Spent(stages, cpu, wall, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def hold_lock(config: Mapping[str, Any], cores: int) -> float:
    """Seconds for which a run held the interpreter's lock, from samples of all its threads; as `spend`."""
    record = Path(config["output"]["path"]).with_suffix(".lock")
    options = ["--gil", "--nonblocking", "--rate", str(LOCK_SAMPLES_PER_S), "--format", "raw", "--output", str(record)]
    with subprocess.Popen(
        ["py-spy", "record", *options, "--pid", str(os.getpid())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as sampler:
        spend(config, cores)
        sampler.send_signal(signal.SIGINT)
    # A line is a stack and how many samples found it. A name of a function may hold a line's end.
    counts = re.findall(r" (\d+)$", record.read_text(), re.MULTILINE)
    return sum(map(int, counts)) / LOCK_SAMPLES_PER_S


def count_threads() -> dict[str, float]:
    """CPU seconds of the threads that end from now on in this process, by stage."""
    spent, lock, run = dict[str, float](), threading.Lock(), threading.Thread.run

    def counted(thread: threading.Thread) -> None:
        try:
            run(thread)
        finally:
            stage = THREADS.get(thread.name.split("_")[0], "rest")
            with lock:
                spent[stage] = spent.get(stage, 0.0) + time.thread_time()

    threading.Thread.run = counted  # type: ignore[method-assign,assignment]
    return spent


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def difference(few: Spent, more: Spent, images: int, others: float) -> Measurement:
    """What further images took."""
    stages = {stage: 1000 * (more.stages[stage] - few.stages[stage]) / images for stage in STAGES}
    return Measurement(
        stages=stages,
        sum=1000 * (more.cpu - few.cpu) / images,
        images_per_s=images / max(more.wall - few.wall, 1e-9),
        peak_memory=more.memory,
        others_cores=others,
    )


def config_of(case: Case, images: int, source: Path, output: Path) -> Row:
    """The config of a case, as its user would write it."""
    return {
        "model": {
            "kind": "factory",
            "name": "pipeline.models.small_models:free",
            "kwargs": {"classes": CLASSES[case.side]},
            **IMAGENET,
        },
        "source": {
            "kind": "huggingface",
            "path": str(source),
            "split": "test",
            "label_column": "label",
            "limit": images,
        },
        "preprocess": SOURCES[case.side].preprocess,
        "attack": {"epsilons": [f"{level}/255" for level in COST_LEVELS[case.epsilons]]},
        "output": {"path": str(output), **LAYOUTS[case.layout]},
        # One process: the stages are read off its threads.
        "runtime": {"batch_size": SOURCES[case.side].batch_size, "device": "cpu", "compile": False, "processes": 1},
    }


def run_once(case: Case, images: int, source: Path, cores: int, what: Callable[..., Any] = spend) -> Any:
    """What a run of so many images took, by `spend` or `hold_lock`; its dataset is dropped."""
    with tempfile.TemporaryDirectory(prefix="output-", dir=source.parent) as scratch:
        return apart(what, config_of(case, images, source, Path(scratch, "output")), cores)


def measure_lock(case: Case, sizes: tuple[int, int], source: Path, cores: int) -> float:
    """Milliseconds for which the interpreter's lock is held for an image."""
    few, more = (run_once(case, images, source, cores, hold_lock) for images in (sizes[0], sum(sizes)))
    held: float = 1000 * (more - few) / sizes[1]
    return held


def measure(case: Case, sizes: tuple[int, int], source: Path, cores: int) -> Measurement:
    """Run a case once in each of two sizes."""
    began, (total_before, own_before) = time.monotonic(), busy_cores()
    few, more = (run_once(case, images, source, cores) for images in (sizes[0], sum(sizes)))
    total, own = busy_cores()
    others = max(0.0, total - total_before - own + own_before) / (time.monotonic() - began)
    return difference(few, more, sizes[1], others)


# ----------------------------------------------------------------------------------------------- the floor


def floor(case: Case, encoded: Sequence[bytes], output: Path) -> dict[str, float]:
    """CPU milliseconds a source image of the libraries alone, in this thread, by stage."""
    stages = dict[str, float]()

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        function()  # once before, so that it is warm
        began = time.thread_time()
        result = function()
        stages[stage] = 1000 * (time.thread_time() - began) / len(encoded)
        return result

    clean = timed("load", lambda: [decode(data, SOURCES[case.side].preprocess) for data in encoded])
    cells = timed("encode", partial(encode, case, attacked(case, np.stack(clean))))
    timed("write", lambda: pq.write_table(cells, output, compression="none", use_dictionary=False))
    return stages


def decode(data: bytes, preprocess: Mapping[str, int]) -> NDArray[np.uint8]:
    """An image as (H, W, 3) uint8, as `preprocess` says."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if preprocess:
        scale = preprocess["resize"] / min(image.size)
        size = (int(image.width * scale), int(image.height * scale))
        left, top = (round((length - preprocess["crop"]) / 2) for length in size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + preprocess["crop"], top + preprocess["crop"]))
    return np.array(image)


def attacked(case: Case, clean: NDArray[np.uint8]) -> list[Any]:
    """What is stored of images, clean first: (N, C, H, W) uint8, of random signs that are the same in each average."""
    grid = torch.from_numpy(np.random.default_rng(0).choice(np.array([-1, 1], np.int8), (len(clean), 16, 16, 3)))
    cell = case.side // 16
    sign = grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2).permute(0, 3, 1, 2)
    images = torch.from_numpy(clean).permute(0, 3, 1, 2)
    if case.layout in ("signs", "bits"):
        return [images, sign_to_picture(sign)]
    return [images, *(step(images, sign, level) for level in COST_LEVELS[case.epsilons])]


def encode(case: Case, pictures: Sequence[Any]) -> pa.Table:
    """Pictures as columns of encoded bytes."""
    images, bits = (pictures[:1], pictures[1:]) if case.layout == "bits" else (pictures, [])
    columns = [pa.array(encode_images(each, "webp"), pa.binary()) for each in images]
    columns += [picture_to_bits(each.permute(0, 2, 3, 1).numpy()) for each in bits]
    return pa.table(columns, [str(index) for index in range(len(columns))])


# ----------------------------------------------------------------------------------------------- reporting


def summarise(
    case: Case, rounds: Mapping[int, Sequence[Measurement]], alone: Mapping[str, float], lock: float | None = None
) -> Row:
    """The rounds of a case, by the number of cores, its floor and its lock in one row of the JSON file."""
    most = max(rounds)
    own = rounds[most]
    rates = {cores: statistics.median(one.images_per_s for one in found) for cores, found in rounds.items()}
    return {
        **asdict(case),
        "name": case.name,
        "cores": most,
        "ms": {stage: statistics.median(one.stages[stage] for one in own) for stage in STAGES},
        "sum_ms": statistics.median(one.sum for one in own),
        "least_ms": min(one.sum for one in own),
        "most_ms": max(one.sum for one in own),
        "floor_ms": dict(alone),
        "lock_ms": lock,
        "images_per_s": rates,
        "estimated_images_per_s": line_through(rates, ESTIMATED_CORES),
        "peak_memory": max(one.peak_memory for one in own),
        "others_cores": statistics.median(one.others_cores for one in own),
        "rounds": {cores: [asdict(one) for one in found] for cores, found in rounds.items()},
    }


def line_through(rates: Mapping[int, float], cores: int) -> float | None:
    """What so many cores would carry, on a straight line through the rates of one core and of several."""
    if len(rates) < 2:
        return None
    few, more = min(rates), max(rates)
    return rates[few] + (cores - few) * (rates[more] - rates[few]) / (more - few)


def describe(rows: Sequence[Row]) -> str:
    """All cases, for a person."""
    most = max(row["cores"] for row in rows)
    header = ["CPU-ms an image", *STAGES, "sum", "min..max", "floor", "of it load", "encode", "write", "lock"]
    header += ["peak memory", "images/s: 1 core", f"{most} cores", f"{ESTIMATED_CORES}, estimated", "others"]
    lines = []
    for row in rows:
        alone, rates, estimated = row["floor_ms"], row["images_per_s"], row["estimated_images_per_s"]
        line = [row["name"], *(f"{row['ms'][stage]:.2f}" for stage in STAGES)]
        line += [f"{row['sum_ms']:.2f}", f"{row['least_ms']:.2f}..{row['most_ms']:.2f}", f"{sum(alone.values()):.2f}"]
        line += [f"{alone[stage]:.2f}" for stage in ("load", "encode", "write")]
        line += ["-" if row["lock_ms"] is None else f"{row['lock_ms']:.2f}"]
        line += [f"{row['peak_memory'] / 1e6:,.0f} MB", f"{rates[1]:.0f}" if 1 in rates else "-"]
        line += [f"{rates[most]:.0f}", "-" if estimated is None else f"{estimated:.0f}", f"{row['others_cores']:.1f}"]
        lines.append(line)
    return table(header, lines)


# -------------------------------------------------------------------------------------------- command line


def measure_side(
    cases: Sequence[Case],
    sizes: tuple[int, int],
    encoded: Sequence[Encoded],
    rounds: int,
    counts: Sequence[int],
    lock: bool,
) -> list[Row]:
    """All cases of one side, in turns."""
    with tempfile.TemporaryDirectory(prefix="fgsm-data-plane-") as scratch:
        os.environ["HF_DATASETS_CACHE"] = str(Path(scratch, "datasets"))
        source = Path(scratch, "source")
        write_source(encoded, sum(sizes), source)
        # Before all others, as `datasets` prepares the source once.
        run_once(cases[0], sizes[0], source, max(counts))
        known: dict[Case, dict[int, list[Measurement]]] = {case: {cores: [] for cores in counts} for case in cases}
        for turn in range(rounds):
            for case in rotated(cases, turn):
                for cores in counts:
                    one = measure(case, sizes, source, cores)
                    known[case][cores].append(one)
                    typer.echo(f"round {turn + 1}: {case.name}, {cores} cores: {one.sum:.2f} ms", err=True)
        data = [image for image, _ in encoded[:FLOOR_IMAGES]]
        return [
            summarise(
                case,
                known[case],
                apart(floor, case, data, Path(scratch, "floor.parquet")),
                measure_lock(case, sizes, source, max(counts)) if lock else None,
            )
            for case in cases
        ]


def main(
    side: Annotated[list[int] | None, typer.Option(help="32 or 224 px (default: both); may be repeated.")] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(LAYOUTS)} (default: all); may be repeated.")
    ] = None,
    epsilons: Annotated[list[int] | None, typer.Option(help="1, 4 or 8 (default: all); may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each case runs.")] = 3,
    one_core: Annotated[bool, typer.Option(help="Measure on one core too, for the estimate.")] = True,
    lock: Annotated[bool, typer.Option("--lock", help="Measure how long the interpreter's lock is held.")] = False,
    few: Annotated[int | None, typer.Option(min=1, help="Images of the shorter run.")] = None,
    more: Annotated[int | None, typer.Option(min=1, help="Images that the longer run has beyond these.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images of a batch.")] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Images for 32 px, a folder of Parquet (else synthetic).")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Class folders of JPEGs for 224 px (else synthetic).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Measure the CPU time of each stage with a victim that costs nothing."""
    chosen, layouts, counts = side or list(SIZES), layout or list(LAYOUTS), epsilons or [1, 4, 8]
    check_choice("--side", list(map(str, chosen)), list(map(str, SIZES)))
    check_choice("--layout", layouts, list(LAYOUTS))
    check_choice("--epsilons", list(map(str, counts)), list(map(str, COST_LEVELS)))
    if lock and not shutil.which("py-spy"):
        raise typer.BadParameter("needs py-spy, which comes with pip install -e '.[bench]'", param_hint="--lock")
    rows: list[Row] = []
    cores = sorted({1, available_cores()} if one_core else {available_cores()})
    try:
        for pixels in chosen:
            SOURCES[pixels] = replace(SOURCES[pixels], batch_size=batch_size or SOURCES[pixels].batch_size)
            cases = [Case(pixels, name, count) for count in counts for name in layouts]
            sizes = few or SIZES[pixels][0], more or SIZES[pixels][1]
            rows += measure_side(cases, sizes, encoded_images(SOURCES[pixels], parquet, images), rounds, cores, lock)
            if json_path is not None:
                report = {"command": shlex.join(sys.argv), "machine": machine(), "cases": rows}
                json_path.write_text(json.dumps(report, indent=2) + "\n")
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(describe(rows))


if __name__ == "__main__":
    typer.run(main)
