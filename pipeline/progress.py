"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from tqdm import tqdm

from pipeline.outputs import subset_name

LOG_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Progress:
    """Counts source images and how often each epsilon is predicted right."""

    def __init__(self, total: int, done: int, levels: Sequence[int], log_seconds: float = LOG_SECONDS) -> None:
        self.total, self.done, self.log_seconds = total, done, log_seconds
        self._labelled = 0
        self._correct = dict.fromkeys(levels, 0)
        self._started = self._logged = time.monotonic()
        self._fresh = 0
        # Without a terminal the bar is off, and `update` logs instead.
        self._bar = tqdm(total=total, initial=done, unit="img", file=sys.stderr, disable=None, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, images: int, labelled: int, correct: Mapping[int, int]) -> None:
        """Add a batch: source images finished, how many of them are labelled, and right ones per level."""
        self.done += images
        self._fresh += images
        self._labelled += labelled
        for level, count in correct.items():
            self._correct[level] += count
        if not self._bar.disable:
            self._bar.set_postfix_str(self.accuracy(), refresh=False)
            self._bar.update(images)
        elif time.monotonic() - self._logged >= self.log_seconds:
            self._logged = time.monotonic()
            logger.info("%s", self.line())

    def accuracy(self) -> str:
        """Accuracy so far for each epsilon, `clean 99% eps-8 91%`; empty where nothing is labelled."""
        if not self._labelled:
            return ""
        return " ".join(f"{subset_name(level)} {count / self._labelled:.0%}" for level, count in self._correct.items())

    def line(self) -> str:
        """One line for a log: share, rate, time left, accuracy."""
        rate = self._fresh / max(time.monotonic() - self._started, 1e-9)
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        share = self.done / self.total
        return (
            f"{self.done:,} of {self.total:,} images ({share:.0%}), {rate:.1f} images/s, {left} left, {self.accuracy()}"
        )
