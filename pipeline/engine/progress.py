"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import ParamSpec, TypeVar

from tqdm import tqdm

LOG_SECONDS = 30.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Busy:
    """How busy each stage of a run was, in seconds of a core."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds of a core for a stage; from any thread."""
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a core so far, by stage."""
        with self._lock:
            return dict(self._seconds)

    def timed(
        self,
        stage: str,
        function: Callable[Arguments, Result],
        clock: Callable[[], float] = time.thread_time,
    ) -> Callable[Arguments, Result]:
        """The function, each call of it counted for a stage.

        The clock is that of the thread's own computing: a thread that waits for a core is not busy. Work on an
        accelerator needs `time.perf_counter`.
        """

        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            started = clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(stage, clock() - started)

        return call

    def shares(self, workers: Mapping[str, int]) -> dict[str, float]:
        """How busy each stage has been so far, 1 for always.

        Args:
            workers: how many cores, or lanes of an accelerator, always would be.
        """
        wall = max(time.monotonic() - self._started, 1e-9)
        return {stage: self._seconds.get(stage, 0.0) / wall / count for stage, count in workers.items()}


class Progress:
    """Counts source images, `fresh` ones of this session, and how often each variant is predicted right.

    Without a total, as of a source whose length is not known, it says neither share nor time left.
    """

    def __init__(self, total: int | None, done: int, subsets: Sequence[str], log_seconds: float = LOG_SECONDS) -> None:
        self.total, self.done, self.log_seconds = total, done, log_seconds
        self._labelled = 0
        self._correct = dict.fromkeys(subsets, 0)
        self._started = self._logged = time.monotonic()
        self.fresh = 0
        self._updated = self._started
        self._first: tuple[float, int] | None = None
        # Without a terminal the bar is off, and `update` logs instead.
        self._bar = tqdm(total=total, initial=done, unit="img", file=sys.stderr, disable=None, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, images: int, labelled: int, correct: Mapping[str, int]) -> None:
        """Add a batch: source images finished, how many of them are labelled, and right ones by the name
        of their subset."""
        self.done += images
        self.fresh += images
        self._updated = time.monotonic()
        self._first = self._first or (self._updated, self.fresh)
        self._labelled += labelled
        for subset, count in correct.items():
            self._correct[subset] += count
        if not self._bar.disable:
            self._bar.set_postfix_str(self.accuracy(), refresh=False)
            self._bar.update(images)
        elif time.monotonic() - self._logged >= self.log_seconds:
            self._logged = time.monotonic()
            logger.info("%s", self.line())

    @property
    def rate(self) -> float:
        """Source images a second, without the first batch, which waits for everything to start."""
        if self._first is None or self._updated <= self._first[0]:
            return self.fresh / max(time.monotonic() - self._started, 1e-9)
        began, images = self._first
        return (self.fresh - images) / (self._updated - began)

    def accuracy(self) -> str:
        """Accuracy so far in each variant, `clean 99% eps-8 91%`; empty where nothing is labelled."""
        if not self._labelled:
            return ""
        return " ".join(f"{subset} {count / self._labelled:.0%}" for subset, count in self._correct.items())

    def line(self) -> str:
        """One line for a log: share, rate, time left, accuracy."""
        rate = self.fresh / max(time.monotonic() - self._started, 1e-9)
        if self.total is None:
            return f"{self.done:,} images, {rate:.1f} images/s, {self.accuracy()}"
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        share = self.done / self.total
        return (
            f"{self.done:,} of {self.total:,} images ({share:.0%}), {rate:.1f} images/s, {left} left, {self.accuracy()}"
        )
