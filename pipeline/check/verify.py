"""Verify: does the dataset hold what its receipts and its manifest say, down to the pixel?

Always: every file's digest, schema, row count and columns, every source row accounted for, and every image the
clean one moved by its epsilon along one sign. With `recompute`: the victim looks at the stored bytes again, in the
batches of the run, and every recorded prediction and sign is derived anew. With `source`: labels and clean images are
compared with the source's. From any layout a batch is first read back as its images at every epsilon, and a table
for each of what is recorded of them.

Damage is only what was read and is wrong, or what the listing does not have. What cannot be read now is a problem, and
no reason to drop anything.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline.attacks.base import Attack, AttackedModel, Goal, direction_sign
from pipeline.attacks.load import load_attack
from pipeline.config.schema import EvaluatorConfig
from pipeline.core.batches import UNLABELLED, Batch
from pipeline.core.errors import ConfigError, NonFiniteError, PipelineError, first_line, listing
from pipeline.core.images import OtherShapeError, UndecodableError, decode_image
from pipeline.core.lanes import Lanes, available_cores, chunk_images
from pipeline.core.lattice import common_sign, picture_to_sign, step
from pipeline.core.own_code import names_file
from pipeline.core.plan import Plan, Shard
from pipeline.core.variants import CLEAN, Variant
from pipeline.engine.compute import compile_victim, own_copy
from pipeline.engine.execute import draw_numbers
from pipeline.engine.loader import Reader, load_batches
from pipeline.engine.run import (
    PACKAGES,
    attack_target,
    choose_device,
    load_run_model,
    make_attacker,
    naming_evaluator,
    open_run_source,
    versions,
)
from pipeline.engine.scores import contents_of, count, score
from pipeline.layouts.base import COLUMNS, EPSILON, FILE, Scores, evaluator_columns, kept_columns, make_features
from pipeline.models.base import Model
from pipeline.models.label_space import LabelSpace, is_one_to_one, map_classes, recorded_indices
from pipeline.output.card import make_configs, read_configs, write_summaries
from pipeline.output.folder import (
    FileEntry,
    OutputFolder,
    Receipt,
    VariantCounts,
    add_up,
    committed,
    read_receipts,
    shard_file,
)
from pipeline.output.manifest import (
    Manifest,
    altered_manifest,
    contradictions,
    read_manifest,
    require_manifest,
    summarise,
)
from pipeline.output.shards import FOOTER_KEY

logger = logging.getLogger(__name__)

# In another environment logits may differ by this much: a prediction may fall otherwise where the recorded class is as
# close to the top one, and probabilities may be off by as much. Not all of an environment can be recorded (a virtual
# machine may hide what its CPU can do), so this much is nowhere damage where digits differ at all.
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 2e-2}
# The part of an image's squared gradient that may lie on signs that fell otherwise. A sign falls otherwise only where
# the gradient changes by more than its own size, so the squares there add up to no more than the change's. Rounding
# alone changes a gradient by 1e-6 of its norm in fp32, but by up to 8% where it switches a ReLU or the choice of a max
# pooling, and by up to 37% in bf16. Over 9 models and 800 images, with other kernels of oneDNN, MKL and PyTorch, at
# most 3e-4 of an image lay there in fp32, and 1e-2 in bf16. Signs that have nothing to do with the gradient are wrong
# on half of it.
SIGN_TOLERANCE = {"fp32": 1e-2, "tf32": 0.1, "bf16": 0.1}
# The share of an image's values that may be others, of an attack that is not on a ray: its steps multiply what rounding
# began. Of 10 and 40 steps on three models, computed in float64 and in bf16 in place of fp32, at most 55% were others;
# of images that are those of other rows, at least 76%, and of clean ones 70%.
VALUE_TOLERANCE = 0.65
# Where the probability p of the class is this close to 1 the whole gradient is rounding: it has the factor 1 - p, which
# is known to 6e-8, 6% of this.
SATURATED = 1e-6
# Shards that cannot be read, after which the others are not tried: a store that fails takes half a minute for each.
MOST_UNREAD = 5
# Problems listed in full; the rest are counted.
LISTED = 20


@dataclass
class Findings:
    """What verification saw. `problems` are sentences; `damaged` names the shards to write again; `others` are files in
    the dataset's folders that are not of it, and that no reader takes for a part of it."""

    problems: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)
    missing: int = 0
    shards: int = 0
    rows: int = 0
    skipped: int = 0
    outside_ball: int = 0
    unread: int = 0
    recomputed: int = 0
    mismatches: int = 0
    near_ties: int = 0
    near_tie_signs: int = 0
    last_digits: int = 0
    changes: set[str] = field(default_factory=set)
    compared: int = 0

    def damage(self, shard: str, problem: str) -> None:
        self.damaged.add(shard)
        self.problems.append(problem)

    def cannot_read(self, shard: str, reason: str) -> None:
        self.unread += 1
        self.problems.append(
            f"{shard} cannot be read now ({reason.rstrip('.')}), so it was neither checked nor dropped; mend the disk, "
            "its permissions or the store, and verify again."
        )


@dataclass(frozen=True)
class Judge:
    """The attack and the models that are asked again, what the attack wanted, and the environment of the answers."""

    attack: Attack
    victim: Model
    goal: Goal
    evaluators: dict[str, Model]
    lanes: Lanes
    versions: dict[str, str]
    compiled_alike: bool


