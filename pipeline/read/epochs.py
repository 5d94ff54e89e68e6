"""Which epoch an iteration is of: each begins the next one, until somebody says which comes next.

A loader does not tell its dataset that an iteration begins; it only calls `iter` in each of its workers, and that at
any time. So a worker that stays counts its own iterations, and workers that are new agree on where they begin: worker 0
takes the next epoch, and the others wait until it says which. Then all of them read the same epoch, whatever was read
before, by however many workers, and even where a loop was left before its last worker had begun.
"""

import multiprocessing
import os
import time
from typing import Any

import torch
from torch.utils.data import get_worker_info

from pipeline.core.errors import PipelineError

# Ranks started by one process share what it has opened. Those of one machine follow each other, so that this many have
# a row each.
RANKS = 64
# Loaders of a rank that may be starting their workers at once.
LOADERS = 5
# All workers are started together; one that has not begun by then will not.
WAIT_SECONDS = 120.0

# The columns of a row: the epoch that was set last, how often one was set, and the epoch of the iteration that began
# last since then, -1 for none. Behind them, for each loader, what its worker 0 says: who it is, and its epoch.
SET, TIMES, BEGUN, TOLD = range(4)


class EpochCounter:
    """Counts the iterations of a dataset. Its numbers are in memory that a process shares with its workers."""

    def __init__(self) -> None:
        self._shared = torch.zeros((RANKS, TOLD + 2 * LOADERS), dtype=torch.int64).share_memory_()
        self._shared[:, BEGUN] = -1
        # Of a worker's own last iteration: its process, how often an epoch had been set, and its epoch.
        self._own = 0, 0, 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy has its own numbers, and its workers share these; what is sent to a started process is shared already.
        self._shared.share_memory_()

    def set(self, epoch: int, place: tuple[int, int]) -> None:
        """Say which epoch, 0 or more, the next iteration is of; the iteration after it is of the next epoch. The place
        is rank and world size. With world size 1 it also holds for ranks that start later."""
        rank, world = place
        rows = self._shared if world == 1 else self._shared[rank % RANKS][None]
        rows[:, SET] = epoch
        rows[:, BEGUN] = -1
        rows[:, TIMES] += 1

    def begin(self, rank: int, resumed: int | None = None) -> int:
        """The epoch of an iteration that begins now, in this worker or process of a rank.

        Args:
            rank: whose.
            resumed: the epoch, where the iteration goes on with one. The next is that + 1, unless another was set and
                no iteration has begun since.

        Raises:
            PipelineError: worker 0 of the same loader does not begin.
        """
        row = self._shared[rank % RANKS]
        epoch, times, begun = row[:TOLD].tolist()
        worker = get_worker_info()
        process, own_times, own_epoch = self._own
        if resumed is not None:
            if times and begun < 0 and epoch != resumed:
                self._own = os.getpid(), times - 1, resumed
                return resumed
            chosen = resumed
        elif worker is not None and process == os.getpid():
            chosen = own_epoch + 1 if own_times == times else epoch
        elif worker is not None and worker.id > 0:
            chosen = self._hear(row)
        else:
            chosen = epoch if begun < 0 else begun + 1
        if worker is None or worker.id == 0:
            row[BEGUN] = chosen
        if worker is not None:
            self._own = os.getpid(), times, chosen
            if worker.id == 0:
                cell, loader = _loader()
                row[cell + 1] = chosen
                row[cell] = loader  # last, as the others read the epoch once they see it
        return chosen

    def _hear(self, row: torch.Tensor) -> int:
        cell, loader = _loader()
        end = time.monotonic() + WAIT_SECONDS
        while row[cell] != loader:
            if time.monotonic() > end:
                raise PipelineError(
                    f"Worker 0 has not begun to read within {WAIT_SECONDS:.0f} s, so its loader's other workers do not "
                    "know the epoch; read a dataset in all workers of a loader, or in none."
                )
            time.sleep(0.001)
        return int(row[cell + 1])


def _loader() -> tuple[int, int]:
    """Of the iterator that has started this worker: the column for it, and a number of its own, not 0."""
    worker = get_worker_info()
    assert worker is not None
    # Processes are numbered by the one that starts them, and a loader starts its workers one after the other.
    *parents, number = multiprocessing.current_process()._identity
    first = number - worker.id
    # A hash of whole numbers is the same in every process. The seed is one more that its workers have in common.
    return TOLD + 2 * (first % LOADERS), hash((*parents, first, worker.seed - worker.id)) or 1
