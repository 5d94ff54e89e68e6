"""Measure how soon the command says its first word, and how soon it ends.

    python scripts/benchmark_start.py --json start.json
    python scripts/benchmark_start.py --beside ../before       # another checkout, in turns

Each command runs in a process of its own, once to warm up and then in each round. `first` is the time until it prints
anything, `end` until it has ended; both are medians and suffer from other work on the machine. `cpu` is the time on a
core that the process and its children took, the least of all rounds, and suffers hardly.
"""

import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark import machine, table

from pipeline.core.errors import PipelineError

CHECKOUT = Path(__file__).parent.parent
# {out} is a complete dataset of digits, {new} a folder of its own each time.
COMMANDS = {
    "help": "--help",
    "a wrong key": "generate digits --set attack.epsilom=1/255",
    "generate, no source": "generate imagefolder --set source.path=/no/such/folder --output {new}",
    "plan, no source": "plan imagefolder --set source.path=/no/such/folder --output {new}",
    "verify, no dataset": "verify /no/such/folder",
    "generate": "generate digits --output {new}",
    "generate again": "generate digits --output {out}",
    "inspect": "inspect {out}",
}


@dataclass(frozen=True)
class Run:
    """One run of a command, in seconds."""

    first: float
    end: float
    cpu: float


def measure(arguments: list[str], checkout: Path) -> Run:
    """Run the command of a checkout, and time it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | {"PYTHONPATH": str(checkout)},
        cwd=checkout,
    ) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise PipelineError(f"fgsm {shlex.join(arguments)} says nothing.")
        first = time.perf_counter() - began
        process.stdout.read()
    end, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(first, end, cpu)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each command.")] = 5,
    beside: Annotated[Path | None, typer.Option(help="Another checkout, measured in turns with this one.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(COMMANDS)}; all by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Time the command from its start to its first word and to its end."""
    checkouts = {"this": CHECKOUT} | ({} if beside is None else {"beside": beside.resolve()})
    found: dict[tuple[str, str], list[Run]] = {}
    with tempfile.TemporaryDirectory(prefix="fgsm-start-") as scratch:
        for turn in range(rounds + 1):
            for name in only or COMMANDS:
                for checkout, folder in checkouts.items():
                    paths = {"out": f"{scratch}/{checkout}", "new": f"{scratch}/{checkout}-{turn}"}
                    if "{out}" in COMMANDS[name] and not Path(paths["out"]).exists():
                        # Twice: the second time it notes down what the dataset was made of.
                        for _ in range(2):
                            measure(["generate", "digits", "--output", paths["out"]], folder)
                    run = measure(shlex.split(COMMANDS[name].format(**paths)), folder)
                    if turn:
                        found.setdefault((name, checkout), []).append(run)
    rows: list[dict[str, Any]] = [
        {
            "command": name,
            "checkout": checkout,
            "first_s": round(statistics.median(run.first for run in runs), 2),
            "end_s": round(statistics.median(run.end for run in runs), 2),
            "cpu_s": round(min(run.cpu for run in runs), 2),
        }
        for (name, checkout), runs in found.items()
    ]
    header = ["command", "checkout", "first", "end", "cpu"]
    typer.echo(table(header, [[*map(str, row.values())] for row in rows]))
    if json_path is not None:
        report = {"command": shlex.join(sys.argv), "machine": machine(), "rounds": rounds, "commands": rows}
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