def verify(
    path: str | Path, *, recompute: bool = False, source: bool = False, repair: bool = False, unlocked: bool = False
) -> Findings:
    """Check a dataset.

    Args:
        path: the output folder.
        recompute: derive every prediction and every sign anew from the stored bytes.
        source: open the source that the manifest names, and compare labels and clean images with it.
        repair: drop the receipts and files of damaged shards, so that `generate` writes them again.
        unlocked: of a repair; as in `generate`.

    Raises:
        PipelineError: there is no run in the folder, or its victim cannot be loaded again.
    """
    folder = OutputFolder(path)
    manifest = require_manifest(folder)
    _check_manifest(manifest, folder)
    findings = Findings()
    plan = manifest.plan
    sizes = folder.store.sizes()
    found, broken = read_receipts(folder, sizes)
    # Those of other runs are what these left, and no part of this dataset.
    ending = f"-{manifest.edition}"
    receipts = {stem.removesuffix(ending): receipt for stem, receipt in found.items() if stem.endswith(ending)}
    for name in broken:
        if Path(name).stem.endswith(ending):
            damaged = Path(name).stem.removesuffix(ending)
            findings.damage(damaged, f".run/receipts/{name} was altered, or is no receipt.")
    if found and not receipts and not findings.damaged:
        # Nothing else is said: all that follows from this manifest would blame what is sound.
        other = min(receipt.run_id for receipt in found.values())
        findings.problems.append(
            f"manifest.json is of another run ({manifest.run_id}) than all receipts ({other}); if it belongs "
            "here, run the generate command that made it; if not, restore the one that does, or delete it and run "
            "generate again, which writes it anew."
        )
        return findings
    _check_listing(manifest, plan, receipts, sizes, findings)
    with contextlib.ExitStack() as stack:
        shards = [shard for shard in plan.shards if shard.name in receipts and shard.name not in findings.damaged]
        # Loading a victim may run code that the manifest names: never for a dataset of which nothing was made here.
        judge = None
        if recompute and shards:
            announce_factories(folder, manifest)
            judge = stack.enter_context(_judge(manifest))
        reader = _open_source(manifest, findings) if source and shards else None
        decoders = stack.enter_context(ThreadPoolExecutor(available_cores()))
        checker = _Checker(folder, manifest, plan, sizes, findings, judge, reader, decoders)
        for shard in tqdm(shards, unit="shard", desc="verify", disable=None):
            if findings.unread == MOST_UNREAD:
                findings.problems.append("The shards after those were not checked.")
                break
            checker.check(shard, receipts[shard.name])
    _check_summaries(folder, manifest, plan, findings)
    if repair:
        _drop(folder, manifest, plan, findings.damaged, unlocked)
    return findings


def announce_factories(folder: OutputFolder, manifest: Manifest) -> None:
    """Say what code of the user's is about to run because a manifest names it; a dataset never brings its own along.

    It may be that of a model or of an attack.

    Raises:
        ConfigError: the code may lie in the dataset's own folder.
    """
    config = manifest.resolved
    # Nothing that lies in an object store is imported from there.
    own = [Path(folder.root).resolve()] if folder.store.local else []
    named = [("model.name", model.own_code) for model in (config.model, *config.evaluators)]
    for key, name in [*named, ("attack.kind", config.attack.own_code)]:
        if name is None:
            continue
        file = Path(name.rpartition(":")[0])
        inside = any(Path.cwd().resolve().is_relative_to(root) for root in own)
        if names_file(name):
            # `generate` records whole paths; what is relative was published, or written by hand.
            inside = not file.is_absolute() or any(file.resolve().is_relative_to(root) for root in own)
        if inside:
            raise ConfigError(
                f"{key}: {name} would be code out of the dataset itself, which is never run; "
                "put it elsewhere, delete manifest.json and run generate with a config that names its whole path, or "
                "work from another folder."
            )
        logger.warning("Running code that the manifest names: %s. Only for datasets that you trust.", name)


@contextlib.contextmanager
def _judge(manifest: Manifest) -> Iterator[Judge]:
    config = manifest.resolved
    precision = config.runtime.precision
    try:
        device = choose_device(config.runtime.device, precision)
    except ConfigError:
        device = choose_device("auto")
    loaded = load_attack(config.attack)
    if loaded.digest != manifest.identity.get("attack.content"):
        raise ConfigError(
            "attack.kind: the code that the config names has changed since the run, so it cannot be asked again."
        )
    victim = load_run_model(config.model, config, device)
    if victim.digest != manifest.identity.get("model.content"):
        raise ConfigError(
            "model: the victim that the config names has changed since the run, so it cannot be asked again."
        )
    victim.space = manifest.spaces["model"]
    evaluators = {other.id: _open_evaluator(other, manifest, device) for other in config.evaluators}
    compiled_alike = not config.runtime.compile or _compiles(loaded.attack, victim, evaluators, manifest, device)
    chunk = chunk_images(device, config.runtime.batch_size, manifest.shape)
    recorded = manifest.identity.get("runtime.chunk")
    if device.type == config.runtime.device and isinstance(recorded, int) and recorded > 0:
        chunk = recorded
    with Lanes(device, chunk) as lanes:
        goal = Goal(config.attack.label, attack_target(config, victim.space))
        yield Judge(loaded.attack, victim, goal, evaluators, lanes, versions(device), compiled_alike)


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


def _open_evaluator(config: EvaluatorConfig, manifest: Manifest, device: torch.device) -> Model:
    with naming_evaluator(config.id):
        model = load_run_model(config, manifest.resolved, device)
        unchanged = model.digest == manifest.identity.get(f"evaluators.{config.id}.content")
        if config.id not in manifest.evaluators or not unchanged:
            raise ConfigError("it has changed since the run, so it cannot be asked again.")
    model.space = manifest.spaces[f"evaluators.{config.id}"]
    return model


def _compiles(
    attack: Attack, victim: Model, evaluators: Mapping[str, Model], manifest: Manifest, device: torch.device
) -> bool:
    """Compile the models as the run's were; where that fails they run as they are, with other last digits."""
    config = manifest.resolved
    attacker = make_attacker(config, attack, victim, Goal(), evaluators)
    try:
        compile_victim(attacker, device, manifest.shape, config.runtime.batch_size)
    except PipelineError as error:
        logger.warning("%s; its predictions are compared as from another environment.", error)
        return False
    return True


def _check_manifest(manifest: Manifest, folder: OutputFolder) -> None:
    """The parts of a manifest agree with each other. Where they do not, what follows from it would blame other files.

    Raises:
        PipelineError: they do not.
    """
    config = manifest.resolved
    wrong = contradictions(manifest)
    spaces = manifest.spaces
    asked = {"model": config.model.label_map}
    # An evaluator that the manifest does not have makes other features too.
    asked |= {name: other.label_map for other in config.evaluators if (name := f"evaluators.{other.id}") in spaces}
    wrong += [name for name, label_map in asked.items() if not _fits(label_map, spaces[name])]
    if wrong:
        raise altered_manifest(folder, f"it contradicts itself in {', '.join(wrong)}")


def _fits(asked: Any, space: LabelSpace) -> bool:
    """Whether a model's classes are recorded as its label map asks for, as far as its names are not needed."""
    count = len(space.to_recorded)
    if not np.array_equal(space.to_recorded, recorded_indices(space.to_model, count)):
        return False
    if is_one_to_one(space.to_model, count) and space.recorded_classes != space.dataset_classes:
        return False
    if not isinstance(asked, Mapping) or any(isinstance(value, str) for value in asked.values()):
        return True
    try:
        return np.array_equal(space.to_model, map_classes(asked, space.dataset_classes, None, count))
    except ConfigError:
        return False


