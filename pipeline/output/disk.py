"""Disk: whether it has room for a run."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.plan import Shard
from pipeline.output.folder import OutputFolder
from pipeline.output.summary import human_bytes


def free_bytes(path: Path) -> int:
    """Free space on the disk that will hold a path, which need not be there yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def in_flight(folder: OutputFolder, shards: Sequence[Shard], processes: int) -> Sequence[Shard]:
    """Of some shards those that are on the local disk at once: all, or for an object store one of each process."""
    return shards if folder.store.local else sorted(shards, key=lambda shard: shard.rows or 0)[-processes:]


def check_disk(needed: int, folder: OutputFolder, *, overwrite: bool) -> None:
    """Refuse to start a run that needs more bytes than are free; overwriting frees what is there.

    Raises:
        PipelineError: it does.
    """
    local, disk = folder.store.local, folder.store.disk
    free = free_bytes(disk.resolve())
    if overwrite and local:
        sizes = folder.store.sizes()
        free += sum(sizes[name] for name in folder.owned(folder.editions()))
    if needed > free:
        what, fix = "", "choose another disk, fewer epsilons or a source.limit."
        if not local:
            what = " for a shard before its upload"
            fix = "name a larger one with TMPDIR, or make output.images_per_shard smaller."
        raise PipelineError(
            f"output.path: about {human_bytes(needed)} are needed{what} and {disk} has {human_bytes(free)} free; {fix}"
        )
