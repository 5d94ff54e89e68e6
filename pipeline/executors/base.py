"""What an executor is: where and how often the shards of a run are tried. The caller checks the result.

The caller opens the run, finds out which shards are missing, and hands them to an executor with functions that write
some of them. It counts the receipts that come back, and says in the end what is there and what is not.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from pipeline.config.schema import RuntimeConfig
from pipeline.core.plan import Shard

if TYPE_CHECKING:
    from pipeline.engine.execute import Tell  # which imports PyTorch
    from pipeline.engine.job import Written
    from pipeline.engine.processes import Processes

Result = TypeVar("Result")


class Write(Protocol):
    """Writes some shards, and yields each once it is committed; says of each batch that it is done."""

    def __call__(self, shards: Sequence[Shard], *, tell: "Tell" = ...) -> "Generator[Written, None, None]": ...


@dataclass(frozen=True)
class Work:
    """How shards are written, and by how many.

    here: writes in this process, which holds the output. elsewhere: the same in another process, to which it can be
    sent by `pickle`; on this machine that inherits `handles`, numbers of open files, to hold the output too. tell:
    shows progress, from any thread; `here` calls it. processes: how many of this machine should write.
    """

    here: Write
    elsewhere: Write
    tell: "Tell"
    processes: "Processes"
    handles: Sequence[int] = ()


class Executor(ABC):
    """Where the work is done. It is a context: what it needs, such as a cluster, is there within.

    `remote` says whether other machines write, of which a shared folder shows the files late; `workers` is how many
    processes write at once; `part` names the part of the run that is written here, "" for all of it.
    """

    remote = False
    workers = 1
    part = ""

    def __init__(self, runtime: RuntimeConfig, part: tuple[int, int] | None = None) -> None:
        """Take what there is to know; nothing is begun yet.

        Args:
            runtime: the config's section, with the device of the run that is resumed.
            part: (i, n), the part to write of n; None for all of the run.
        """
        del part
        self.runtime = runtime

    def __enter__(self) -> Self:
        return self

    # Empty, and meant to be: most executors have nothing to end.
    def __exit__(self, *_: object) -> None:  # noqa: B027
        """Let go of what it needs."""

    def share(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """Those of a run's shards that are to be written here."""
        return shards

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function returns where the shards are written, as only there may be the run's device.

        Raises:
            PipelineError: as the function, or nobody can be asked.
        """
        return function(*arguments)

    @abstractmethod
    def run(self, shards: Sequence[Shard], work: Work) -> "Generator[Written | None, None, None]":
        """Have some shards written, here or elsewhere.

        Yields:
            Each shard once it is committed, in any order; None now and then while others work, for the caller to see
            to its lock.

        Raises:
            ShardsFailedError: some failed each time they were tried, after all others were yielded.
            PipelineError: what ends the run, however often a shard is tried. Then, and when it is closed, nothing that
                it has started goes on.
        """
