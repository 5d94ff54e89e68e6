"""Measure the pipeline beside its peers and beside what the model alone allows, in one run.

    pip install -e '.[bench]'
    python scripts/benchmark.py --workload cifar --json out/benchmark.json

Every contender runs in a process of its own, once a round, and each round starts with another one, so that what else
the machine does hits all alike. Reported are medians over the rounds, and the spread of the rates.

- A steady rate is that of the last two thirds of the images, between commits (ours) or batches (the others). What
  the whole takes longer than that is the start-up, and a compilation is told apart from it. The first that computes in
  some way compiles with an empty cache, which the others, such as the bound, then find.
- Memory is the peak of the proportional set sizes (PSS) of all its processes, so that what workers share counts once.
- `others` is how many cores the machine spent on something else meanwhile. Contenders suffer from it
  unequally: figures count on an idle machine only.
- Bytes are those of the Parquet files, for each source image.

Contenders: `ours`, as its user runs it, in each variant; `bound`, its engine with batches in memory and nothing decoded
or stored; `plain`, the model work alone in ordinary PyTorch; and torchattacks, foolbox and art as their users run them
(scripts/peers.py).
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psutil
import torch
import typer
from workloads import ROOT, WORKLOADS, Workload, encoded_images, write_source

from pipeline.core.cores import available_cores

PEERS = ("torchattacks", "foolbox", "art")
CONTENDERS = ("ours", "bound", "plain", *PEERS)
OURS = ("fgsm-pipeline", "torch", "torchvision", "datasets", "pyarrow", "pillow", "imagecodecs", "numpy")
PACKAGES = (*OURS, "torchattacks", "foolbox", "adversarial-robustness-toolbox")
# The grey levels of --epsilon-cost, by how many there are.
COST_LEVELS = {1: (1,), 2: (1, 2), 4: (1, 2, 4, 8), 8: (1, 2, 4, 8, 12, 16, 24, 32)}
# Commits of one run of ours: the first and the last bound the steady part.
SHARDS = 32
SAMPLE_SECONDS = 0.25
# Looking at the memory takes some 15 ms for a gigabyte: at most 2% of one core goes into it.
SAMPLE_SHARE = 0.02

Marks = Sequence[tuple[float, int]]
Row = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Variant:
    """How ours computes and stores."""

    precision: str
    compile: bool
    layout: str = "images"


COMPUTED = {
    "eager": Variant("fp32", False),
    "compiled": Variant("fp32", True),
    "tf32": Variant("tf32", True),
    "bf16": Variant("bf16", True),
    "bf16-eager": Variant("bf16", False),
}
SIGNS = "-signs"
VARIANTS = COMPUTED | {f"{name}{SIGNS}": replace(variant, layout="signs") for name, variant in COMPUTED.items()}


@dataclass(frozen=True)
class Case:
    """One contender under one setting; the peers know only the variant `eager`, and ours alone how many processes."""

    contender: str
    variant: str
    levels: tuple[int, ...]
    images: int
    processes: int | None = None

    @property
    def name(self) -> str:
        return case_name(self.contender, self.variant, self.processes)


@dataclass(frozen=True)
class Measurement:
    """One round of a case; None where it has no such thing."""

    images_per_s: float
    startup_s: float
    compile_s: float | None
    bytes_per_image: float | None
    peak_memory: float | None
    peak_gpu_memory: float | None
    others_cores: float | None
    busy: dict[str, float]


def case_name(contender: str, variant: str, processes: int | None) -> str:
    """What a case is called; `processes` is None where ours decides."""
    if contender not in ("ours", "bound"):
        return contender
    return f"{contender} {variant}" + (f" x{processes}" if processes else "")


class BenchmarkError(Exception):
    """A contender failed, or cannot run."""


# --------------------------------------------------------------------------------------------- arithmetic


def steady(marks: Marks, launched: float) -> tuple[float, float]:
    """The steady rate, and the start-up before it.

    Args:
        marks: (time, images finished by then), rising.
        launched: when the process was started.

    Returns:
        Images a second of the last two thirds, when all processes work, and the seconds that starting took.
    """
    if len(marks) < 2:
        raise BenchmarkError("A steady rate needs at least two batches; give more images.")
    end, last = marks[-1]
    # Of two, the first one.
    begin, first = next(mark for mark in marks if mark[1] >= last / 3)
    rate = (last - first) / (end - begin)
    return rate, max(0.0, begin - launched - first / rate)


def images_per_shard(images: int, batch_size: int) -> int:
    """Whole batches, so that nothing is padded, and at least `SHARDS` shards where there are as many batches."""
    return max(1, images // SHARDS // batch_size) * batch_size


def rotated(cases: Sequence[Item], turn: int) -> list[Item]:
    """The cases of one round, beginning with another one than the round before."""
    start = turn % len(cases)
    return [*cases[start:], *cases[:start]]


def fit_line(points: Mapping[int, float]) -> tuple[float, float]:
    """Least squares: the slope and the intercept of y against x."""
    line = statistics.linear_regression(list(points), list(points.values()))
    return line.slope, line.intercept


def break_even(compile_s: float, eager: float, compiled: float) -> float | None:
    """From how many images on a compilation repays itself, at two rates; None where it never does."""
    saved = 1 / eager - 1 / compiled
    return compile_s / saved if saved > 0 else None


def median(rounds: Sequence[Measurement], field: str) -> float | None:
    """The median of one field over the rounds that have it."""
    values = [getattr(one, field) for one in rounds if getattr(one, field) is not None]
    return statistics.median(values) if values else None


def summarise(case: Case, rounds: Sequence[Measurement]) -> Row:
    """The rounds of a case in one row of the JSON file."""
    rates = [one.images_per_s for one in rounds]
    rate = statistics.median(rates)
    stages = rounds[0].busy
    return {
        **asdict(case),
        "name": case.name,
        "images_per_s": rate,
        "slowest": min(rates),
        "fastest": max(rates),
        "adversarial_images_per_s": rate * len(case.levels),
        "startup_s": median(rounds, "startup_s"),
        # Later rounds find a cache.
        "compile_s": rounds[0].compile_s,
        **{
            field: median(rounds, field)
            for field in ("bytes_per_image", "peak_memory", "peak_gpu_memory", "others_cores")
        },
        "busy": {stage: statistics.median(one.busy.get(stage, 0.0) for one in rounds) for stage in stages},
        "rounds": [asdict(one) for one in rounds],
    }


def compare(rows: Sequence[Row]) -> list[Row]:
    """Add to each row of ours its share of the bound, its ratio to each peer, and what repays a compilation."""
    named = {row["name"]: row for row in rows}
    return [row | _comparisons(row, named) if row["contender"] == "ours" else row for row in rows]


def _comparisons(row: Row, named: Mapping[str, Row]) -> Row:
    rate, name, processes = row["images_per_s"], row["variant"], row["processes"]
    variant = VARIANTS[name]
    bound = named.get(f"bound {name.removesuffix(SIGNS)}")
    uncompiled = named.get(case_name("ours", variant_name(replace(variant, compile=False)) or "", processes))
    stored = [case_name("ours", name.removesuffix(SIGNS), processes), *PEERS] if name.endswith(SIGNS) else PEERS
    repaid = None
    if variant.compile and uncompiled and row["compile_s"] is not None:
        repaid = break_even(cold_compile_s(row, named.values()), uncompiled["images_per_s"], rate)
    return {
        "share_of_bound": rate / bound["images_per_s"] if bound else None,
        "ratio_to": {peer: rate / named[peer]["images_per_s"] for peer in PEERS if peer in named},
        "bytes_share_of": {
            other: row["bytes_per_image"] / named[other]["bytes_per_image"] for other in stored if other in named
        },
        "break_even_images": repaid,
    }


def cold_compile_s(row: Row, rows: Iterable[Row]) -> float:
    """What compiling took with an empty cache: the longest of all that compute as a row does."""
    computed = row["variant"].removesuffix(SIGNS)
    return max(one["compile_s"] or 0.0 for one in rows if one["variant"].removesuffix(SIGNS) == computed)


def variant_name(wanted: Variant) -> str | None:
    """What a variant is called, None where it has no name."""
    return next((name for name, variant in VARIANTS.items() if variant == wanted), None)


# ---------------------------------------------------------------------------------------------- measuring


def gpu_memory() -> int | None:
    """Bytes in use on the GPU, by anyone; None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def busy_cores() -> tuple[float, float]:
    """Seconds of a core that the machine has spent on anything, and those spent on processes that this one started."""
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = 0.0
    with contextlib.suppress(OSError):
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
        # Time that the hypervisor stole is somebody else's too.
        total = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return total, own.ru_utime + own.ru_stime


