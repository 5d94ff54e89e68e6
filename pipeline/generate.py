"""Generate: the whole flow, from a config to a complete dataset.

What is there already is found out first, and what is missing is executed and summed up. An executor does the work: this
process, or a cluster.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, PipelineError, listing
from pipeline.core.lanes import available_cores, lane_count
from pipeline.core.plan import Shard
from pipeline.engine.estimate import check_disk, estimate_bytes, in_flight
from pipeline.engine.execute import compile_as_begun, tell_speed, write_shards
from pipeline.engine.progress import Busy, Progress
from pipeline.engine.run import differences, open_run, versions
from pipeline.output.card import card_agrees, write_summaries
from pipeline.output.folder import OutputFolder, Receipt, committed
from pipeline.output.manifest import Manifest, read_manifest, settled, summarise

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Whoever does the work: opens one run, and writes shards of it."""

    def open(self, config: Config, recorded: Manifest | None, generation: int) -> Manifest:
        """Open the run where it will be computed.

        Args:
            config: as the user wrote it.
            recorded: the manifest of the run that is resumed.
            generation: of a run that begins; see `Manifest.generation`.

        Returns:
            The manifest as it is before anything is written, of the device and the packages that are there.

        Raises:
            ConfigError: as `open_run`.
        """
        ...

    def estimate_bytes(self, folder: OutputFolder, shards: Sequence[Shard]) -> int:
        """Bytes of this machine's disk, or of the shared one, that some shards of the opened run will take."""
        ...

    def write(self, folder: OutputFolder, shards: Sequence[Shard], done: Sequence[Receipt]) -> None:
        """Write some shards of the opened run.

        Args:
            folder: where they go; the caller holds it.
            shards: those to write.
            done: receipts of the shards that are there, for the progress and the count of skipped rows.

        Raises:
            PipelineError: a row or the numbers stop the run, or the disk refuses.
        """
        ...


class LocalExecutor:
    """This process does the work."""

    def open(self, config: Config, recorded: Manifest | None, generation: int) -> Manifest:
        self.run = open_run(config, recorded, generation)
        return self.run.manifest()

    def estimate_bytes(self, folder: OutputFolder, shards: Sequence[Shard]) -> int:
        return estimate_bytes(self.run, in_flight(folder, shards))

    def write(self, folder: OutputFolder, shards: Sequence[Shard], done: Sequence[Receipt]) -> None:
        if not shards:
            return
        run = self.run
        compile_as_begun(run)
        busy, cores = Busy(), available_cores()
        with Progress(run.plan.total, sum(receipt.planned for receipt in done), run.levels) as progress:
            write_shards(run, folder, shards, done, busy, progress.update)
        shares = busy.shares({"load": cores, "attack": lane_count(run.device), "encode": cores, "write": 1})
        tell_speed(folder, progress, shares, versions(run.device)["device"])


ExecutorName = Literal["local", "ray"]


def generate(
    config: Config, *, overwrite: bool = False, executor: ExecutorName = "local", unlocked: bool = False
) -> Manifest:
    """Write the dataset that a config describes, or what is missing of it.

    Args:
        config: the run.
        overwrite: remove the run that is in the output folder first: the files that its receipts and its manifest
            list, and those that bear its id. All else stays.
        executor: `local` works in this process, `ray` on a cluster; the bytes are the same.
        unlocked: do without a lock, where the file system or the object store has none: the caller sees to it that no
            second run writes there.

    Returns:
        The manifest of the complete dataset.

    Raises:
        ConfigError: the config, or what it names, cannot be used; nothing was written.
        ShardsFailedError: some shards failed on a cluster; the others were committed.
        PipelineError: the run failed, or shards were removed while it went on; what was committed is kept.
    """
    folder = OutputFolder(config.output.path)
    folder.check_usable()
    recorded = None if overwrite else read_manifest(folder)
    with _executor(executor) as execution:
        manifest = _execute(execution, config, folder, recorded, overwrite, unlocked)
    if warning := manifest.zero_gradient_warning:
        logger.warning("%s.", warning)
    return manifest


@contextlib.contextmanager
def _executor(name: ExecutorName) -> Iterator[Executor]:
    """Whoever does the work, for as long as that takes."""
    if name == "local":
        yield LocalExecutor()
        return
    try:
        from pipeline.executors.ray import RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "--executor ray: Ray is not installed; it comes with pip install 'fgsm-pipeline[ray]'."
        ) from None
    with RayExecutor() as execution:
        yield execution


