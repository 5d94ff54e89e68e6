"""Generate: the whole flow, from a config to a complete dataset.

What is there already is found out first, and what is missing is executed and summed up. An executor does the work, in
this process or elsewhere; its receipts are checked here. PyTorch and `datasets` take seconds to import, so they
are imported only once it is known that there is something to open.
"""

import contextlib
import functools
import logging
import pkgutil
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.check import check_paths
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, PipelineError, ShardsFailedError, listing
from pipeline.core.loading import say_loading
from pipeline.core.plan import Shard
from pipeline.engine.progress import Busy, Progress
from pipeline.executors import EXECUTORS, PART
from pipeline.executors.base import Executor, Work
from pipeline.output.card import card_agrees, renew_titles, write_summaries
from pipeline.output.disk import check_disk, in_flight
from pipeline.output.folder import OutputFolder, Receipt, committed
from pipeline.output.inputs import inputs_of, is_unchanged, remember
from pipeline.output.manifest import Manifest, ended, read_manifest, summarise, titles_of, with_titles
from pipeline.output.settings import another_run, check_settings, version_changes

if TYPE_CHECKING:
    from pipeline.engine.job import Job, Written
    from pipeline.engine.processes import Processes

# A shared folder may show late what another machine wrote: a client of NFS remembers for a minute what there was.
SHARED_SECONDS, POLL_SECONDS = 60.0, 0.5

logger = logging.getLogger(__name__)


def generate(
    config: Config,
    *,
    overwrite: bool = False,
    executor: str = "local",
    part: tuple[int, int] | None = None,
    unlocked: bool = False,
) -> Manifest:
    """Write the dataset that a config describes, or what is missing of it; as `pipeline.generate`.

    Returns:
        The manifest of the complete dataset; of a part, that of the dataset as far as it is there.
    """
    folder = OutputFolder(config.output.path)
    folder.check_usable()
    if part is not None:
        _check_part(executor, overwrite, unlocked)
    manifest = inputs = None
    if executor == "local":  # the workers of a cluster may see other files
        check_paths(config)
        inputs = inputs_of(config) if part is None else None
    if inputs and not overwrite:
        manifest = _unchanged(config, folder, inputs)
    while manifest is None:
        recorded = None if overwrite else read_manifest(folder)
        if recorded is not None:
            check_settings(config, recorded, folder)
        with _executor(executor, config, recorded, part) as execution:
            say_loading("torch", "datasets")
            from pipeline.engine import job as jobs

            try:
                manifest = _execute(execution, config, folder, recorded, overwrite, unlocked)
            except _BegunOtherwiseError:
                continue
            finally:
                jobs.close()
        # What was changed while it was read may be either in the dataset.
        if inputs and inputs_of(config) == inputs:
            remember(folder, manifest, inputs)
    if warning := manifest.zero_gradient_warning:
        logger.warning("%s.", warning)
    return manifest


def _unchanged(config: Config, folder: OutputFolder, inputs: str) -> Manifest | None:
    """The manifest of a dataset that is complete and was made of the same things; None of any other."""
    recorded = read_manifest(folder)
    if recorded is None or not is_unchanged(folder, recorded, inputs):
        return None
    done = committed(folder, recorded.edition, recorded.plan.shards)
    return recorded if _is_current(config, folder, recorded, done) else None


def _check_part(executor: str, overwrite: bool, unlocked: bool) -> None:
    """Refuse what does not go with a part."""
    if executor != "local":
        raise ConfigError(f"--part: a part is written on this machine; leave out --executor {executor}.")
    if overwrite:
        raise ConfigError(
            "--part: with --overwrite each part would remove what the others have written; choose another folder, or "
            "remove the dataset that is there before the parts start."
        )
    if unlocked:
        raise ConfigError("--part: parts find each other by their locks, so --unlocked does not go with it.")


