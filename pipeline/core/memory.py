"""The memory of this machine, and of this process."""

import contextlib
import threading

import psutil

from pipeline.core.container import groups

SAMPLE_SECONDS = 0.05


def available_bytes() -> int:
    """Bytes that can still be taken: of the machine, or of the container that this process is in."""
    free = psutil.virtual_memory().available
    for group, (most,) in groups("memory.max"):
        if most != "max":
            used = int((group / "memory.current").read_text())
            # Files that were read or written stay in memory until that is needed.
            with contextlib.suppress(OSError, KeyError):
                lines = (group / "memory.stat").read_text().splitlines()
                used -= int(dict(line.split() for line in lines)["inactive_file"])
            free = min(free, int(most) - used)
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
