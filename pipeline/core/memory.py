"""Memory in use, by this process and the workers that it started, seen now and then; and files that may be open."""

import contextlib
import os
import resource
import threading
import time
from types import TracebackType

import psutil

from pipeline.core.errors import PipelineError

SAMPLE_SECONDS = 0.05
# Reading the PSS walks the page tables, some 15 ms for a gigabyte: at most a tenth of one core goes into it.
SAMPLE_SHARE = 0.1
# Files that a run has open at most are about 30.
OPEN_FILES = 64


def require_open_files() -> None:
    """See that this process may open enough files, and raise its own limit where the system lets it.

    Raises:
        PipelineError: the limit is too low.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return
    if most == resource.RLIM_INFINITY or most >= OPEN_FILES:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, most))
            return
    raise PipelineError(
        f"Only {limit} files may be open at once, and {OPEN_FILES} are needed; "
        f"allow more with `ulimit -n {OPEN_FILES}`."
    )


def resident_bytes(pid: int) -> int:
    """Bytes that a process and all below it have resident, without counting what they share twice.

    A forked worker shares most of its memory with its parent. Where the system does not say how many share it, as Linux
    does, that is left out.
    """
    found = 0
    with contextlib.suppress(psutil.Error):  # it ended meanwhile
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = one.memory_full_info()
                found += getattr(memory, "pss", memory.uss)
    return found


class PeakMemory:
    """The most bytes that this process and all below it had resident at once, `peak`, while the context was open.

    What is there in two looks that follow each other counts: a process that is just being started has all of its
    parent's memory for a moment.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._before = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        wait = SAMPLE_SECONDS
        while not self._ended.wait(wait):
            wait = max(SAMPLE_SECONDS, self._look() / SAMPLE_SHARE)

    def _look(self) -> float:
        """Look once; the seconds of a core that it took."""
        began = time.thread_time()
        now = resident_bytes(os.getpid())
        self.peak = max(self.peak, min(now, self._before or now))
        self._before = now
        return time.thread_time() - began
