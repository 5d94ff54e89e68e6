"""This process writes the shards, each once."""

from collections.abc import Generator, Sequence

from pipeline.core.plan import Shard
from pipeline.engine.job import Written
from pipeline.executors.base import Executor, Write


class LocalExecutor(Executor):
    """This process does the work."""

    def run(self, shards: Sequence[Shard], write: Write) -> Generator[Written | None, None, None]:
        # All at once: the stages of one shard overlap with those of the next.
        yield from write(shards)
