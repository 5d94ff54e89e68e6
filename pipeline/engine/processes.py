"""How many processes of this machine share a run.

Python runs one thread of a process at a time, and the threads that read, encode and drive the device all need their
turn for every image. Several processes do not wait for each other: docs/performance.md has figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from pipeline.core.cores import available_cores
from pipeline.core.memory import available_bytes
from pipeline.core.plan import Shard
from pipeline.engine.execute import BATCHES_IN_FLIGHT
from pipeline.engine.run import Run

# Rows that each process must have to write: it takes some 5 s of a core to start.
LEAST_ROWS = 16_384
# What a shard counts whose number of rows is not known: one of the default size.
UNKNOWN_ROWS = 4096
# Processes that are started unasked.
MOST = 8
# What each core's chunk may need in the models, however many processes there are: ResNet-50 at 224 px takes 0.9 GB.
CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class Processes:
    """How a machine is shared by `count` processes.

    gpus: the numbers of the GPUs that are given to one after the other; none without CUDA.
    """

    count: int = 1
    gpus: tuple[int, ...] = ()

    @property
    def on_each_device(self) -> int:
        """How many compute on one device, at most: a GPU, or else that of this process."""
        return -(-self.count // max(1, len(self.gpus)))

    @property
    def gpu_share(self) -> float | None:
        """The part of its GPU's memory that each process but the first may take, in (0, 1); None for all."""
        return 1 / self.on_each_device if self.gpus and self.on_each_device > 1 else None


def share_machine(run: Run, shards: Sequence[Shard], *, alone: bool = True) -> Processes:
    """Decide how many processes write some shards of an opened run.

    As many as the config asks for, but no more than there are shards. If it leaves that open: on a CPU as many as rows,
    cores and memory are worth, and with other devices one, as nobody has measured more there.

    Args:
        run, shards: what is to be written.
        alone: whether other processes that this one knows nothing of may write the same run on this machine; then one,
            unless the config asks for more.
    """
    asked, device = run.config.runtime.processes, run.device.type
    if asked != "auto":
        return Processes(max(1, min(asked, len(shards))), _alike() if device == "cuda" else ())
    if device != "cpu" or not alone:
        return Processes()
    rows = sum(UNKNOWN_ROWS if shard.rows is None else shard.rows for shard in shards)
    cores = available_cores()
    count = min(cores, MOST, rows // LEAST_ROWS, len(shards))
    if count <= 1:
        return Processes()
    held = psutil.Process().memory_info().rss
    free = available_bytes() + held - cores * CHUNK_BYTES
    room = free // (held + _bytes_in_flight(run, cores))
    return Processes(max(1, min(count, room)))


def _alike() -> tuple[int, ...]:
    """The GPUs that are like the first one: others would be slower, and could compute other last digits."""
    known = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(
        n for n, one in enumerate(known) if (one.name, one.total_memory) == (known[0].name, known[0].total_memory)
    )


def _bytes_in_flight(run: Run, cores: int) -> int:
    """Bytes of the batches that a process holds at once: read ahead, attacked, encoded and waiting to be written."""
    read_ahead, attacked = cores + 1, 2 + BATCHES_IN_FLIGHT
    pictures = read_ahead + attacked * len(run.pictures)
    return run.plan.batch_size * math.prod(run.reader.shape) * pictures
