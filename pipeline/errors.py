"""What can go wrong, as one tree. The command line turns each into one sentence and an exit code.

    PipelineError          1   the run failed: the disk, the data, the numbers
    ├── ConfigError        2   bad usage: the config, its paths, or a dataset and a model that do not fit
    ├── ShardsFailedError  3   some shards failed on a cluster, and the others were committed
    ├── NonFiniteError     1   the victim produced NaN or infinity
    └── RowError           1   a row of the source that the config does not let pass
    Interrupted            128 + the signal's number: Ctrl-C or SIGTERM

Anything else that escapes is a bug of ours and keeps its traceback.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path


class PipelineError(Exception):
    """A failure that the user can understand: one sentence, naming the key or file and the mend."""

    exit_code = 1


class ConfigError(PipelineError):
    """The config, or what it names, cannot be used as it stands."""

    exit_code = 2


class ShardsFailedError(PipelineError):
    """Some shards failed, each as often as it was tried; all others were committed."""

    exit_code = 3


class NonFiniteError(PipelineError):
    """The victim's logits or the loss gradient hold NaN or infinity."""


class RowError(PipelineError):
    """A row of the source ends the run, however often it is tried."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came from: clients of servers wrap what befalls them."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def listing(names: Sequence[str], most: int = 5) -> str:
    """The first few names of a list, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text that others wrote, where it is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def write_failure(path: Path, error: OSError) -> PipelineError:
    """The sentence for a write that the operating system refused."""
    reason = error.strerror or first_line(error)
    return PipelineError(
        f"Cannot write {path}: {reason}. What was committed is kept; mend the disk or its permissions, "
        "then run the same command again."
    )
