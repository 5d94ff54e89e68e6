"""Generate: the whole flow, from a config to a complete dataset.

What is there already is found out first, and what is missing is executed and summed up.
"""

import contextlib
import logging

from pipeline.card import card_agrees, write_summaries
from pipeline.config import Config
from pipeline.errors import ConfigError, PipelineError
from pipeline.estimate import check_disk
from pipeline.execute import write_shards
from pipeline.manifest import Manifest, read_manifest, summarise
from pipeline.outputs import OutputFolder, committed, read_receipts
from pipeline.runs import Run, differences, open_run, versions

logger = logging.getLogger(__name__)


def generate(config: Config, *, overwrite: bool = False) -> Manifest:
    """Write the dataset that a config describes, or what is missing of it.

    Args:
        config: the run.
        overwrite: remove the run that is in the output folder first.

    Returns:
        The manifest of the complete dataset.

    Raises:
        ConfigError: the config, or what it names, cannot be used; nothing was written.
        PipelineError: the run failed; what was committed is kept.
    """
    folder = OutputFolder(config.output.path)
    folder.check_usable()
    recorded = None if overwrite else read_manifest(folder)
    run = open_run(config, recorded)
    if not overwrite:
        _check_same(run, recorded, folder)
    shards = run.plan.shards
    done = {} if overwrite else committed(folder, run.run_id, shards)
    unchanged = recorded is not None and summarise(recorded, done) == recorded and card_agrees(folder, recorded)
    if recorded is not None and recorded.complete and unchanged:
        logger.info("All %d shards are already there.", len(shards))
        return recorded
    check_disk(run, folder, [shard for shard in shards if shard.name not in done], overwrite=overwrite)
    with folder.held():
        if overwrite:
            folder.clear()
        elif read_manifest(folder) != recorded:
            raise PipelineError(f"{folder.root} was changed by another run meanwhile; run the same command again.")
        done = committed(folder, run.run_id, shards)
        if done:
            logger.info("%d of %d shards are already there.", len(done), len(shards))
        missing = [shard for shard in shards if shard.name not in done]
        folder.forget(missing)
        manifest = write_summaries(folder, recorded or run.manifest(), done)
        try:
            write_shards(run, folder, missing, list(done.values()))
        except BaseException:
            # The card must describe the shards that are there; but what failed first is what the user must read.
            with contextlib.suppress(PipelineError):
                write_summaries(folder, manifest)
            raise
        return write_summaries(folder, manifest)


def _check_same(run: Run, recorded: Manifest | None, folder: OutputFolder) -> None:
    """Refuse to mix two runs in one folder."""
    if recorded is None:
        others = {receipt.run_id for receipt in read_receipts(folder)[0].values()} - {run.run_id}
        if others:
            raise ConfigError(
                f"output.path: {folder.root} holds shards of another run ({min(others)}) and no manifest; "
                "choose another folder, or start over with --overwrite."
            )
        return
    if recorded.run_id != run.run_id:
        raise ConfigError(
            f"output.path: {folder.root} holds another run ({recorded.run_id}), which differs in "
            f"{differences(recorded.identity, run.identity)}; choose another folder, or start over with --overwrite."
        )
    here = versions(run.device)
    changed = [
        f"{name} {recorded.versions.get(name)} then, {here[name]} now"
        for name in here
        if here[name] != recorded.versions.get(name)
    ]
    if changed:
        logger.warning("Resuming in another environment, where last digits may differ: %s.", "; ".join(changed))
