"""A run as any process can open it: this one, or a worker on another machine to which it is sent."""

import contextlib
import socket
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from pydantic_core import from_json

from pipeline.config.schema import Config
from pipeline.core.cores import available_cores
from pipeline.core.errors import PipelineError
from pipeline.core.lanes import lane_count
from pipeline.core.plan import Shard
from pipeline.engine.estimate import estimate_bytes
from pipeline.engine.execute import Tell, compile_as_begun, write_shards
from pipeline.engine.processes import Processes, share_machine
from pipeline.engine.progress import Busy
from pipeline.engine.resolved import describe_run
from pipeline.engine.run import Run, open_run
from pipeline.output.folder import OutputFolder, Receipt, RunWarning
from pipeline.output.manifest import Manifest
from pipeline.output.settings import differences


@dataclass(frozen=True)
class Written:
    """A shard that was committed.

    receipt: as it is in the output. seconds: how long each stage was busy since the last shard, 1 s for all that its
    process has for the stage: every core, every lane of the device, the one writer.
    """

    receipt: Receipt
    seconds: Mapping[str, float]


# The run that this process has opened, with the victim on its device, and the config that it was opened with. It is
# opened once, not for each shard.
_opened: tuple[Config, Run] | None = None


@dataclass(frozen=True)
class Job:
    """What a process must know of a run to open it and to write shards of it.

    config: as the user wrote it. output: the folder or the address of the dataset. recorded: the manifest of the run as
    it began, or None to begin it. generation: of a run that begins; see `Manifest.generation`.
    """

    config: Config
    output: str
    recorded: Manifest | None
    generation: int

    def open(self) -> tuple[Manifest, tuple[RunWarning, ...] | None]:
        """Open the run, and keep it open in this process.

        Returns:
            The manifest as it is before anything is written, of the device and the packages that are here, and the
            warnings of a run that begins; None of one that goes on.

        Raises:
            ConfigError: as `open_run`.
        """
        global _opened
        close()
        run = open_run(self.config, self.recorded, self.generation)
        _opened = self.config, run
        return run.manifest(), run.warnings

    def describe(self) -> list[str]:
        """As `describe_run`."""
        return describe_run(self._run())

    def estimate_bytes(self, shards: Sequence[Shard]) -> int:
        """Bytes that some shards will take."""
        return estimate_bytes(self._run(), shards)

    def processes(self, shards: Sequence[Shard], *, alone: bool) -> Processes:
        """As `share_machine`."""
        return share_machine(self._run(), shards, alone=alone)

    def write(
        self,
        shards: Sequence[Shard],
        folder: OutputFolder | None = None,
        done: Sequence[Receipt] | None = None,
        tell: Tell = lambda *_: None,
    ) -> Generator[Written, None, None]:
        """Write some shards of the run; yields each once it is committed.

        Args:
            shards: those to write.
            folder: the output, where this process holds it.
            done: receipts of all other shards, as the `others` of `write_shards`. None where they are not known, as on
                a worker: then a shard that has a receipt by now, of a worker that was lost right after its commit, is
                not written again.
            tell: called with the counts of each batch.

        Raises:
            PipelineError: as `write_shards`, or this machine has something else under the config's names than what the
                run was begun with.
        """
        run, folder, busy = self._run(), folder or OutputFolder(self.output), Busy()
        compile_as_begun(run)
        cores = available_cores()
        workers = {"load": cores, "attack": lane_count(run.device), "encode": cores, "write": 1}
        before = dict.fromkeys(workers, 0.0)
        if done is None:
            there = {shard: _read_receipt(folder, shard, run.edition) for shard in shards}
            yield from (Written(receipt, {}) for receipt in there.values() if receipt)
            shards = [shard for shard, receipt in there.items() if not receipt]
        with contextlib.closing(write_shards(run, folder, shards, done, busy, tell)) as receipts:
            for receipt in receipts:
                now = {stage: busy.seconds.get(stage, 0.0) / count for stage, count in workers.items()}
                yield Written(receipt, {stage: now[stage] - before[stage] for stage in workers})
                before = now

    def _run(self) -> Run:
        """The run that was begun, opened at most once in a process."""
        global _opened
        recorded = self.recorded
        assert recorded is not None
        if _opened is not None and _opened[0] == self.config and _opened[1].run_id == recorded.run_id:
            return _opened[1]
        close()
        run = open_run(self.config, recorded)
        if run.run_id != recorded.run_id:
            raise PipelineError(
                f"the node {socket.gethostname()} reads something else under the same names: "
                f"{differences(recorded.identity, run.identity)}; all nodes must read the same source and weights"
            )
        _opened = self.config, run
        return run


def close() -> None:
    """Let go of the run that this process has opened, and of the memory that its victim takes."""
    global _opened
    _opened = None


def _read_receipt(folder: OutputFolder, shard: Shard, edition: str) -> Receipt | None:
    """A shard's receipt, None where there is none that can be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Receipt.of_json(from_json(folder.store.read(folder.receipt(shard, edition))))
    return None