def _check_listing(
    manifest: Manifest,
    plan: Plan,
    receipts: Mapping[str, Receipt],
    sizes: Mapping[str, int],
    findings: Findings,
) -> None:
    """Every shard of the plan has a receipt of this run, and no other file would be loaded along."""
    stored = manifest.stored  # once: it is derived from the config, which is parsed each time
    absent = [shard for shard in plan.shards if shard.name not in receipts and shard.name not in findings.damaged]
    findings.missing = len(absent)
    there = [s.name for s in absent if all(shard_file(subset, s, manifest.edition) in sizes for subset in stored)]
    unchecked = set(there)
    missing = [shard.name for shard in absent if shard.name not in unchecked]
    if missing:
        findings.problems.append(
            f"{len(missing)} of {len(plan.shards)} shards are missing, {missing[0]} first; generate writes them."
        )
    if there:
        findings.problems.append(
            f"{len(there)} of {len(plan.shards)} shards have no receipt in {OutputFolder.receipts}, {there[0]} first, "
            "so they were not checked, though their files are there; copy that folder too, if the dataset was copied "
            "without it, or let generate write them again."
        )
    planned = {shard.name for shard in plan.shards}
    for name, receipt in receipts.items():
        if name not in planned:
            file = f".run/receipts/{name}-{manifest.edition}.json"
            findings.problems.append(f"{file} belongs to no shard of this run; delete it.")
        elif receipt.run_id != manifest.run_id:
            findings.damage(name, f".run/receipts/{name}-{manifest.edition}.json is of another run ({receipt.run_id}).")
    expected = {shard_file(subset, shard, manifest.edition) for shard in plan.shards for subset in stored}
    others = sorted(name for name in sizes if name.split("/")[0] in stored and name not in expected)
    # By their names the card takes these for shards of the run.
    strange = [name for name in others if name.endswith(f"-{manifest.edition}.parquet")]
    findings.problems += [f"{file} belongs to no shard of this run; delete it." for file in strange]
    findings.others = [name for name in others if name not in strange]


def _check_summaries(folder: OutputFolder, manifest: Manifest, plan: Plan, findings: Findings) -> None:
    """The manifest's totals and the card's subsets follow from the receipts, if those are sound themselves."""
    if findings.damaged:
        return
    expected = summarise(manifest, committed(folder, manifest.edition, plan.shards))
    differing = [key for key in type(manifest).model_fields if getattr(manifest, key) != getattr(expected, key)]
    card = read_configs(folder)
    if manifest.files == expected.files and card == make_configs(manifest) != make_configs(expected):
        # Two to one: manifest and card were made from other receipts of the same files.
        findings.problems.append(
            f"{folder.receipts} holds an altered receipt: manifest.json and README.md were made from another. Restore "
            "it, as generate would take it for what it says now."
        )
        return
    if differing:
        findings.problems.append(
            f"manifest.json does not agree with the receipts in {', '.join(differing)}; generate writes it again."
        )
    if card != make_configs(expected):
        findings.problems.append("README.md does not list the subsets as they are; generate writes it again.")


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


@dataclass(frozen=True)
class _Answer:
    """What the models say of M rows: the logits of each (1 + K, M, classes), the victim's first.

    differing (M,) int64: values of a row that the attack does not give again: whose stored sign is not its direction's
    or, of an attack that is not on a ray, that are another at some epsilon. share (M,): the part of the row's squared
    direction that lies there, 0 where all of the gradient is rounding; or the share of all values.
    """

    logits: list[Tensor]
    differing: Tensor
    share: Tensor


def _look_again(judge: Judge, levels: Sequence[int], clipped: bool, *chunk: Tensor) -> _Answer:
    """Ask the models about a chunk again, and attack it again.

    Args:
        judge: the models and the attack.
        levels: epsilons in grey levels, without 0.
        clipped: whether the stored sign is 0 where clip(x + s) is x.
        chunk: 1 + K times (N, C, H, W) uint8, the stored sign (N, C, H, W) int8, the model's index (N,) int64 of the
            class whose loss was changed, the random numbers of the rows (N,) int64, then which rows are valid, (N,)
            bool.
    """
    *images, sign, classes, draws, valid = chunk
    victim = own_copy(judge.victim)
    # The clean logits of the run came with the gradient, and some layers (attention) have another kernel for
    # that, with other last digits.
    model = AttackedModel(victim, images[0], targeted=judge.goal.target is not None)
    perturbed = judge.attack.perturb(model, images[0], classes, levels, draws)
    logits = [torch.stack([model.logits, *map(victim.predict, images[1:])])]
    logits += [torch.stack([*map(other.predict, images)]) for other in map(own_copy, judge.evaluators.values())]
    if perturbed.direction is None:
        differs = torch.stack([*map(torch.ne, perturbed.images, images[1:])]).any(0).flatten(1)
        share = differs.float().mean(1)
    else:
        again = direction_sign(perturbed.direction)
        if clipped:
            again = again * (step(images[0], again, 1) != images[0])
        differs = (again != sign).flatten(1)
        share = _squares(perturbed.direction, differs)
        chosen = model.logits.log_softmax(1).gather(1, classes.unsqueeze(1)).squeeze(1)
        share = share.where(-chosen.expm1() > SATURATED, 0.0)
    return _Answer([answers[:, valid].cpu() for answers in logits], differs.sum(1)[valid].cpu(), share[valid].cpu())


def _squares(direction: Tensor, chosen: Tensor) -> Tensor:
    """The part of each row's squares of a direction (N, C, H, W) that lies where (N, C * H * W) says, (N,)."""
    values = direction.float().flatten(1)
    # Of very small numbers the squares would be 0.
    squares = (values / values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).square()
    return (squares * chosen).sum(1) / squares.sum(1).clamp(min=1.0)


def _features(manifest: Manifest, folder: OutputFolder) -> datasets.Features:
    """The columns that a manifest says its files have.

    Raises:
        PipelineError: they cannot be read, or are not those that a run of its config writes.
    """
    config = manifest.resolved
    try:
        features = datasets.Features.from_dict(manifest.features)
        spaces = {name: manifest.spaces[f"evaluators.{name}"] for name in manifest.evaluators}
        kept = {name: features[name] for name in config.source.kept}
        expected = make_features(manifest.layout, contents_of(config, manifest.spaces["model"], spaces, kept))
    except Exception as error:  # what is no feature can raise anything there
        place = folder.store.at(folder.manifest)
        raise PipelineError(f"{place}: its features cannot be read: {first_line(error)}") from None
    # As JSON too: what `datasets` does not know of a feature it leaves out.
    if features != expected or json.loads(json.dumps(expected.to_dict())) != manifest.features:
        raise altered_manifest(folder, "its features are not those that a run of its config writes")
    return features


