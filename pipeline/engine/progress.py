"""Progress of a run, and how busy its stages are."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import ParamSpec, TypeVar

from pipeline.core.console import LOG_SECONDS, Bar, duration

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# A run says when it is expected to end after the rate was measured for so many seconds, if so many are left.
MEASURED_SECONDS, LONG_SECONDS = 30.0, 60.0

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


class Progress(Bar):
    """Counts source images, and says how often each variant is predicted right.

    A long run says once when it is expected to end.
    """

    def __init__(self, total: int | None, done: int, subsets: Sequence[str], log_seconds: float = LOG_SECONDS) -> None:
        super().__init__(total, done, log_seconds=log_seconds)
        self._labelled = 0
        self._correct = dict.fromkeys(subsets, 0)
        self._told_end = False
        self._mutex = threading.Lock()

    def update(self, images: int, labelled: int, correct: Mapping[str, int]) -> None:
        """Add a batch: source images finished, how many of them are labelled, and right ones by the name
        of their subset. From any thread."""
        with self._mutex:
            self._labelled += labelled
            for subset, count in correct.items():
                self._correct[subset] += count
            if self._labelled:
                self.notes = [f"{subset} {count / self._labelled:.0%}" for subset, count in self._correct.items()]
            self.advance(images)
            if self._first and not self._told_end and self._updated - self._first[0] >= MEASURED_SECONDS:
                self._told_end = True
                self._tell_end()

    def _tell_end(self) -> None:
        if self.left is not None and self.left >= LONG_SECONDS:
            minutes = timedelta(minutes=round(self.left / 60))
            end = f"{datetime.now() + minutes:%Y-%m-%d %H:%M}"
            logger.info("Expected to end at %s, in about %s.", end, duration(minutes.total_seconds()))


# What each stage is called, and what helps where it is the limit.
STAGES = {
    "load": ("Reading and decoding the source is", "more cores, or smaller source images"),
    "attack": ("The models are", "a GPU, or a faster one"),
    "encode": ("The encoders are", "more cores"),
    "write": ("The disk is", "a faster one"),
}
# Below this share of what it could use, nothing was the limit for long.
LIMIT = 0.5


def bottleneck(shares: Mapping[str, float], shared_cores: bool, layouts: Sequence[str] = ()) -> str:
    """What held a run up, and what would help, in one sentence.

    Args:
        shares: how busy each stage was, 1 for always.
        shared_cores: whether the models compute on the cores that read and encode too, as they do without a GPU.
        layouts: those that would store fewer images of the same run.
    """
    stage, share = max(shares.items(), key=lambda one: one[1])
    together = sum(shares.get(one, 0.0) for one in ("load", "attack", "encode")) if shared_cores else 0.0
    if max(share, together) < LIMIT:
        return "No stage was busy for half of the time: the run was short, waited for its source, or shared its cores."
    who, fix = STAGES[stage]
    if stage in ("encode", "write") and layouts:
        fix += f", or layout {' or '.join(layouts)}"
    return f"{who} the limit: {fix} would make it faster."
