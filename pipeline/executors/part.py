"""One of N parts of a run: N processes that know nothing of each other write one dataset together.

Part I writes every N-th of the plan's shards, from the I-th on, as the local executor would. Names and bytes of shards
do not depend on who writes them, so nothing needs to be put together. While it works, a part holds a lock of its own in
the output: beside it the other parts of N may work, and nobody else. The lock of the whole output it takes twice, for a
moment: to begin the run, or to join it as the manifest of whoever began it says, with every `auto` as that resolved it;
and at its end, to write manifest and card as they follow from all receipts that are there by then. So summaries are
written by one process at a time, and the last part finds every receipt and writes those of the complete dataset. The
lock of a part that was killed ends with it (in an object store 30 s later), and its command goes on from the receipts.
"""

import re
from collections.abc import Sequence

from pipeline.config.schema import RuntimeConfig
from pipeline.core.errors import ConfigError
from pipeline.core.plan import Shard
from pipeline.executors.local import LocalExecutor


def parse_part(text: str) -> tuple[int, int]:
    """The part that the command line names as I/N.

    Raises:
        ConfigError: it is no such text.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not found:
        raise ConfigError(f"--part: got {text!r}; write I/N, such as 0/8 for the first of eight parts.")
    return int(found[1]), int(found[2])


class PartExecutor(LocalExecutor):
    """This machine does a part of the work: one process, unless `runtime.processes` is a number."""

    def __init__(self, runtime: RuntimeConfig, part: tuple[int, int] | None = None) -> None:
        super().__init__(runtime)
        assert part is not None
        self._index, self._count = part
        if not 0 <= self._index < self._count:
            raise ConfigError(
                f"--part: there is no part {self._index} of {self._count}; parts count from 0, so the last of N is N-1."
            )
        self.part = f"{self._index}-of-{self._count}"

    def share(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        return shards[self._index :: self._count]