def _executor(name: str, config: Config, recorded: Manifest | None, part: tuple[int, int] | None) -> Executor:
    """Whoever does the work; refuses a name that nobody has, and one whose library is not installed."""
    if name not in EXECUTORS:
        raise ConfigError(f"--executor: got {name!r}; allowed: {', '.join(EXECUTORS)}.")
    runtime = config.runtime
    if recorded is not None and runtime.device == "auto":
        runtime = runtime.model_copy(update={"device": recorded.resolved.runtime.device})
    try:
        kind: type[Executor] = pkgutil.resolve_name(PART if part else EXECUTORS[name])
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"--executor {name}: {name.capitalize()} is not installed; it comes with pip install "
            f"'fgsm-pipeline[{name}]'."
        ) from None
    return kind(runtime, part)


class _BegunOtherwiseError(Exception):
    """Another part has begun the run meanwhile, and has resolved an `auto` otherwise or in a new generation."""


def _execute(
    executor: Executor,
    config: Config,
    folder: OutputFolder,
    recorded: Manifest | None,
    overwrite: bool,
    unlocked: bool,
) -> Manifest:
    """Find out what is missing, and have it written.

    After a `_BegunOtherwiseError` the run is to be opened again, as the manifest that is there now has it.
    """
    from pipeline.engine.execute import tell_speed
    from pipeline.engine.job import Job

    generation = folder.generation(over=overwrite) if recorded is None else recorded.generation
    output = str(Path(folder.root).absolute()) if folder.store.local else folder.root
    job = Job(config, output, recorded, generation)
    opened, warnings = executor.call(job.open)
    job = replace(job, recorded=opened)
    if recorded is not None or not (overwrite or executor.part):
        _check_same(opened, recorded, folder)
    shards = opened.plan.shards
    done = {} if overwrite else committed(folder, opened.edition, shards)
    if recorded is not None and _is_current(config, folder, recorded, done):
        return recorded
    for line in executor.call(job.describe):
        logger.info("%s", line)
    if recorded is not None:
        _warn_again(config, folder, recorded)
    own = executor.share(shards)
    missing = [shard for shard in shards if shard.name not in done]
    processes = _prepare(executor, job, folder, missing, {shard.name for shard in own}, overwrite)
    with folder.store.held(unlocked=unlocked, part=executor.part):
        with folder.store.alone():
            if executor.part:
                recorded = _joined(folder, opened, recorded)
            same = folder.generation(over=True) == generation if overwrite else read_manifest(folder) == recorded
            if not same:
                raise PipelineError(f"{folder.root} was changed by another run meanwhile; run the same command again.")
            begun = _begin(folder, _titled(config, folder, recorded) if recorded else opened, overwrite)
            begun, done, missing = _take_up(folder, begun, shards, own)
            folder.keep_warnings(begun.edition, warnings)
        try:
            already = [*done.values()]
            session = _write(executor, job, folder, opened, missing, already, processes) if missing else None
        except BaseException:
            # The card must describe the shards that are there; but what failed first is what the user must read.
            with contextlib.suppress(PipelineError), folder.store.alone():
                write_summaries(folder, ended(begun))
            raise
        with folder.store.alone():
            if session:
                tell_speed(folder, *session, opened)
            done = committed(folder, begun.edition, shards)
            manifest = write_summaries(folder, ended(begun), done)
    _check_complete(folder, own, done)
    if executor.part:
        left = len(shards) - len(done)
        name = executor.part.replace("-of-", " of ")
        logger.info("Part %s is done; %d of %d shards are still missing.", name, left, len(shards))
        folder.store.tidy()
    return manifest


def _prepare(
    executor: Executor, job: "Job", folder: OutputFolder, missing: list[Shard], own: set[str], overwrite: bool
) -> "Processes":
    """Decide how many processes of this machine write those that are missing of `own`, and see that its disk has room
    for all that are missing."""
    from pipeline.engine.processes import Processes

    processes = Processes()
    if not executor.remote:
        processes = job.processes([shard for shard in missing if shard.name in own], alone=not executor.part)
    if folder.store.local or not executor.remote:  # what waits for its upload lies on the workers' disks
        at_once = in_flight(folder, missing, processes.count)
        check_disk(executor.call(job.estimate_bytes, at_once), folder, overwrite=overwrite)
    return processes