class _DamageError(Exception):
    """Ends the check of one shard; the message is the problem."""


class _UnreadError(Exception):
    """Ends the check of one shard, of which nothing can be said; the message is the reason."""


class _Checker:
    """Checks one shard after another: its files side by side, batch by batch."""

    def __init__(
        self,
        folder: OutputFolder,
        manifest: Manifest,
        plan: Plan,
        sizes: Mapping[str, int],
        findings: Findings,
        judge: Judge | None,
        reader: Reader | None,
        decoders: Executor,
    ) -> None:
        self.folder, self.plan, self.sizes = folder, plan, sizes
        self.findings, self.judge, self.reader, self.decoders = findings, judge, reader, decoders
        self.shape = torch.Size(manifest.shape)
        self.variants, self.stored, self.edition = manifest.variants, manifest.stored, manifest.edition
        self.levels = [variant.level for variant in self.variants]
        self.layout = manifest.layout
        self.on_ray = manifest.on_ray
        self.targeted = manifest.resolved.attack.target is not None
        self.run_id = manifest.run_id
        self.features = _features(manifest, folder)
        self.schema = self.features.arrow_schema
        self.listed = {entry.path: entry for entry in manifest.files}
        self.exact = True
        self.classes = {
            "label": len(manifest.dataset_classes),
            "prediction": len(manifest.to_recorded),
            "target": len(manifest.to_recorded),
        }
        self.seed, precision = manifest.resolved.runtime.seed, manifest.resolved.runtime.precision
        self.tolerance, self.sign_tolerance = TOLERANCE[precision], SIGN_TOLERANCE[precision]
        # What does not depend on epsilon.
        files = [FILE] if FILE in self.schema.names else []
        self.shared = ("label", "source_index", *files, *kept_columns(self.schema.names))
        self.evaluators = tuple(manifest.evaluators)

    def check(self, shard: Shard, receipt: Receipt) -> None:
        """Check a shard; what is wrong goes to the findings."""
        try:
            self._check_receipt(shard, receipt)
            self._compare_environment(receipt)
            for entry in receipt.files:
                self._check_size(shard, entry)
            with contextlib.ExitStack() as stack:
                root = self._fetch(stack, receipt)
                for entry in receipt.files:
                    self._check_digest(shard, entry, root)
                self._check_rows(shard, receipt, root)
        except _DamageError as damage:
            self.findings.damage(shard.name, str(damage))
        except (_UnreadError, OSError) as error:
            self.findings.cannot_read(shard.name, first_line(error))
            return
        self.findings.shards += 1

    def _check_receipt(self, shard: Shard, receipt: Receipt) -> None:
        """What a receipt says of its shard without looking at any row is what the plan says."""
        planned = receipt.planned if shard.rows is None else shard.rows
        if (receipt.shard, receipt.split, receipt.planned) != (shard.name, shard.split, planned):
            raise _DamageError(f"{self._receipt(shard)} is of another shard, or of another number of rows.")
        if [entry.path for entry in receipt.files] != [
            shard_file(subset, shard, self.edition) for subset in self.stored
        ]:
            raise _DamageError(f"{self._receipt(shard)} lists other files than the run has.")
        # Before anything is made for each row: the numbers may be any.
        if len(receipt.skipped) + receipt.rows != planned or {e.rows for e in receipt.files} != {receipt.rows}:
            raise _DamageError(f"{self._receipt(shard)} does not account for all source rows of its shard.")
        if not {"python", "device", *PACKAGES} <= set(receipt.versions):
            raise _DamageError(f"{self._receipt(shard)} does not say all versions.")

    def _receipt(self, shard: Shard) -> str:
        return self.folder.receipt(shard, self.edition)

    def _compare_environment(self, receipt: Receipt) -> None:
        """Each shard has its own: a run may have been resumed elsewhere."""
        if self.judge is None:
            return
        here = self.judge.versions
        changes = [
            f"{name} {receipt.versions.get(name)} then, {here.get(name)} now"
            for name in {**receipt.versions, **here}
            if receipt.versions.get(name) != here.get(name)
        ]
        changes += [] if self.judge.compiled_alike else ["not compiled now"]
        self.exact = not changes
        self.findings.changes.update(changes)

    def _fetch(self, stack: contextlib.ExitStack, receipt: Receipt) -> Path:
        """A local folder with a shard's files, until the stack is left."""
        try:
            return stack.enter_context(self.folder.store.fetched([entry.path for entry in receipt.files]))
        except PipelineError as error:  # a store's sentence
            raise _UnreadError(str(error)) from None

    def _check_size(self, shard: Shard, entry: FileEntry) -> None:
        size = self.sizes.get(entry.path)
        if size is None:
            raise _DamageError(f"{entry.path} is missing.")
        if size != entry.bytes:
            if self._is_listed(entry, bytes=size):
                raise _DamageError(
                    f"{self._receipt(shard)} says that {entry.path} has {entry.bytes} bytes, not {size}."
                )
            raise _DamageError(f"{entry.path} has {size} bytes; its receipt says {entry.bytes}.")

    def _check_digest(self, shard: Shard, entry: FileEntry, root: Path) -> None:
        with (root / entry.path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            if self._is_listed(entry, sha256=digest):
                raise _DamageError(f"{self._receipt(shard)} has another sha256 of {entry.path} than that has.")
            raise _DamageError(f"{entry.path} was altered: its sha256 is not its receipt's.")

    def _is_listed(self, entry: FileEntry, **found: Any) -> bool:
        """Whether the manifest lists a file as it was found: then its receipt is what was altered."""
        return self.listed.get(entry.path) == entry.model_copy(update=found)

    def _check_rows(self, shard: Shard, receipt: Receipt, root: Path) -> None:
        if shard.stop is None:
            shard = shard.with_rows(receipt.planned)
        self._check_skipped(shard, receipt)
        skipped = {row.position for row in receipt.skipped}
        places = list(self.plan.batches(shard))
        masks = [
            np.array([place.start + i not in skipped for i in range(place.stop - place.start)]) for place in places
        ]
        counts = [int(mask.sum()) for mask in masks]
        tables = zip(*(self._read(shard, subset, root, counts) for subset in self.stored), strict=True)
        self._zero_signs = (0, 0)
        with contextlib.closing(self._originals(shard)) as originals:
            batches = [
                self._check_batch(shard, self.plan.rows(shard, place)[mask], mask, subsets, next(originals), receipt)
                for place, mask, subsets in zip(places, masks, tables, strict=True)
            ]
        self._check_counts(shard, receipt, batches)
        self._check_zero_signs(shard, receipt)
        self.findings.rows += receipt.rows * len(self.stored)
        self.findings.skipped += len(skipped)

    def _check_skipped(self, shard: Shard, receipt: Receipt) -> None:
        """Skipped rows are in order, each at a place of the shard, and the source row that the plan has there."""
        positions = [row.position for row in receipt.skipped]
        if not positions:
            return
        if positions != sorted(set(positions)) or positions[-1] >= len(shard):
            raise _DamageError(f"{self._receipt(shard)} lists skipped rows at places that its shard does not have.")
        if [row.source_index for row in receipt.skipped] != self.plan.rows(shard)[positions].tolist():
            raise _DamageError(f"{self._receipt(shard)} lists skipped rows that the plan has elsewhere.")

    def _check_counts(self, shard: Shard, receipt: Receipt, batches: Sequence[Sequence[VariantCounts]]) -> None:
        """The counts of a receipt are those of the rows; the file's sha256 is that of the receipt by now."""
        found = [
            add_up(variant, [batch[index] for batch in batches], self.evaluators)
            for index, variant in enumerate(self.variants)
        ]
        for there, here, name in zip(receipt.counts, found, self._names(shard), strict=False):
            # The order of a sum changes its last digits: relatively, by at most the rows times 2**-53.
            if not math.isclose(there.confidence_sum, here.confidence_sum, rel_tol=1e-9) or there != here.model_copy(
                update={"confidence_sum": there.confidence_sum}
            ):
                raise _DamageError(f"{self._receipt(shard)} has other counts than the rows of {name}.")
        if len(receipt.counts) != len(found):
            raise _DamageError(f"{self._receipt(shard)} counts other epsilons than the run has.")

    def _check_zero_signs(self, shard: Shard, receipt: Receipt) -> None:
        """The share of zero signs is a whole number of values, as many as the images leave possible."""
        values = max(1, receipt.rows * self.shape.numel())
        count = round(receipt.zero_sign_share * values)
        least, most = self._zero_signs
        if count / values != receipt.zero_sign_share or not least <= count <= most:
            raise _DamageError(f"{self._receipt(shard)} has a zero_sign_share that the images do not give.")

    def _count_zero_signs(self, images: Sequence[Tensor], sign: Tensor) -> None:
        """Count the values of a batch that the attack did not move: the least and the most that there can be."""
        clean = images[0]
        still = sign == 0 if self.on_ray else torch.stack([pixels == clean for pixels in images[1:]]).all(0)
        # Where the sign itself is not stored, 0 is not told from a step beyond black or white, which is clipped.
        sure = still if self.layout.stores_sign or not self.on_ray else still & (clean > 0) & (clean < 255)
        self._zero_signs = (self._zero_signs[0] + int(sure.sum()), self._zero_signs[1] + int(still.sum()))

    def _names(self, shard: Shard) -> list[str]:
        """What messages call each epsilon's rows: their file, and the epsilon where they share it."""
        files = [shard_file(self.layout.subset(variant), shard, self.edition) for variant in self.variants]
        if not self.layout.per_image:
            return files
        return [f"{file} at {level}/255" for file, level in zip(files, self.levels, strict=True)]

    def _read(self, shard: Shard, subset: str, root: Path, counts: Sequence[int]) -> Iterator[pa.Table]:
        """One file's rows in tables of so many rows each, without holding the file in memory."""
        name = shard_file(subset, shard, self.edition)
        try:
            file = pq.ParquetFile(root / name)
            self._check_schema(name, file.schema_arrow)
            self._check_footer(name, file.metadata.metadata, shard, subset, sum(counts))
            if file.metadata.num_rows != sum(counts):
                raise _DamageError(f"{name} has {file.metadata.num_rows} rows; its receipt says {sum(counts)}.")
            waiting = self.schema.empty_table()
            batches = file.iter_batches(batch_size=max([1, *counts]))
            for count in counts:
                while waiting.num_rows < count:
                    batch = next(batches, None)
                    if batch is None:
                        raise _DamageError(f"{name} holds fewer rows than its own footer says.")
                    waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch]).cast(self.schema)])
                yield waiting.slice(0, count)
                waiting = waiting.slice(count)
        except MemoryError:  # Arrow has one of its own, which is of both kinds
            raise
        except (pa.ArrowException, OSError) as error:
            # Only what the operating system refuses has a number.
            kind = _UnreadError if isinstance(error, OSError) and error.errno is not None else _DamageError
            raise kind(f"{name} cannot be read: {first_line(error)}") from None

    def _originals(self, shard: Shard) -> Generator[Batch | None, None, None]:
        """A shard's batches as the source has them, and without end None where it cannot be asked."""
        try:
            if self.reader is not None:
                yield from load_batches(self.reader, self.plan, [shard], 0)
        except PipelineError as error:
            self.reader = None
            self.findings.problems.append(f"From {shard.name} on nothing was compared with the source: {error}")
        yield from itertools.repeat(None)

    def _check_schema(self, name: str, schema: pa.Schema) -> None:
        # Not the Arrow schemas: Parquet has its own name for the items of a list.
        features = datasets.Features.from_arrow_schema(schema)
        if features == self.features:
            return
        # Our own columns follow from the config. Those that are carried through, only the files and the manifest tell.
        kept = kept_columns(self.schema.names)
        if {**features, **{column: self.features[column] for column in kept}} == self.features:
            raise altered_manifest(self.folder, f"its features are not those of {name}, whose digest is its receipt's")
        raise _DamageError(f"{name} has other columns than the manifest says.")

    def _check_footer(self, name: str, metadata: Mapping[bytes, bytes], shard: Shard, subset: str, rows: int) -> None:
        """What the file says of itself is what it is taken for."""
        expected = {"run_id": self.run_id, "shard": shard.name, "rows": rows, "subset": subset}
        try:
            found = json.loads(metadata.get(FOOTER_KEY.encode(), b""))
        except ValueError:
            found = None
        if found != expected:
            raise _DamageError(f"{name} says of itself that it is another run's, shard's or subset's file.")

    def _check_batch(
        self,
        shard: Shard,
        rows: NDArray[np.int64],
        mask: NDArray[np.bool_],
        subsets: Sequence[pa.Table],
        original: Batch | None,
        receipt: Receipt,
    ) -> list[VariantCounts]:
        """Check one batch of every subset; what its rows at each epsilon add up to."""
        files = [shard_file(subset, shard, self.edition) for subset in self.stored]
        if not np.array_equal(subsets[0].column("source_index").to_numpy(), rows):
            raise _DamageError(f"{files[0]} holds other source rows than the plan says.")
        if shard.file is not None and set(subsets[0].column(FILE).to_pylist()) - {shard.file}:
            raise _DamageError(f"{files[0]} holds rows of another source file than the plan says.")
        images, sign, tables = self._unpack(dict(zip(self.stored, files, strict=True)), subsets)
        names = self._names(shard)
        totals = []
        for variant, name, table in zip(self.variants, names, tables, strict=True):
            self._check_columns(name, variant, table, tables[0])
            totals.append(count(variant, table, tables[0], self.evaluators))
        self._check_pixels(names, images, sign, tables[0])
        self._count_zero_signs(images, sign)
        if original is not None:
            self._compare_source(original, files[0], mask, images[0], tables[0], receipt)
        if self.judge is not None and len(rows):
            self._recompute(self.judge, names, mask, images, sign, tables, draw_numbers(self.seed, shard, rows))
        return totals

    def _check_pixels(self, names: Sequence[str], images: Sequence[Tensor], sign: Tensor, clean: pa.Table) -> None:
        """Every image is the clean one, moved along the one sign if the attack has one, and in any case in its ball."""
        for level, name, pixels in zip(self.levels, names, images, strict=True):
            if self.on_ray and torch.equal(step(images[0], sign, level), pixels):
                continue
            distance = (pixels.to(torch.int16) - images[0].to(torch.int16)).abs()
            outside = int((distance > level).flatten(1).any(1).sum())
            if outside:
                self.findings.outside_ball += outside
                raise _DamageError(f"{name} has {outside} images outside the epsilon ball of {level}/255.")
            if not self.on_ray:
                continue
            other = (step(images[0], sign, level) != pixels).flatten(1).any(1).numpy()
            raise _DamageError(
                f"{name} has {int(other.sum())} images that are not the clean ones moved by {level}/255 along one sign "
                f"for all epsilons; the first is {_name_row(clean, other)}."
            )

    def _compare_source(
        self, original: Batch, name: str, mask: NDArray[np.bool_], images: Tensor, clean: pa.Table, receipt: Receipt
    ) -> None:
        """Labels, kept columns and clean images of a batch are the source's."""
        valid = original.valid[: len(mask)].numpy()
        labels = original.labels[: len(mask)].numpy()[mask]
        other = labels != _column(clean, "label", UNLABELLED)
        if other.any():
            raise _DamageError(
                f"{name} has {int(other.sum())} labels that are not the source's; the first is "
                f"{_name_row(clean, other)}."
            )
        decodes = np.array_equal(valid, mask)
        if decodes:
            for column in original.kept.column_names:
                kept = original.kept.column(column).cast(self.schema.field(column).type)
                if not kept.combine_chunks().equals(clean.column(column).combine_chunks()):
                    raise _DamageError(f"{name} has a {column} that is not the source's.")
            other = (original.images[original.valid] != images).flatten(1).any(1).numpy()
        if not decodes or other.any():
            self._report_decoded(name, receipt, f"{int(other.sum())} clean images" if decodes else "skipped rows")
        self.findings.compared += len(labels)

    def _report_decoded(self, name: str, receipt: Receipt, what: str) -> None:
        """What is decoded otherwise than in the run is damage only where the same libraries decode."""
        here = {package: importlib.metadata.version(package) for package in ("pillow", "torchvision")}
        then = {package: str(receipt.versions.get(package)) for package in here}
        if here == then:
            raise _DamageError(f"{name} has {what} that are not the source's.")
        others = ", ".join(f"{package} {then[package]} then, {here[package]} now" for package in here)
        self.findings.problems.append(
            f"{name} has {what} that are not the source's as it is decoded here ({others}); nothing is dropped for it."
        )

    def _unpack(
        self, files: Mapping[str, str], subsets: Sequence[pa.Table]
    ) -> tuple[list[Tensor], Tensor, list[pa.Table]]:
        """The images at every epsilon, 1 + K times (M, C, H, W) uint8, their sign, and what is recorded of them."""
        layout, variants, stored = self.layout, self.variants, dict(zip(files, subsets, strict=True))
        pictures = {
            picture: self._pictures(stored[picture.subset].column(picture.column), files[picture.subset])
            for picture in layout.pictures(variants)
        }
        try:
            tables = [layout.rows(stored, variant, variants) for variant in variants]
            if layout.stores_sign:
                clean, direction = (pictures[picture] for picture in layout.ray(variants[-1], variants))
                sign = picture_to_sign(direction)
                return [step(clean, sign, level) for level in self.levels], sign, tables
        except ValueError as error:
            raise _DamageError(f"{files[self.stored[0]]}: {error}.") from None
        images = [pictures[picture] for variant in variants for picture in layout.source(variant, variants)]
        return images, common_sign(images, self.levels), tables

    def _check_columns(self, name: str, variant: Variant, table: pa.Table, clean: pa.Table) -> None:
        for own in (column for column in COLUMNS if column.value is None):
            if not table.column(own.name).equals(pa.chunked_array([own.blank(variant, table.num_rows)])):
                value = f"{variant.level}/255" if own.name == EPSILON else own.of_variant(variant)
                raise _DamageError(f"{name} has another {own.name} than {value or 'null'}.")
        pairs = [("clean_prediction", "prediction"), *((column, column) for column in self.shared)]
        for column, original in pairs:
            if not table.column(column).equals(clean.column(original)):
                raise _DamageError(f"{name} has a {column} that differs from the clean subset's {original}.")
        self._check_nulls(name, variant, table)
        for column in {*self.classes} & {*table.column_names}:
            values = _column(table, column, 0)
            if ((values < 0) | (values >= self.classes[column])).any():
                raise _DamageError(f"{name} has a {column} that is no class.")
        for column in ("confidence", "label_confidence"):
            values = _column(table, column, 0.0)
            # A softmax may exceed 1 by its rounding.
            if not ((values >= 0) & (values < 1.001)).all():
                raise _DamageError(f"{name} has a {column} that is no probability.")

    def _check_nulls(self, name: str, variant: Variant, table: pa.Table) -> None:
        """Null is what cannot be said, and nothing else."""
        everywhere, nowhere = pa.repeat(True, table.num_rows), pa.repeat(False, table.num_rows)
        unlabelled = table.column("label").is_null()
        fooled = everywhere if variant == CLEAN else nowhere if self.targeted else unlabelled
        expected = {
            "prediction": nowhere,
            "confidence": nowhere,
            "label_confidence": unlabelled,
            "correct": unlabelled,
            "fooled": fooled,
            **({"target": everywhere if variant == CLEAN else nowhere} if self.targeted else {}),
        }
        for evaluator in self.evaluators:
            expected |= dict(zip(evaluator_columns(evaluator), (nowhere, unlabelled), strict=True))
        for column, nulls in expected.items():
            if not table.column(column).is_null().equals(pa.chunked_array(nulls)):
                raise _DamageError(f"{name} has a {column} that is null in other rows than it should be.")

    def _pictures(self, column: pa.ChunkedArray, name: str) -> Tensor:
        try:
            pixels = list(
                self.decoders.map(
                    partial(decode_image, shape=self.shape), column.combine_chunks().field("bytes").to_pylist()
                )
            )
        except OtherShapeError:
            raise _DamageError(f"{name} holds an image of another size.") from None
        except UndecodableError as error:
            raise _DamageError(f"{name} holds a broken image: {error}") from None
        return torch.stack(pixels) if pixels else torch.zeros((0, *self.shape), dtype=torch.uint8)

    def _recompute(
        self,
        judge: Judge,
        names: Sequence[str],
        mask: NDArray[np.bool_],
        images: Sequence[Tensor],
        sign: Tensor,
        tables: Sequence[pa.Table],
        draws: NDArray[np.int64],
    ) -> None:
        """Ask the models again, in the same batch of the same shape, with the same holes."""
        labels = torch.from_numpy(_column(tables[0], "label", UNLABELLED).astype(np.int64))
        own, target = self._wanted(judge, labels, tables)
        changed = own if target is None else target
        random = torch.from_numpy(draws)
        rows = [self._padded(mask, values) for values in (*images, sign, changed, random)]
        valid = self._padded(mask, torch.ones(len(changed), dtype=torch.bool))
        answer = self._ask(judge, rows, valid)
        victim, *others = answer.logits
        spaces = {name: evaluator.space for name, evaluator in judge.evaluators.items()}
        evaluations = [logits.argmax(-1) for logits in others]
        again = score(self.variants, victim, labels, target, judge.victim.space, evaluations, spaces)
        try:
            strict = self._compare_victim(judge, answer, again, names, tables)
            if target is not None:
                expected = judge.goal.classes(answer.logits[0][0], own, random)
                self._compare_target(judge, expected, target, answer.logits[0][0], names[-1], tables[-1], strict)
            self._compare_evaluators(judge, answer, again, names, tables, strict)
            self._compare_signs(judge, answer, names, tables[0], strict)
        except _DamageError:
            second = self._ask(judge, rows, valid)
            asked = ["model", *(f"evaluators, {name}" for name in judge.evaluators)]
            for name, before, now in zip(asked, answer.logits, second.logits, strict=True):
                if not bool(((before - now).abs() <= self.tolerance).all()):
                    raise PipelineError(
                        f"{name}: it is not deterministic: asked twice about the same images it gives different "
                        "answers, so that nothing can be derived anew; see whether it draws random numbers or keeps "
                        "something between calls."
                    ) from None
            raise

    def _padded(self, mask: NDArray[np.bool_], values: Tensor) -> Tensor:
        """The values of M rows, each in its place in the run's batch, with 0 between them."""
        batch = torch.zeros((self.plan.batch_size, *values.shape[1:]), dtype=values.dtype)
        batch[torch.from_numpy(np.flatnonzero(mask))] = values
        return batch

    def _ask(self, judge: Judge, rows: Sequence[Tensor], valid: Tensor) -> _Answer:
        ask = partial(_look_again, judge, self.levels[1:], not self.layout.stores_sign)
        try:
            parts = [future.result() for future in judge.lanes.submit(ask, *rows, valid=valid)]
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"A batch of {self.plan.batch_size}, as the run had it, does not fit in this device's memory; free "
                "what else uses it, or verify on the machine of the run."
            ) from error
        logits = [torch.cat(chunks, 1) for chunks in zip(*(part.logits for part in parts), strict=True)]
        share = torch.cat([part.share for part in parts])
        if not all(bool(torch.isfinite(values).all()) for values in (*logits, share)):
            raise NonFiniteError("The model gives NaN or infinity here, which it did not in the run.")
        return _Answer(logits, torch.cat([part.differing for part in parts]), share)

    def _wanted(self, judge: Judge, labels: Tensor, tables: Sequence[pa.Table]) -> tuple[Tensor, Tensor | None]:
        """Of each row, as the model's indices (M,): its own class, by which the attack went, and its target, if any.

        As they are recorded: a prediction that lies on a near tie may fall otherwise here.
        """
        to_model = torch.from_numpy(np.argsort(judge.victim.space.to_recorded))
        own = to_model[torch.from_numpy(_column(tables[0], "prediction", 0).astype(np.int64))]
        if judge.goal.label == "dataset":
            known = judge.victim.space.model_labels(labels)
            own = torch.where(known == UNLABELLED, own, known)
        if not self.targeted:
            return own, None
        return own, to_model[torch.from_numpy(_column(tables[-1], "target", 0).astype(np.int64))]

    def _near_ties(
        self, logits: Tensor, column: str, tables: Sequence[pa.Table], space: LabelSpace
    ) -> NDArray[np.bool_]:
        """(1 + K, M): whether the recorded class is as close to the top one as another environment may bring it."""
        recorded = np.stack([_column(table, column, -1) for table in tables])
        known = (recorded >= 0) & (recorded < logits.shape[-1])
        chosen = torch.from_numpy(np.argsort(space.to_recorded)[np.where(known, recorded, 0)])
        behind = logits.amax(-1) - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        close: NDArray[np.bool_] = (behind < self.tolerance).numpy() & known
        return close

    def _compare_predictions(
        self, expected: NDArray[np.int64], column: str, name: str, table: pa.Table, close: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Compare one model's predictions at one epsilon; (M,) those that fell otherwise on a near tie."""
        findings = self.findings
        differs = _column(table, column, -1) != expected
        ties: NDArray[np.bool_] = differs & close
        wrong = differs & ~ties
        findings.recomputed += len(differs)
        findings.near_ties += int(ties.sum())
        findings.mismatches += int(wrong.sum())
        if wrong.any():
            of = "" if column == "prediction" else f" in {column}"
            raise _DamageError(
                f"{name} records {int(wrong.sum())} predictions{of} that its pixels do not give; the first is "
                f"{_name_row(table, wrong)}."
            )
        return ties

    def _compare_victim(
        self, judge: Judge, answer: _Answer, again: Scores, names: Sequence[str], tables: Sequence[pa.Table]
    ) -> bool:
        """Compare what the victim says; whether it is so to the last digit, in an environment like the recorded one.

        There nothing is excused by other digits.
        """
        recorded = [_column(table, "confidence", 0.0) for table in tables]
        strict = self.exact and all(map(np.array_equal, recorded, again.confidence))
        close = self._near_ties(answer.logits[0], "prediction", tables, judge.victim.space) & (not strict)
        for index, (name, table) in enumerate(zip(names, tables, strict=True)):
            self._compare(again, index, name, table, close[index])
        return strict

    def _compare(self, again: Scores, index: int, name: str, table: pa.Table, close: NDArray[np.bool_]) -> None:
        ties = self._compare_predictions(again.prediction[0, index], "prediction", name, table, close)
        # What follows from a prediction that lay on a tie cannot be held against it, nor on the clean one's.
        checked = ~ties & (_column(table, "clean_prediction", -1) == again.prediction[0, 0])
        for column, flags in (("correct", again.correct[0, index]), ("fooled", again.fooled[index])):
            known = checked & ~np.ma.getmaskarray(flags)
            if (_column(table, column, False).astype(np.bool_) != flags.data)[known].any():
                raise _DamageError(f"{name} has a wrong value in {column}.")
        for column in ("confidence", "label_confidence"):
            expected = getattr(again, column)[index]
            off = np.abs(_column(table, column, 0.0) - np.ma.getdata(expected))[~np.ma.getmaskarray(expected)]
            if not (off <= self.tolerance).all():  # NaN is not
                raise _DamageError(f"{name} has a {column} that its pixels do not give.")
            self.findings.last_digits += int((off > 0).sum())

    def _compare_evaluators(
        self,
        judge: Judge,
        answer: _Answer,
        again: Scores,
        names: Sequence[str],
        tables: Sequence[pa.Table],
        strict: bool,
    ) -> None:
        for row, (evaluator, model) in enumerate(judge.evaluators.items(), 1):
            logits = answer.logits[row]
            prediction, correct = evaluator_columns(evaluator)
            close = self._near_ties(logits, prediction, tables, model.space) & (not strict)
            for index, (name, table) in enumerate(zip(names, tables, strict=True)):
                expected = again.prediction[row, index]
                ties = self._compare_predictions(expected, prediction, name, table, close[index])
                known = np.asarray(table.column("label").is_valid()) & ~ties
                if (_column(table, correct, False).astype(np.bool_) != again.correct.data[row, index])[known].any():
                    raise _DamageError(f"{name} has a wrong value in {correct}.")

    def _compare_target(
        self,
        judge: Judge,
        expected: Tensor,
        target: Tensor,
        logits: Tensor,
        name: str,
        table: pa.Table,
        strict: bool,
    ) -> None:
        """Compare the targets, (M,) the model's indices; the least likely class may be a near tie too."""
        wrong = (target != expected).numpy()
        if judge.goal.target == "least_likely" and not strict:
            above = logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.amin(1)
            ties = wrong & (above < self.tolerance).numpy()
            self.findings.near_ties += int(ties.sum())
            wrong &= ~ties
        if wrong.any():
            raise _DamageError(
                f"{name} records {int(wrong.sum())} targets that are not the attack's; the first is "
                f"{_name_row(table, wrong)}."
            )

    def _compare_signs(
        self, judge: Judge, answer: _Answer, names: Sequence[str], clean: pa.Table, strict: bool
    ) -> None:
        """The images lie along the sign of the gradient, but where that is rounding.

        A CPU gives each gradient again to the last digit; of CUDA some backward passes (of adaptive pooling and
        resizing) add in any order.
        """
        exact = strict and judge.lanes.device.type == "cpu"
        tolerance = self.sign_tolerance if self.on_ray else VALUE_TOLERANCE
        wrong = (answer.differing > 0 if exact else answer.share > tolerance).numpy()
        self.findings.near_tie_signs += int(answer.differing.numpy()[~wrong].sum())
        if wrong.any():
            they = "do not lie along the sign of the loss gradient" if self.on_ray else "the attack does not make again"
            raise _DamageError(
                f"{names[1]} has {int(wrong.sum())} images that {they}; the first is {_name_row(clean, wrong)}."
            )


def _name_row(table: pa.Table, which: NDArray[np.bool_]) -> str:
    """The first of some rows of a table, for messages."""
    first = table.slice(int(which.argmax()), 1)
    file = f" of {first.column(FILE)[0]}" if FILE in table.column_names else ""
    return f"row {first.column('source_index')[0]}{file}"


def _column(table: pa.Table, name: str, null: Any) -> NDArray[Any]:
    """A column as NumPy, with a stand-in for null."""
    values: NDArray[Any] = table.column(name).fill_null(null).to_numpy()
    return values


def _environment(findings: Findings) -> str:
    """In what environment predictions were compared, and what that changed."""
    if findings.changes:
        where = f"another environment than the recorded one ({'; '.join(sorted(findings.changes))})"
    elif findings.last_digits or findings.near_ties or findings.near_tie_signs:
        where = "another environment than the recorded one, though all that is recorded of it is the same"
    else:
        return "the recorded environment, exactly"
    return (
        f"{where}: {findings.last_digits:,} confidences differ in their last digits, with {findings.near_ties:,} near "
        f"ties that fell otherwise, and {findings.near_tie_signs:,} signs of gradients that are rounding"
    )


def describe(findings: Findings, recompute: bool, source: bool = False) -> str:
    """What was checked, in a few lines."""
    lines = [
        f"{findings.shards:,} shards and {findings.rows:,} rows checked; {findings.skipped:,} source rows were skipped",
        f"{findings.outside_ball:,} images outside their epsilon ball",
    ]
    if recompute:
        lines.append(
            f"{findings.recomputed:,} predictions re-derived from the stored pixels, {findings.mismatches:,} differ; "
            f"compared in {_environment(findings)}"
        )
    if source:
        lines.append(f"{findings.compared:,} source rows compared with the source")
    if findings.unread:
        lines.append(f"{findings.unread:,} shards cannot be read now")
    if findings.others:
        lines.append(f"not of this dataset, and left alone: {listing(findings.others)}")
    lines.append(f"{len(findings.problems):,} problems in {len(findings.damaged):,} shards")
    return "\n".join(lines)


def damage_report(findings: Findings) -> list[str]:
    """The problems as lines, the first ones in full."""
    rest = len(findings.problems) - LISTED
    return findings.problems[:LISTED] + ([f"and {rest} more."] if rest > 0 else [])
