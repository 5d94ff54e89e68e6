"""Lines of the log of this package, as people read them on stderr."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

from pipeline.core.redaction import presentable

# Of every log of ours: its lines can be sorted, and `fgsm night` reads them.
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class LogFormatter(logging.Formatter):
    """No control characters and no credentials, a warning marked as one; only what libraries say may have several
    lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        if record.levelno >= logging.WARNING:
            record.message = f"Warning: {record.message}"
        return presentable(super().formatMessage(record), "" if record.name.startswith("pipeline") else "\n\t")


class StderrHandler(logging.StreamHandler[TextIO]):
    """Lines on what stderr is by then: while a bar is drawn, they appear above it."""

    def __init__(self, form: str = "%(message)s") -> None:
        logging.Handler.__init__(self)
        self.setFormatter(LogFormatter(form, TIME_FORMAT))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Show meanwhile what is logged, unless the program that imports this package has set up logging itself."""
    logger = logging.getLogger("pipeline")
    if logger.hasHandlers():
        yield
        return
    handler, level = StderrHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