def _joined(folder: OutputFolder, opened: Manifest, recorded: Manifest | None) -> Manifest | None:
    """The manifest that a part goes on with: another may have begun the run, or summed it up, since it was read."""
    there = read_manifest(folder)
    if there is None and recorded is None:
        _check_same(opened, None, folder)
    if there is None or (recorded is not None and recorded.run_id != there.run_id):
        return recorded
    if there.edition != opened.edition:
        raise _BegunOtherwiseError
    return there


def _write(
    executor: Executor,
    job: "Job",
    folder: OutputFolder,
    opened: Manifest,
    shards: Sequence[Shard],
    done: list[Receipt],
    processes: "Processes",
) -> tuple[Progress, dict[str, float]]:
    """Have some shards written, show how far they are, and check their receipts; `done` are those of all others, to
    which each that arrives is added.

    Returns how far it came and how fast, and how busy each stage was, 1 for always.
    """
    from pipeline.engine.execute import check_share_skipped

    by_name, here, failed, busy = {shard.name: shard for shard in shards}, list[Receipt](), None, Busy()
    skipped, read = sum(len(receipt.skipped) for receipt in done), sum(receipt.planned for receipt in done)
    total, most = opened.plan.total, opened.resolved.runtime.max_skipped
    own = {shard.name: shard.rows for shard in executor.share(opened.plan.shards)}
    rows = [rows for rows in own.values() if rows is not None]
    finished = sum(receipt.planned for receipt in done if receipt.shard in own)
    subsets = [variant.subset for variant in opened.variants]
    with Progress(sum(rows) if len(rows) == len(own) else None, finished, subsets) as progress:
        handles = () if executor.remote else folder.store.handles()
        work = Work(
            here=functools.partial(job.write, folder=folder, done=done, tell=progress.update),
            # By the folder that is held, where a process inherits what holds it; else by its address.
            elsewhere=functools.partial(job.write, folder=folder) if handles else job.write,
            tell=progress.update,
            processes=processes,
            handles=handles,
        )
        run = executor.run(shards, work)
        try:
            with contextlib.closing(_receipts(run, folder, busy)) as receipts:
                for receipt in receipts:
                    shard = by_name[receipt.shard]
                    if executor.remote:
                        if not here:
                            _see(executor, folder, opened, [shard])
                        progress.update(*receipt.progress)
                    here.append(receipt)
                    done.append(receipt)  # a further portion counts the rows that were skipped in all
                    skipped, read = skipped + len(receipt.skipped), read + receipt.planned
                    if receipt.skipped:
                        check_share_skipped(skipped, total, read, most, shard, receipt.skipped[-1])
        except ShardsFailedError as error:
            failed = error
    _see(executor, folder, opened, [by_name[receipt.shard] for receipt in here])
    if failed:
        there = committed(folder, opened.edition, shards)  # one may have failed after its commit
        reasons = {name: reason for name, reason in failed.reasons.items() if name not in there}
        if reasons:
            raise ShardsFailedError(reasons, failed.total, failed.retries) from failed
    elif untold := by_name.keys() - {receipt.shard for receipt in here}:
        lost = sorted(untold - committed(folder, opened.edition, shards).keys())
        if lost:
            raise PipelineError(
                f"{type(executor).__name__} ended without writing {len(lost)} of {len(shards)} shards "
                f"({listing(lost)}); run the same command again to write them."
            )
    return progress, busy.shares(dict.fromkeys(busy.seconds, executor.workers))


