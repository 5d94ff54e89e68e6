"""What can go wrong, as one tree. The command line turns each into one sentence and an exit code.

    PipelineError          1   the run failed: the disk, the data, the numbers
    ├── ConfigError        2   bad usage: the config, its paths, or a dataset and a model that do not fit
    ├── ShardsFailedError  3   some shards failed on a cluster, and the others were committed
    ├── CodeError          1   the code of a model or of an attack, which may be the user's own, raised something
    ├── NonFiniteError     1   the victim produced NaN or infinity
    ├── RowError           1   a row of the source that the config does not let pass
    └── TemporaryError    75   the network or a server failed: the same command may succeed later
    Interrupted            128 + the signal's number: Ctrl-C or SIGTERM

Anything else that escapes is a bug of ours and keeps its traceback.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class PipelineError(Exception):
    """A failure that the user can understand: one sentence, naming the key or file and what to do."""

    exit_code = 1


class ConfigError(PipelineError):
    """The config, or what it names, cannot be used as it stands."""

    exit_code = 2


class ShardsFailedError(PipelineError):
    """Some of the `total` shards that were tried failed, also in all of their retries; all others were committed.
    `reasons` says why, by the shards' names."""

    exit_code = 3

    def __init__(self, reasons: Mapping[str, str], total: int, retries: int) -> None:
        self.reasons, self.total, self.retries = reasons, total, retries
        super().__init__(
            f"{len(reasons)} of {total} shards failed after {retries} retries: {listing([*reasons])}; the first: "
            f"{next(iter(reasons.values()))}. The others are committed, and the same command tries these again."
        )


class CodeError(PipelineError):
    """The code of a model or of an attack, which may be the user's own, raised something; that is its cause."""


class NonFiniteError(PipelineError):
    """The victim's logits or the loss gradient hold NaN or infinity."""


class RowError(PipelineError):
    """A row of the source ends the run, however often it is tried."""


class TemporaryError(PipelineError):
    """The network or a server failed, so that the same command may succeed later. 75 is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came from, as a traceback shows them: not one that `from None` has cut off."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message; without one what a time-out means, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines and isinstance(error, TimeoutError):
        return "there was no answer in time"
    return lines[0] if lines else type(error).__name__


# What Python, requests, httpx, aiohttp, botocore and fsspec call a connection that failed: names of their classes, so
# that none of these libraries is imported to ask.
_CONNECTION_ERRORS = {
    *("ConnectionError", "TimeoutError", "Timeout", "gaierror"),
    *("TransportError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead", "ConnectionClosedError"),
}
# What a server answers that is busy or broken.
_BUSY = (408, 425, 429)


def is_offline(error: BaseException) -> bool:
    """Whether the network was needed where HF_HUB_OFFLINE forbids it."""
    words = "OfflineMode|offline mode is enabled|outgoing traffic has been disabled"
    return any(re.search(words, f"{type(cause)} {cause}") for cause in causes(error))


def is_temporary(error: BaseException) -> bool:
    """Whether the network failed, or a server that is busy or broken, so that the same may succeed later."""
    # The Hub's client calls it a lost connection where HF_HUB_OFFLINE forbids one.
    return not is_offline(error) and any(_failed_on_the_way(cause) for cause in causes(error))


def _failed_on_the_way(error: BaseException) -> bool:
    if _CONNECTION_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    # botocore has the status in a dictionary, aiohttp on the error itself, the others on its response.
    answer = getattr(error, "response", error)
    status = getattr(answer, "status_code", getattr(answer, "status", None))
    if isinstance(answer, Mapping):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(status, int) and (status in _BUSY or 500 <= status < 600)


@contextlib.contextmanager
def explained(
    what: str,
    fix: str = "",
    *,
    errors: tuple[type[Exception], ...] = (Exception,),
    kind: type[PipelineError] = PipelineError,
) -> Iterator[None]:
    """Turn an exception of a library into one sentence.

    Args:
        what: went wrong, naming the file or the key: "a.parquet cannot be read".
        fix: what helps: "see fgsm verify".
        errors: the exceptions to explain; others pass, as bugs of ours. So does a PipelineError, which is a sentence
            already, unless a kind of it is named here.
        kind: of the error that is raised: "a.parquet cannot be read (REASON); see fgsm verify.", and without a fix
            "a.parquet cannot be read: REASON". Where the network failed it is a TemporaryError instead.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, PipelineError) and not any(issubclass(named, PipelineError) for named in errors):
            raise
        reason = first_line(error)
        if kind in (PipelineError, ConfigError) and is_temporary(error):
            kind = TemporaryError
        raise kind(f"{what} ({reason}); {fix}." if fix else f"{what}: {reason}") from error


def require_file(path: Path, key: str) -> None:
    """Raise a ConfigError unless a file is there, which the config names under a key."""
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}.")


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
        f"Cannot write {path}: {reason}. Finished shards are kept; check the disk and its permissions, "
        "then run the same command again."
    )


# What helps where the system refuses something, and the words of the system or of a library by which it is known.
_REFUSALS: Mapping[str, Sequence[str]] = {
    "lower runtime.processes, runtime.batch_size, runtime.workers or runtime.max_pixels": (
        *("Cannot allocate memory", "can't allocate memory", "not enough memory", "failed to map segment"),
    ),
    "allow more open files (`ulimit -n`)": [os.strerror(number) for number in (errno.EMFILE, errno.ENFILE)],
    "free some space, or name another disk with TMPDIR or HF_HOME": (
        *(os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "No usable temporary directory found"),
    ),
    "allow larger files (`ulimit -f`)": [os.strerror(errno.EFBIG)],
    "allow more processes (`ulimit -u`), or set a smaller runtime.processes or runtime.workers": (
        *(os.strerror(errno.EAGAIN), "can't start new thread"),
    ),
    "correct the path or its permissions (TMPDIR, HF_HOME)": (
        *map(os.strerror, (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)),
    ),
    "check the disk": [os.strerror(errno.EIO)],
}


def system_refusal(error: BaseException) -> PipelineError | None:
    """The sentence for an error that comes from a limit, a disk or a permission of the system; None for any other.

    Libraries wrap such an error in types of their own, and a worker process sends only its text: the system's words
    are in it either way.
    """
    for cause in causes(error):
        said = "Cannot allocate memory" if isinstance(cause, MemoryError) else str(cause)
        for fix, reasons in _REFUSALS.items():
            for reason in filter(said.__contains__, reasons):
                name = getattr(cause, "filename", None)
                where = f" for {name}" if isinstance(name, str | Path) else ""
                return PipelineError(
                    f"The system refused{where}: {reason}. Finished shards are kept; {fix}, "
                    "then run the same command again."
                )
    return None
