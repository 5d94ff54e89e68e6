"""What scripts/gpu_check.sh needs for its steps, and the file that it writes after each of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

# Of what a step said: enough for the failures of a test, or for the benchmark's tables.
LOG_LINES = 80
TIMED_OUT = (124, 137)

app = typer.Typer(add_completion=False)


@app.command()
def prepare(
    scratch: Path,
    workload: Annotated[str, typer.Option()],
    variant: Annotated[str, typer.Option()],
    batch_size: Annotated[int, typer.Option()],
    images: Annotated[int, typer.Option()],
    contender: Annotated[list[str], typer.Option()],
) -> None:
    """Write the machine, and a workload as a config and its source; fail at once where a package is missing."""
    # They take seconds to import, which the report, written after each step, does without.
    from benchmark import Bench, Case, check_installed, machine
    from workloads import WORKLOADS, encoded_images, write_source

    check_installed(contender)
    (scratch / "machine.json").write_text(json.dumps(machine()))
    work = replace(WORKLOADS[workload], batch_size=batch_size)
    bench = Bench(work, None, scratch)
    write_source(encoded_images(work, None, None), images, bench.source)
    config = bench.config(Case("ours", variant, work.levels, images), scratch / "output")
    (scratch / "workload.json").write_text(json.dumps(config))


@app.command()
def report(scratch: Path, target: Path) -> None:
    """Write what is known by now."""
    steps: dict[str, dict[str, Any]] = {}
    for line in (scratch / "steps").read_text().splitlines():
        name, ended, seconds, limit = line.split()
        log = (scratch / f"{name}.log").read_text(errors="replace").splitlines()
        steps[name] = {
            "status": status_of(ended),
            "seconds": int(seconds),
            "limit_seconds": int(limit),
            "log": log[-LOG_LINES:],
        }
    result = {
        "machine": _read(scratch / "machine.json"),
        # Not where all was interrupted.
        "complete": "benchmark" in steps,
        "not_passed": [name for name, step in steps.items() if step["status"] != "passed"],
        # "9 skipped" where there is no GPU.
        "tests": (steps["tests"]["log"] or [None])[-1] if "tests" in steps else None,
        "bytes_equal": {
            name.removesuffix("-equal"): step["status"] == "passed"
            for name, step in steps.items()
            if name.endswith("-equal")
        },
        "steps": steps,
        "benchmark": _read(scratch / "benchmark.json"),
    }
    target.write_text(json.dumps(result, indent=2) + "\n")


def status_of(ended: str) -> str:
    """How a step ended, of its exit code as `timeout` gives it; none where there was no time left for it."""
    if not ended.isdigit():
        return "not reached"
    return "passed" if ended == "0" else "timed out" if int(ended) in TIMED_OUT else f"failed with {ended}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # not there yet, or its step was stopped while it was written
        return None


if __name__ == "__main__":
    app()
