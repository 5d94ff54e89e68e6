"""Verify: does the dataset hold what its receipts and its manifest say, down to the pixel?

Always: every file's digest, schema, row count and columns, every source row accounted for, and every image the
clean one moved by its epsilon, along one sign if its attack has one. With `recompute`: the models look at the stored
bytes again, in the batches of the run, and every recorded prediction, target and attacked image is derived anew. With
`source`: labels and clean images are compared with the source's. From any layout a batch is first read back as its
images in every variant, and a table for each of what is recorded of them.

Damage is only what was read and is wrong, or what the listing does not have. What cannot be read now is a problem, and
no reason to drop anything.
"""

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.check.findings import MOST_UNREAD, Findings
from pipeline.check.integrity import ShardCheck, check_listing, check_manifest, check_summaries
from pipeline.check.recompute import open_recomputation
from pipeline.core.console import Bar
from pipeline.core.cores import available_cores
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.own_code import names_file
from pipeline.core.plan import Plan
from pipeline.engine.loader import Reader
from pipeline.engine.run import open_run_source
from pipeline.output.card import write_summaries
from pipeline.output.folder import OutputFolder, read_receipts, shard_file
from pipeline.output.manifest import Manifest, read_manifest, require_manifest

logger = logging.getLogger(__name__)


def verify(
    path: str | Path, *, recompute: bool = False, source: bool = False, repair: bool = False, unlocked: bool = False
) -> Findings:
    """Check a dataset.

    Args:
        path: the output folder.
        recompute: derive every prediction and every attacked image anew from the stored bytes.
        source: open the source that the manifest names, and compare labels and clean images with it.
        repair: drop the receipts and files of damaged shards, so that `generate` writes them again.
        unlocked: of a repair; as in `generate`.

    Raises:
        PipelineError: there is no run in the folder, or one of its models cannot be loaded again.
    """
    folder = OutputFolder(path)
    manifest = require_manifest(folder)
    check_manifest(manifest, folder)
    findings = Findings()
    plan = manifest.plan
    sizes = folder.store.sizes()
    found, broken = read_receipts(folder, sizes)
    # Those of other runs are what these left, and no part of this dataset.
    ending = f"-{manifest.edition}"
    receipts = {stem.removesuffix(ending): receipt for stem, receipt in found.items() if stem.endswith(ending)}
    for name in broken:
        if (stem := Path(name).stem).endswith(ending):
            findings.damage(stem.removesuffix(ending), f".run/receipts/{name} was altered, or is no receipt.")
    if found and not receipts and not findings.damaged:
        # Nothing else is said: all that follows from this manifest would blame what is sound.
        other = min(receipt.run_id for receipt in found.values())
        findings.problems.append(
            f"manifest.json is of another run ({manifest.run_id}) than all receipts ({other}); if it belongs "
            "here, run the generate command that made it; if not, restore the one that does, or delete it and run "
            "generate again, which writes it again."
        )
        return findings
    check_listing(manifest, plan, receipts, sizes, findings)
    with contextlib.ExitStack() as stack:
        shards = [shard for shard in plan.shards if shard.name in receipts and shard.name not in findings.damaged]
        # Loading a model may run code that the manifest names: never for a dataset of which nothing was made here.
        recomputation = None
        if recompute and shards:
            announce_factories(folder, manifest)
            recomputation = stack.enter_context(open_recomputation(manifest, plan, findings))
        reader = _open_source(manifest, findings) if source and shards else None
        decoders = stack.enter_context(ThreadPoolExecutor(available_cores()))
        rows = sum(receipts[shard.name].planned for shard in shards)
        progress = stack.enter_context(Bar(rows))
        checker = ShardCheck(folder, manifest, plan, sizes, findings, recomputation, reader, decoders, progress)
        for shard in shards:
            if findings.unread == MOST_UNREAD:
                findings.problems.append("The shards after those were not checked.")
                break
            checker.check(shard, receipts[shard.name])
    check_summaries(folder, manifest, plan, findings)
    if repair:
        _drop(folder, manifest, plan, findings.damaged, unlocked)
    return findings


def announce_factories(folder: OutputFolder, manifest: Manifest) -> None:
    """Say what code of the user's, of a model or an attack, is about to run because a manifest names it.

    Raises:
        ConfigError: the code may lie in the dataset's own folder.
    """
    config = manifest.resolved
    # Nothing that lies in an object store is imported from there.
    root = Path(folder.root).resolve() if folder.store.local else None
    named = [(f"{config.key('model', one)}.name", model.own_code) for one, model in config.all_models.items()]
    named += [(f"{config.key('attack', one)}.kind", attack.own_code) for one, attack in config.all_attacks.items()]
    for key, name in named:
        if name is None:
            continue
        file = Path(name.rpartition(":")[0]) if names_file(name) else Path.cwd()
        # `generate` records whole paths; what is relative was published, or written by hand.
        if not file.is_absolute() or (root and file.resolve().is_relative_to(root)):
            raise ConfigError(
                f"{key}: {name} would be code out of the dataset itself, which is never run; "
                "put it elsewhere, delete manifest.json and run generate with a config that names its whole path, or "
                "work from another folder."
            )
        logger.warning("Running code that the manifest names: %s. Only for datasets that you trust.", name)


def _open_source(manifest: Manifest, findings: Findings) -> Reader | None:
    """What reads the rows of the run's source; None where that is gone or another one, which is a problem."""
    config = manifest.resolved
    try:
        source = open_run_source(config)
    except PipelineError as error:
        findings.problems.append(f"Nothing was compared with the source: {error}")
        return None
    if source.digest != manifest.identity.get("source.content"):
        findings.problems.append("Nothing was compared with the source: it has changed since the run.")
        return None
    return Reader(source, config.preprocess, config.runtime.max_pixels, manifest.shape, len(manifest.dataset_classes))


def _drop(folder: OutputFolder, manifest: Manifest, plan: Plan, damaged: set[str], unlocked: bool) -> None:
    """Remove what is damaged, the receipts first: a shard without a receipt does not exist."""
    if not damaged:
        return
    with folder.store.held(unlocked=unlocked):
        if read_manifest(folder) != manifest:
            raise PipelineError(
                f"{folder.root} was changed by another run meanwhile, and nothing was dropped; verify again."
            )
        folder.store.delete(f"{folder.receipts}/{name}-{manifest.edition}.json" for name in damaged)
        shards = [shard for shard in plan.shards if shard.name in damaged]
        folder.store.delete(
            shard_file(subset, shard, manifest.edition) for subset in manifest.stored for shard in shards
        )
        write_summaries(folder, manifest)