@dataclass(frozen=True)
class Watched:
    """What was seen of a process; None where it cannot be.

    memory, gpu: the most bytes; others: cores that the machine spent on something else meanwhile.
    """

    memory: int | None
    gpu: int | None
    others: float | None


def watch(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Watched:
    """Run a command to its end, and look at its memory now and then.

    Raises:
        BenchmarkError: it failed; the message holds the end of what it said.
    """
    memory = gpu = 0
    gpu_before, (total_before, own_before), started = gpu_memory(), busy_cores(), time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            wait = SAMPLE_SECONDS
            while _runs(process, wait):
                began = time.perf_counter()
                memory = max(memory, resident_bytes(process.pid))
                gpu = max(gpu, (gpu_memory() or 0) - (gpu_before or 0))
                wait = max(SAMPLE_SECONDS, (time.perf_counter() - began) / SAMPLE_SHARE)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise BenchmarkError(f"{shlex.join(command)} ended with {process.returncode}:\n{last}")
    total, own = busy_cores()
    others = max(0.0, (total - total_before) - (own - own_before)) / (time.monotonic() - started)
    return Watched(memory or None, gpu if gpu_before is not None else None, others if total else None)


def resident_bytes(pid: int) -> int:
    """Bytes that a process and all below it have resident; on Linux, without counting twice what they share."""
    found = 0
    with contextlib.suppress(psutil.Error):  # it ended meanwhile
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = one.memory_full_info()
                found += getattr(memory, "pss", memory.uss)
    return found


def _runs(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


class Bench:
    """One workload's source, and a scratch folder in which its cases run."""

    def __init__(self, workload: Workload, weights: Path | None, folder: Path) -> None:
        self.workload, self.weights, self.folder = workload, weights, folder
        self.source = folder / "source"

    def config(self, case: Case, output: Path) -> dict[str, Any]:
        """The config of a case: what our user would write, and the others read the same from."""
        work, variant = self.workload, VARIANTS[case.variant]
        weights = {"weights": str(self.weights.resolve())} if self.weights else {}
        model = {**work.model, **weights}
        models = {"models": {"resnet20": model, **work.more_models}} if work.more_models else {"model": model}
        return {
            **models,
            "source": {
                "kind": "huggingface",
                "path": str(self.source),
                "split": "test",
                "label_column": "label",
                "limit": case.images,
            },
            "preprocess": work.preprocess,
            "attack": {"epsilons": [f"{level}/255" for level in case.levels]},
            "output": {
                "path": str(output),
                "layout": variant.layout,
                "images_per_shard": images_per_shard(case.images, work.batch_size),
            },
            "runtime": {
                "batch_size": work.batch_size,
                "precision": variant.precision,
                "compile": variant.compile,
                "processes": case.processes or "auto",
            },
        }

    def measure(self, case: Case) -> Measurement:
        """Run a case once.

        Raises:
            BenchmarkError: it failed.
        """
        output, config, marks = (self.folder / name for name in ("output", "config.yaml", "marks.json"))
        config.write_text(json.dumps(self.config(case, output)))  # YAML without aliases
        if case.contender == "ours":
            command = ["-m", "pipeline", "generate", str(config), "--overwrite", "--output", str(output)]
        else:
            script = str(ROOT / "scripts/peers.py")
            command = [script, case.contender, str(config), str(case.images), str(marks)]
        log = self.folder / "log"
        launched = time.time()
        watched = watch([sys.executable, *command], self._environment(case), log)
        seen = receipt_marks(output) if case.contender == "ours" else json.loads(marks.read_text())
        rate, startup = steady(seen, launched)
        said = log.read_text()
        compiled = re.search(r"Compiled the models in ([\d.]+) s", said)
        busy = re.search(r"Busy: (.*)", said)
        stored = sum(file.stat().st_size for file in output.glob("**/*.parquet"))
        shutil.rmtree(output, ignore_errors=True)
        compile_s = float(compiled[1]) if compiled else None
        return Measurement(
            images_per_s=rate,
            startup_s=max(0.0, startup - (compile_s or 0.0)),
            compile_s=compile_s,
            bytes_per_image=stored / case.images if stored else None,
            peak_memory=watched.memory,
            peak_gpu_memory=watched.gpu,
            others_cores=watched.others,
            busy={stage: float(share) for stage, share in re.findall(r"(\w+) (\d+)%", busy[1] if busy else "")},
        )

    def _environment(self, case: Case) -> dict[str, str]:
        environment = dict(os.environ)
        # As on any user's machine: without bytecode every start would compile torch anew.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # This checkout, whatever is installed.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        environment["HF_DATASETS_CACHE"] = str(self.folder / "datasets")
        # Empty at first, so that a cold compilation is seen. Whoever computes the same later finds it.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "inductor" / case.variant.removesuffix(SIGNS))
        return environment


def receipt_marks(output: Path) -> Marks:
    """When how many images were committed: a receipt is what makes a shard true, and is written last."""
    receipts = (output / ".run/receipts").glob("*.json")
    commits = sorted((file.stat().st_mtime, int(json.loads(file.read_text())["planned"])) for file in receipts)
    marks, images = [], 0
    for moment, planned in commits:
        images += planned
        marks.append((moment, images))
    return marks


def run_rounds(
    cases: Sequence[Case], rounds: int, measure: Callable[[Case], Measurement]
) -> Iterator[dict[Case, list[Measurement]]]:
    """All cases once a round, in rotation; what is known after each case."""
    known: dict[Case, list[Measurement]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in rotated(cases, turn):
            began = time.monotonic()
            known[case].append(measure(case))
            rate, seconds = known[case][-1].images_per_s, time.monotonic() - began
            size = f"K={len(case.levels)}, {case.images:,} images"
            typer.echo(f"round {turn + 1}: {case.name}, {size}: {rate:.1f} images/s ({seconds:.0f} s)", err=True)
            yield known


def list_cases(
    workload: Workload, contenders: Sequence[str], variants: Sequence[str], processes: Sequence[int]
) -> list[Case]:
    """Who runs on a workload: ours in each variant and in each number of processes, or in as many as it decides; a
    bound for each way to compute; and the others once.

    Of several models the others make no dataset.
    """
    contenders = [name for name in contenders if name in ("ours", "bound") or not workload.more_models]
    computed = dict.fromkeys(variant.removesuffix(SIGNS) for variant in variants)
    named = {"ours": variants, "bound": list(computed)}
    counts: tuple[Sequence[int | None], ...] = ([None], processes or [None])
    # The bound is as fast as ours, and in memory from its first image on.
    sizes = {"ours": workload.images, "bound": min(workload.images, 3 * workload.peer_images)}
    return [
        Case(contender, variant, workload.levels, sizes.get(contender, workload.peer_images), count)
        for contender in contenders
        for variant in named.get(contender, ["eager"])
        for count in counts[contender == "ours"]
    ]


def list_cost_cases(workload: Workload, contenders: Sequence[str]) -> list[Case]:
    """Ours eager and the peers at 1 to 8 epsilons, on fewer images."""
    ours, peers = (
        max(workload.images // 4, SHARDS * workload.batch_size),
        max(workload.peer_images // 2, 3 * workload.batch_size),
    )
    sizes = {"ours": min(ours, workload.images), **dict.fromkeys(PEERS, min(peers, workload.peer_images))}
    return [
        Case(contender, "eager", levels, sizes[contender])
        for levels in COST_LEVELS.values()
        for contender in contenders
        if contender in sizes
    ]


# ---------------------------------------------------------------------------------------------- reporting


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def shown(value: float | None, form: str) -> str:
    """A number in a form such as `{:.1f} s`, a dash where there is none."""
    return "-" if value is None else form.format(value)


def main_table(rows: Sequence[Row]) -> str:
    """What each contender does, a line each."""
    peers = [peer for peer in PEERS if any(row["name"] == peer for row in rows)]
    gpu = any(row["peak_gpu_memory"] is not None for row in rows)
    header = ["contender", "images/s", "min..max", "adv. images/s", "of bound"]
    header += [f"x {peer}" for peer in peers] + ["bytes/image", "peak memory"] + ["GPU memory"] * gpu
    header += ["start-up", "compile", "others"]
    lines = []
    for row in rows:
        line = [row["name"], f"{row['images_per_s']:.1f}", f"{row['slowest']:.1f}..{row['fastest']:.1f}"]
        line += [f"{row['adversarial_images_per_s']:.1f}", shown(row.get("share_of_bound"), "{:.0%}")]
        line += [shown(row.get("ratio_to", {}).get(peer), "{:.2f}") for peer in peers]
        line += [shown(row["bytes_per_image"], "{:,.0f}"), _megabytes(row["peak_memory"])]
        line += [_megabytes(row["peak_gpu_memory"])] * gpu
        line += [shown(row["startup_s"], "{:.1f} s"), shown(row["compile_s"], "{:.1f} s")]
        line += [shown(row["others_cores"], "{:.1f} cores")]
        lines.append(line)
    return table(header, lines)


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f} MB"


def stage_table(rows: Sequence[Row]) -> str:
    """How busy each stage of ours was; empty where it did not say."""
    busy = {row["name"]: row["busy"] for row in rows if row["busy"]}
    if not busy:
        return ""
    stages = list(dict.fromkeys(stage for shares in busy.values() for stage in shares))
    lines = [[name, *(shown(shares.get(stage), "{:.0f}%") for stage in stages)] for name, shares in busy.items()]
    return table(["busy", *stages], lines)


def remarks(rows: Sequence[Row]) -> list[str]:
    """What else follows: from when on a compilation pays, and what the layout signs saves."""
    said = []
    for row in rows:
        if row.get("break_even_images") is not None:
            said.append(
                f"{row['name']}: its compilation of {cold_compile_s(row, rows):.1f} s repays itself from "
                f"{row['break_even_images']:,.0f} images on."
            )
        if row["variant"].endswith(SIGNS) and row.get("bytes_share_of"):
            shares = ", ".join(f"{share:.3f} of {other}" for other, share in row["bytes_share_of"].items())
            said.append(f"{row['name']}: bytes per image {shares}.")
    return said


def fit_cost(rows: Sequence[Row]) -> list[Row]:
    """Milliseconds per image against K, a line fitted for each contender."""
    fitted = []
    for name in dict.fromkeys(row["name"] for row in rows):
        points = {len(row["levels"]): 1000 / row["images_per_s"] for row in rows if row["name"] == name}
        slope, intercept = fit_line(points)
        fitted.append({"name": name, "ms_per_image": points, "slope_ms": slope, "intercept_ms": intercept})
    return fitted


def cost_table(fitted: Sequence[Row]) -> str:
    """The cost of epsilons, a line for each contender."""
    header = ["ms per image", *(f"K={count}" for count in COST_LEVELS), "intercept", "per epsilon"]
    lines = [
        [
            row["name"],
            *(f"{value:.2f}" for value in (*row["ms_per_image"].values(), row["intercept_ms"], row["slope_ms"])),
        ]
        for row in fitted
    ]
    return table(header, lines)


def describe(report: Row) -> str:
    """A workload's results, for a person."""
    rows = report["contenders"]
    parts = [report["title"], main_table(rows), stage_table(rows), "\n".join(remarks(rows))]
    if report["epsilon_cost"]:
        parts.append(cost_table(report["epsilon_cost"]))
    return "\n\n".join(part for part in parts if part)


def machine() -> Row:
    """What was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        model = next(iter(re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)), model)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": model,
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "commit": commit(),
        "versions": versions,
    }


def commit() -> str | None:
    """What is measured, as `git describe` names it, with `-dirty` where files were changed; None without git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return None


# ------------------------------------------------------------------------------------------- command line


def check_choice(option: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Refuse what an option does not know."""
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"{name} is none of {', '.join(known)}.", param_hint=option)


def check_installed(contenders: Sequence[str]) -> None:
    """Refuse peers that are not there, before anything is measured."""
    for peer in PEERS:
        if peer in contenders and importlib.util.find_spec(peer) is None:
            raise BenchmarkError(
                f"{peer} is not installed; it comes with pip install -e '.[bench]', "
                "or leave it out by naming the others with --contender."
            )


def sized(workload: Workload, limit: int | None, peer_images: int | None, batch_size: int | None) -> Workload:
    """A workload with the numbers of the command line; the others run on no more images than ours."""
    images = limit or workload.images
    peers = min(peer_images or workload.peer_images, images)
    return replace(workload, images=images, peer_images=peers, batch_size=batch_size or workload.batch_size)


def default_variants(workload: Workload) -> list[str]:
    """In float32 without and with compilation, in bf16, and the layout that costs one image for all epsilons."""
    return ["eager", "compiled", "bf16", *([f"eager{SIGNS}"] if workload.photographs else [])]


def run_workload(bench: Bench, cases: Sequence[Case], cost_cases: Sequence[Case], rounds: int) -> Iterator[Row]:
    """A workload's report after each case, so that nothing is lost where a later one fails or all is stopped."""
    work = bench.workload
    title = f"{work.name}: {work.title}; K={len(work.levels)}; {work.images:,} images (peers {work.peer_images:,})"
    for known in run_rounds([*cases, *cost_cases], rounds, bench.measure):
        done = min(map(len, known.values()))
        yield {
            "workload": work.name,
            "title": f"{title}; batch {work.batch_size}; rounds: {done}",
            "contenders": compare([summarise(case, known[case]) for case in cases if known[case]]),
            # A line needs all of its points.
            "epsilon_cost": fit_cost([summarise(case, known[case]) for case in cost_cases]) if done else [],
        }


def main(
    workload: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(WORKLOADS)} (default: cifar); may be repeated.")
    ] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(CONTENDERS)} (default: all); may be repeated.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of ours: {', '.join(VARIANTS)} (default: eager, compiled, bf16; at 224 px also eager-signs); "
            "may be repeated."
        ),
    ] = None,
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="Of ours (default: as it decides); may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender runs.")] = 3,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Images for ours, its bound, and at most the others.")
    ] = None,
    peer_images: Annotated[int | None, typer.Option(min=1, help="Images for the others.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images of a batch.")] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Images for cifar, a folder of Parquet (else synthetic).")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for cifar, a checkpoint (else untrained).")] = None,
    images: Annotated[Path | None, typer.Option(help="Class folders of JPEGs for 224 px (else synthetic).")] = None,
    epsilon_cost: Annotated[bool, typer.Option("--epsilon-cost", help="Also measure at 1 to 8 epsilons.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Measure ours, its bound and its peers side by side."""
    works, contenders = workload or ["cifar"], contender or list(CONTENDERS)
    check_choice("--workload", works, list(WORKLOADS))
    check_choice("--contender", contenders, CONTENDERS)
    check_choice("--variant", variant or [], list(VARIANTS))
    report: Row = {"command": shlex.join(sys.argv), "machine": machine(), "workloads": []}
    try:
        check_installed(contenders)
        for name in works:
            work = sized(WORKLOADS[name], limit, peer_images, batch_size)
            cases = list_cases(work, contenders, variant or default_variants(work), processes or [])
            cost_cases = list_cost_cases(work, contenders) if epsilon_cost else []
            with tempfile.TemporaryDirectory(prefix="fgsm-benchmark-") as scratch:
                bench = Bench(work, weights if name == "cifar" else None, Path(scratch))
                write_source(encoded_images(work, parquet, images), work.images, bench.source)
                report["workloads"].append(None)
                for result in run_workload(bench, cases, cost_cases, rounds):
                    report["workloads"][-1] = result
                    if json_path is not None:
                        json_path.write_text(json.dumps(report, indent=2) + "\n")
            typer.echo(f"{describe(report['workloads'][-1])}\n")
    except (BenchmarkError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
