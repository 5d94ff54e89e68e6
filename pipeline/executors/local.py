"""This process writes the shards, each once."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pipeline.core.plan import Shard
from pipeline.executors.base import Executor, Write

if TYPE_CHECKING:
    from pipeline.engine.job import Written  # which imports PyTorch


class LocalExecutor(Executor):
    """This process does the work."""

    def run(self, shards: Sequence[Shard], write: Write) -> "Generator[Written | None, None, None]":
        # All at once: the stages of one shard overlap with those of the next.
        yield from write(shards)
