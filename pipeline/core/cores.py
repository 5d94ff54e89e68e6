"""The CPU cores that this process may use."""

import contextlib
import os
from collections.abc import Iterator

from pipeline.core.container import groups

# Cores that this process was given of those that it could use; None for all.
_given: int | None = None


@contextlib.contextmanager
def given_cores(count: int) -> Iterator[None]:
    """Take no more than so many cores, for a process that shares its machine with others of its kind."""
    global _given
    before, _given = _given, count
    try:
        yield
    finally:
        _given = before


def available_cores() -> int:
    """The CPU cores that this process may use, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for _, (most, period) in groups("cpu.max"):
        if most != "max":
            cores = min(cores, max(1, -(-int(most) // int(period))))
    return cores if _given is None else min(cores, _given)
