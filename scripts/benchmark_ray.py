"""What the Ray executor costs beside the local one, on the cores of this machine, once its workers are warm.

    python scripts/benchmark_ray.py cifar10.yaml --images 20000 --json out/ray.json

Every case opens the run, writes the first shards so that each worker has loaded the victim, and is timed while it
writes all others: the local executor, then Ray with 1 worker and with 2, who share this machine's cores out. Each runs
in a process of its own with a cluster of its own, once a round, and each round starts with another one. What was
written must be equal, byte for byte.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark import machine, rotated

from pipeline.config.load import load_config

LOCAL = 0
# Of the whole: left out of the timing, so that two workers have each written one.
WARM_SHARDS = 2


def measure(workers: int, arguments: argparse.Namespace, images_per_shard: int, output: str, sender: Any) -> None:
    """The body of a process: time one case.

    Args:
        workers: of Ray, or `LOCAL`.
        arguments: of the command line.
        images_per_shard: the size of a shard.
        output: the folder to write to.
        sender: takes the images that were timed, the seconds, and a digest of all that was written.
    """
    import functools
    from collections import deque
    from dataclasses import replace

    from pipeline.engine.job import Job
    from pipeline.engine.processes import Processes
    from pipeline.executors.base import Executor, Work
    from pipeline.executors.local import LocalExecutor
    from pipeline.executors.ray import RayExecutor
    from pipeline.output.folder import OutputFolder, committed

    logging.basicConfig(format=f"{workers or 'local'}: %(message)s", level=logging.INFO)
    overrides = [f"output.images_per_shard={images_per_shard}", *arguments.overrides]
    if workers:
        overrides.append(f"runtime.ray.workers={workers}")
    config = load_config(arguments.config, overrides, output=output, limit=arguments.images)
    folder = OutputFolder(Path(config.output.path))
    kind: type[Executor] = RayExecutor if workers else LocalExecutor
    with kind(config.runtime) as executor:
        job = Job(config, str(Path(folder.root).absolute()), None, 0)
        opened, _ = executor.call(job.open)
        job, shards = replace(job, recorded=opened), opened.plan.shards
        work = Work(
            here=functools.partial(job.write, folder=folder, done=[]),
            elsewhere=job.write,
            tell=lambda *_: None,
            processes=Processes(),
        )
        if len(shards) < 2 * WARM_SHARDS:
            raise SystemExit(f"{len(shards)} shards are too few to time; give more --images, or fewer a shard.")
        with folder.store.held():
            deque(executor.run(shards[:WARM_SHARDS], work), maxlen=0)
            began = time.monotonic()
            deque(executor.run(shards[WARM_SHARDS:], work), maxlen=0)
            seconds = time.monotonic() - began
    written = committed(folder, opened.edition, shards)
    digest = hashlib.sha256("".join(file.sha256 for name in sorted(written) for file in written[name].files).encode())
    sender.send((sum(map(len, shards[WARM_SHARDS:])), seconds, digest.hexdigest()))


def run(workers: int, arguments: argparse.Namespace, images_per_shard: int) -> tuple[int, float, str]:
    """Time one case in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        process = context.Process(
            target=measure, args=(workers, arguments, images_per_shard, f"{folder}/output", sender)
        )
        process.start()
        sender.close()
        try:
            images, seconds, digest = receiver.recv()
        except EOFError:
            raise SystemExit(f"The case {name(workers)} failed.") from None
        finally:
            process.join()
    return images, seconds, digest


def name(workers: int) -> str:
    """A case, for a person."""
    return f"ray, {workers} worker{'s' * (workers > 1)}" if workers else "local"


def table(seconds: dict[int, list[float]], images: int) -> str:
    """The medians side by side, as Markdown; the overhead is of wall time over the local executor's."""
    local = statistics.median(seconds[LOCAL])
    lines = ["| | seconds | images/s | overhead |", "|---|---|---|---|"]
    for case, rounds in seconds.items():
        wall = statistics.median(rounds)
        overhead = "" if case == LOCAL else f"{wall / local - 1:+.1%}"
        lines.append(f"| {name(case)} | {wall:.1f} | {images / wall:.0f} | {overhead} |")
    return "\n".join(lines)


def measure_all(arguments: argparse.Namespace, images_per_shard: int) -> dict[str, Any]:
    """Time all cases in turns with shards of one size, print the table, and return the numbers."""
    cases = [LOCAL, *arguments.workers]
    seconds: dict[int, list[float]] = {case: [] for case in cases}
    loads: dict[int, list[float]] = {case: [] for case in cases}
    digests = set()
    for turn in range(arguments.rounds):
        for case in rotated(cases, turn):
            loads[case].append(round(os.getloadavg()[0], 1))
            images, wall, digest = run(case, arguments, images_per_shard)
            seconds[case].append(wall)
            digests.add(digest)
            print(f"{name(case)}: {wall:.1f} s, load average before {loads[case][-1]}", flush=True)
    print(table(seconds, images))
    if len(digests) > 1:
        raise SystemExit("The executors wrote different bytes.")
    return {
        "images": images,
        "images_per_shard": images_per_shard,
        "seconds": {name(case): seconds[case] for case in cases},
        "load_before": {name(case): loads[case] for case in cases},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, print the table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, help="the first N of the source [all]")
    parser.add_argument("--images-per-shard", type=int, nargs="+", default=[4096], help="each is measured")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scratch", help="a folder for what is written, and removed again")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    runs = [measure_all(arguments, size) for size in arguments.images_per_shard]
    if arguments.json:
        figures = {"command": shlex.join(sys.argv), "machine": machine(), "runs": runs}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
