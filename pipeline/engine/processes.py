"""How many processes of this machine share a run.

Python runs one thread of a process at a time, and the threads that read, encode and drive the device all need their
turn for every image. Several processes do not wait for each other. With a model that costs nothing, at 32 px on 2
cores, two processes make 1.4 times as many images a second as one, and 1.9 times as many in layout `signs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from pipeline.core.lanes import available_cores
from pipeline.core.memory import available_bytes
from pipeline.core.plan import Shard
from pipeline.engine.compute import rehearse
from pipeline.engine.run import Run

# Cores that a process has at least, by the kind of device that computes.
LEAST_CORES = {"cpu": 1, "cuda": 2}
# Rows that a process must have to write: it takes some 5 s of a core to start.
LEAST_ROWS = {"cpu": 16_384, "cuda": 4_096}
# Processes at most, on a CPU and on each GPU.
MOST = {"cpu": 8, "cuda": 4}
# What a shard counts whose number of rows is not known: one of the default size.
UNKNOWN_ROWS = 4096
# Memory of a process that works, against that of one that has just opened the run.
HOST_GROWTH = 2.0
# Of a GPU: what the allocator may need beyond the largest batch, and what CUDA itself takes.
GPU_GROWTH, CONTEXT_BYTES = 1.25, 2**30


@dataclass(frozen=True)
class Processes:
    """How a machine is shared: `count` processes on `gpus` GPUs, which take turns in being given to one.

    `gpu_share` is the part of its GPU's memory that a process may take, in (0, 1]; None for no limit.
    """

    count: int = 1
    gpus: int = 0
    gpu_share: float | None = None


def share_machine(run: Run, shards: Sequence[Shard]) -> Processes:
    """Decide how many processes write some shards of an opened run: as asked, or as many as cores, memory and rows
    are worth."""
    asked, device = run.config.runtime.processes, run.device.type
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if asked != "auto":
        return Processes(min(asked, len(shards)), gpus)
    if device not in LEAST_CORES:
        return Processes()
    rows = sum(UNKNOWN_ROWS if shard.rows is None else shard.rows for shard in shards)
    devices = max(gpus, 1)
    count = min(
        available_cores() // LEAST_CORES[device], MOST[device] * devices, rows // LEAST_ROWS[device], len(shards)
    )
    if count <= 1:
        return Processes()
    if not gpus:
        need = HOST_GROWTH * psutil.Process().memory_info().rss
        return Processes(min(count, 1 + int(available_bytes() // need)))
    try:
        # As the run will, which one that is resumed has not done yet.
        rehearse(run.attacker, run.device, run.reader.shape, run.plan.batch_size)
    except torch.OutOfMemoryError:
        return Processes(min(count, gpus), gpus)  # what is wrong with the first GPU the run will say
    free, total = torch.cuda.mem_get_info(run.device)
    held = torch.cuda.memory_reserved(run.device)
    need = GPU_GROWTH * torch.cuda.max_memory_reserved(run.device) + CONTEXT_BYTES
    # This process is on the first GPU and has its context; of the others no more is known than that they are alike.
    each = max(1, int((free + held + CONTEXT_BYTES) // need))
    return Processes(min(count, each * gpus), gpus, min(1.0, need / total))
