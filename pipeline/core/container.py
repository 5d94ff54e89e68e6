"""What Linux leaves to a container, or to a job of Slurm or systemd: its control groups, version 2."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def groups(name: str) -> Iterator[tuple[Path, list[str]]]:
    """The groups of this process that have a file of a name, innermost first, each with the words of that file."""
    own = ROOT
    with contextlib.suppress(OSError):
        own /= next((line[4:] for line in OWN.read_text().splitlines() if line.startswith("0::/")), "")
    for group in (own, *own.parents):
        with contextlib.suppress(OSError):
            yield group, (group / name).read_text().split()
        if group == ROOT:
            return