def _receipts(
    run: "Generator[Written | None, None, None]", folder: OutputFolder, busy: Busy
) -> Generator[Receipt, None, None]:
    """The receipts of what an executor writes, as long as the output is held."""
    with contextlib.closing(run):
        for written in run:
            if written is None:
                folder.store.check_held()
                continue
            for stage, seconds in written.seconds.items():
                busy.add(stage, seconds)
            yield written.receipt


def _see(executor: Executor, folder: OutputFolder, opened: Manifest, shards: Sequence[Shard]) -> None:
    """Wait until the output, as it is seen from here, holds what other machines have written; not for ever."""
    if not executor.remote:
        return  # what is removed meanwhile the caller names
    end = time.monotonic() + SHARED_SECONDS
    while missing := [shard for shard in shards if shard.name not in committed(folder, opened.edition, shards)]:
        if time.monotonic() > end:
            raise PipelineError(
                f"output.path: a worker has written shard {missing[0].name}, and {folder.root} on this machine does "
                "not hold it; it must be a folder that all nodes of the cluster share, or an object store."
            )
        time.sleep(POLL_SECONDS)


def _is_current(config: Config, folder: OutputFolder, recorded: Manifest, done: Mapping[str, Receipt]) -> bool:
    """Whether a dataset is complete, manifest and card say what follows from the receipts, and the titles are those of
    the config; says so if it is."""
    current = recorded.complete and summarise(ended(recorded), done) == recorded and card_agrees(folder, recorded)
    current = current and titles_of(recorded.resolved) == titles_of(config)
    if current:
        logger.info("All %d shards are already there.", len(done))
        _warn_again(config, folder, recorded)
        folder.store.tidy()
    return current


def _warn_again(config: Config, folder: OutputFolder, recorded: Manifest) -> None:
    """Say what was warned of when a run began: its models are not looked at a second time. A mean and a std that the
    config states by now are those that were taken, or it would be another run."""
    stated = {name for name, model in config.all_models.items() if model.mean is not None and model.std is not None}
    for warning in folder.kept_warnings(recorded.edition):
        if warning.unstated not in stated:
            logger.warning("%s.", warning.text)


def _titled(config: Config, folder: OutputFolder, recorded: Manifest) -> Manifest:
    """The manifest of a run that goes on, and its card, with the titles that the config has now."""
    if titles_of(recorded.resolved) == titles_of(config):
        return recorded
    titled = with_titles(recorded, config)
    # The card comes first: while the manifest has the old titles, a run that was killed here does this again.
    if renew_titles(folder, recorded, titled):
        logger.info("The titles have changed: the card is written again.")
    else:
        logger.warning("The titles have changed, and %s has others than before: change them there.", folder.card)
    return titled


def _take_up(
    folder: OutputFolder, begun: Manifest, shards: Sequence[Shard], own: Sequence[Shard]
) -> tuple[Manifest, dict[str, Receipt], list[Shard]]:
    """Sum up what is there of a run, and remove what is left of shards that were not committed.

    Returns the manifest as it is now, the receipts of the shards that are there, and which of `own` are missing.
    """
    sizes = folder.store.sizes()
    done = committed(folder, begun.edition, shards, sizes)
    begun = write_summaries(folder, begun, done)
    if done:
        logger.info("%d of %d shards are already there.", len(done), len(shards))
    missing = [shard for shard in own if shard.name not in done]
    folder.forget(missing, begun.edition, sizes)
    return begun, done, missing


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


def _check_complete(folder: OutputFolder, shards: Sequence[Shard], done: Mapping[str, Receipt]) -> None:
    """The end of a run is success only where all is there."""
    gone = [shard.name for shard in shards if shard.name not in done]
    if gone:
        raise PipelineError(
            f"{folder.root}: {len(gone)} of {len(shards)} shards were removed or changed while the run went on "
            f"({listing(gone)}); run the same command again to write them."
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
        raise another_run(folder, recorded, opened.identity, recorded.identity)
    if changed := version_changes(recorded.versions, opened.versions):
        logger.warning("Resuming in another environment, where last digits may differ: %s.", "; ".join(changed))
