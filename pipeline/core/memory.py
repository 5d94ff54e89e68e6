"""The memory of this machine, and of this process."""

import contextlib
import threading
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.05
# What a container may have at most, and has, as Linux tells it (control groups, version 2).
CONTAINER = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can still be taken: of the machine, or of the container that this process is in."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # not in one, or one without a limit, which says "max"
        most, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        return min(free, most - used)
    return free


class PeakMemory:
    """The most bytes that this process had resident while the context was open, `peak`."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process, ended = psutil.Process(), False
        while not ended:
            ended = self._ended.wait(SAMPLE_SECONDS)
            self.peak = max(self.peak, process.memory_info().rss)
