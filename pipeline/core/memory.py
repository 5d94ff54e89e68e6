"""Memory in use, by this process and the workers that it started, seen now and then; and files that may be open."""

import contextlib
import os
import re
import resource
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

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


def descend(process: int) -> list[int]:
    """A process and all below it, as far as they still live; Linux only."""
    found = [process]
    for parent in found:  # grows as it goes
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                found += map(int, children.read_text().split())
    return found


def proportional_set_size(process: int) -> int:
    """The resident bytes of a process, what it shares divided by those who share it; 0 where that is not known.

    Summed over processes nothing counts twice: a forked worker shares most of its memory with its parent.
    """
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        return 1024 * int(re.findall(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)[0])
    return 0


class PeakMemory:
    """The most bytes that this process and all below it had resident at once, `peak`, while the context was open.

    Where the system does not say, it is the peak of this process alone, since it began.
    """

    def __init__(self) -> None:
        self._seen = 0
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
        self._seen = max(self._seen, sum(map(proportional_set_size, descend(os.getpid()))))
        return time.thread_time() - began

    @property
    def peak(self) -> int:
        if self._seen:
            return self._seen
        # In bytes on macOS, in kilobytes elsewhere.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
