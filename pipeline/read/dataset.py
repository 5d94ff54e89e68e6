"""What a DataLoader reads: the epochs of one dataset, or of several together, shared out to ranks and workers.

Each position of an epoch has a row of its own, whoever reads it. A consumer (a worker of a rank) reads a stretch of
the positions, so that the stretches differ by one at most and fit together whatever the number of row groups; a resumed
one starts its stretch later.

Of several datasets the positions are spread out evenly, each has the same number of them in every epoch, and the rows
of each follow in their order, from one epoch to the next.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.core.errors import ConfigError
from pipeline.read.epochs import EpochCounter
from pipeline.read.stream import Stream


class TrainingDataset(IterableDataset[tuple[Any, ...]]):
    """What `training_dataset` returns.

    `classes`: names of the labels. `shape`: (C, H, W) of every image. `rows`: images of an epoch, over all ranks and
    datasets. `columns`: what comes with an image. `streams`: one for each dataset, and `parts`: how many images of an
    epoch are of each.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        parts: Sequence[int],
        *,
        classes: Sequence[str],
        place: tuple[int, int] | None,
    ) -> None:
        self.streams, self.parts, self.rows = tuple(streams), tuple(parts), sum(parts)
        self.classes, self.shape, self.columns = tuple(classes), streams[0].shards.shape, streams[0].columns
        # A state belongs to it.
        self.digest = streams[0].digest
        if len(streams) > 1:
            order = [stream.digest for stream in streams], self.parts
            self.digest = hashlib.sha256(repr(order).encode()).hexdigest()[:16]
        self._epochs = EpochCounter()
        # Shared, so that workers hear of a state that cannot reach them: one that was loaded in the main process, and
        # that no iteration there has taken yet.
        self._pending = torch.zeros((), dtype=torch.bool).share_memory_()
        self._place = place
        # Epoch, and rows that were given: of the next iteration, where a state was loaded, and of the one under way.
        self._resume: tuple[int, int] | None = None
        self._reading = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        # A worker process need not know of torch.distributed.
        return {**self.__dict__, "_place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy's is not, but for one that is sent to a process which this one starts.
        self._pending.share_memory_()

    @property
    def place(self) -> tuple[int, int]:
        """Rank and world size: as given, else torch.distributed's; a ConfigError where accelerate needs them given."""
        if self._place is not None:
            return self._place
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        rank, world = distributed.get_rank(), distributed.get_world_size()
        accelerate = sys.modules.get("accelerate.state")
        if world > 1 and accelerate and accelerate.is_initialized():
            # It shares out what a prepared loader reads, and nothing says which loader will be prepared.
            raise ConfigError(
                f"rank, world_size: accelerate runs in {world} processes; give rank=0, world_size=1 for a loader that "
                "it prepares, whose batches it shares out itself, or rank=accelerator.process_index, "
                "world_size=accelerator.num_processes for one that you do not give to prepare()."
            )
        return rank, world

    def __len__(self) -> int:
        """The images of an epoch on this rank; those of two ranks differ by one at most."""
        start, stop = share(0, self.rows, *self.place)
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of. The one after it is of the next epoch, and the first is of epoch 0.

        A loaded state is kept for its own epoch and forgotten for any other.

        Raises:
            ConfigError: it is below 0.
        """
        if epoch < 0:
            raise ConfigError(f"epoch: got {epoch}; epochs are counted from 0.")
        self._epochs.set(epoch, self.place)
        if self._resume is not None and self._resume[0] != epoch:
            self._resume = None
            self._pending.fill_(False)

    def state_dict(self) -> dict[str, Any]:
        """Where this consumer stands. In a worker, StatefulDataLoader asks; in the main process it is right only
        without workers."""
        rank, world, _, workers = self._consumer()
        epoch, rows = self._reading
        return {"epoch": epoch, "rows": rows, "of": self.digest, "consumers": [rank, world, workers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration, and only that, begin where a consumer stood; what lies before is neither read nor
        decoded.

        In a worker, StatefulDataLoader calls it. In the main process it is for a loader without workers: an iteration
        with workers refuses to begin.

        Raises:
            ConfigError: the state is that of another dataset, mix, seed, number of ranks or of workers.
        """
        if state["of"] != self.digest:
            raise ConfigError(
                "state: it is that of another dataset, or of another split, models, attacks, epsilons, clean, weights, "
                "only, shuffle or seed."
            )
        rank, world, _, workers = self._consumer()
        there, here = state["consumers"], [rank, world, workers]
        if there != here:
            told = ["rank {} of {} with {} readers".format(*consumers) for consumers in (there, here)]
            raise ConfigError(
                f"state: it is of {told[0]}, and this is {told[1]}; resume with as many ranks and workers."
            )
        self._resume = state["epoch"], state["rows"]
        if get_worker_info() is None:
            self._pending.fill_(True)

    def _consumer(self) -> list[int]:
        """Rank, world size, worker, workers."""
        worker = get_worker_info()
        return [*self.place, *((0, 1) if worker is None else (worker.id, worker.num_workers))]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        rank, world, worker, workers = self._consumer()
        start, stop = share(*share(0, self.rows, rank, world), worker, workers)
        # Now, not with the first row: StatefulDataLoader asks for the state before.
        resumed, self._resume = self._resume, None
        epoch, done = resumed or (None, 0)
        self._reading = self._epochs.begin(rank, epoch), done
        if get_worker_info() is None:
            self._pending.fill_(False)
        return self._counted(start, stop)

    def _counted(self, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        if self._pending and get_worker_info() is not None:
            # With the first row, not before: a worker that stays would end without a word.
            raise ConfigError(
                "state: it was loaded into the dataset, where workers do not see it; load it into torchdata's "
                "StatefulDataLoader."
            )
        epoch, done = self._reading
        for row in self._rows(epoch, start + done, stop):
            done += 1
            self._reading = epoch, done
            yield row

    def _rows(self, epoch: int, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        """The rows at the positions `start` to `stop` of an epoch."""
        before, after = counts_before(self.parts, start), counts_before(self.parts, stop)
        rows = [
            stream.read(epoch * part + first, epoch * part + last)
            for stream, part, first, last in zip(self.streams, self.parts, before, after, strict=True)
        ]
        if len(rows) == 1:
            yield from rows[0]
            return
        for position in range(start, stop):
            counts = counts_before(self.parts, position + 1)
            (index,) = (index for index, count in enumerate(counts) if count > before[index])
            before = counts
            yield next(rows[index])


def counts_before(parts: Sequence[int], position: int) -> list[int]:
    """How many of the first positions of an epoch are of each dataset.

    They are spread out evenly: in any stretch each has its share of the positions, to within a few. Each further
    position is one more of exactly one dataset. `parts` says how many of all positions are of each, 1 or more;
    `position` is from 0 to their sum.
    """
    counts, left = [], sum(parts)
    for part in parts:
        # Its share of what those before it have left, rounded.
        counts.append((2 * position * part + left) // (2 * left))
        position -= counts[-1]
        left -= part
    return counts


def share(start: int, stop: int, index: int, count: int) -> tuple[int, int]:
    """The index-th of `count` stretches of start..stop; earlier ones are longer by one where they differ."""
    each, more = divmod(stop - start, count)
    first = start + index * each + min(index, more)
    return first, first + each + (index < more)