def _execute(
    execution: Executor,
    config: Config,
    folder: OutputFolder,
    recorded: Manifest | None,
    overwrite: bool,
    unlocked: bool,
) -> Manifest:
    """Find out what is missing, and have it written."""
    generation = folder.generation(over=overwrite) if recorded is None else recorded.generation
    opened = execution.open(config, recorded, generation)
    if not overwrite:
        _check_same(opened, recorded, folder)
    shards = opened.plan.shards
    done = {} if overwrite else committed(folder, opened.edition, shards)
    if recorded is not None and recorded.complete and _is_current(folder, recorded, done):
        logger.info("All %d shards are already there.", len(shards))
        folder.store.tidy()
        return recorded
    needed = execution.estimate_bytes(folder, [shard for shard in shards if shard.name not in done])
    check_disk(needed, folder, overwrite=overwrite)
    with folder.store.held(unlocked=unlocked):
        same = folder.generation(over=True) == generation if overwrite else read_manifest(folder) == recorded
        if not same:
            raise PipelineError(f"{folder.root} was changed by another run meanwhile; run the same command again.")
        begun = _begin(folder, recorded or opened, overwrite)
        sizes = folder.store.sizes()
        done = committed(folder, begun.edition, shards, sizes)
        begun = write_summaries(folder, begun, done)
        if done:
            logger.info("%d of %d shards are already there.", len(done), len(shards))
        missing = [shard for shard in shards if shard.name not in done]
        folder.forget(missing, begun.edition, sizes)
        try:
            execution.write(folder, missing, list(done.values()))
        except BaseException:
            # The card must describe the shards that are there; but what failed first is what the user must read.
            with contextlib.suppress(PipelineError):
                write_summaries(folder, settled(begun))
            raise
        manifest = write_summaries(folder, settled(begun))
    _check_complete(folder, manifest)
    return manifest


def _is_current(folder: OutputFolder, recorded: Manifest, done: Mapping[str, Receipt]) -> bool:
    """Whether manifest and card say what follows from the receipts, and no run has ended half-way through."""
    return summarise(settled(recorded), done) == recorded and card_agrees(folder, recorded)


def _begin(folder: OutputFolder, manifest: Manifest, overwrite: bool) -> Manifest:
    """Make the folder that of a run, and remove what it supersedes; the manifest, to be written before anything else.

    In an object store the manifest is another for each process that holds the place: so the late write of a former
    holder, which is meant for the version that it knew, does not replace it.
    """
    superseded = sorted(folder.editions()) if overwrite else manifest.supersedes
    begun = manifest.model_copy(update={"session": folder.store.session, "supersedes": tuple(superseded)})
    if superseded:
        # Before anything is removed the manifest says so: a removal that is cut off goes on with the next run.
        write_summaries(folder, begun, {})
        folder.start_over(superseded)
    return begun.model_copy(update={"supersedes": ()})


def _check_complete(folder: OutputFolder, manifest: Manifest) -> None:
    """The end of a run is success only where all is there.

    Raises:
        PipelineError: something removed shards while the run went on.
    """
    if not manifest.complete:
        there = committed(folder, manifest.edition, manifest.plan.shards)
        gone = [shard.name for shard in manifest.plan.shards if shard.name not in there]
        raise PipelineError(
            f"{folder.root}: {len(gone)} of {len(manifest.plan.shards)} shards were removed or changed while the run "
            f"went on ({listing(gone)}); run the same command again to write them."
        )


def _check_same(opened: Manifest, recorded: Manifest | None, folder: OutputFolder) -> None:
    """Refuse to mix two runs in one folder."""
    if recorded is None:
        others = folder.editions() - {opened.edition}
        if others:
            raise ConfigError(
                f"output.path: {folder.root} holds shards of another run ({min(others)}) and no manifest; "
                "choose another folder, or start over with --overwrite."
            )
        return
    if recorded.run_id != opened.run_id:
        raise ConfigError(
            f"output.path: {folder.root} holds another run ({recorded.run_id}), which differs in "
            f"{differences(recorded.identity, opened.identity)}; choose another folder, or start over with --overwrite."
        )
    changed = [
        f"{name} {recorded.versions.get(name)} then, {here} now"
        for name, here in opened.versions.items()
        if here != recorded.versions.get(name)
    ]
    if changed:
        logger.warning("Resuming in another environment, where last digits may differ: %s.", "; ".join(changed))
