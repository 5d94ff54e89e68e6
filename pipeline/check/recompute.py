"""Recompute: ask the models again about the stored bytes, in the batches of the run, and compare what they say.

Every recorded prediction, confidence and sign is derived anew. In another environment last digits differ: what lies
that close is counted, and is no damage.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.attacks.base import direction_sign
from pipeline.check.findings import DamageError, Findings, refuse_rows
from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, NonFiniteError, PipelineError
from pipeline.core.lanes import Lanes, chunk_images
from pipeline.core.lattice import step
from pipeline.core.plan import Plan
from pipeline.core.variants import by_attack
from pipeline.engine.compute import Attacker, ModelAttack, compile_models, look, own_copy
from pipeline.engine.run import choose_device, load_attacks, load_run_model, make_attacks, versions
from pipeline.engine.scores import own_models, score
from pipeline.layouts.base import Scores, model_columns
from pipeline.models.attacked import AttackedModel
from pipeline.models.label_space import LabelSpace
from pipeline.output.folder import Receipt
from pipeline.output.manifest import Manifest
from pipeline.output.settings import version_changes

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


@contextlib.contextmanager
def open_recomputation(manifest: Manifest, plan: Plan, findings: Findings) -> Iterator["Recomputation"]:
    """Load the attack and the models of a run again.

    Raises:
        ConfigError: one of them cannot be loaded, or has changed since the run.
    """
    config = manifest.resolved
    precision = config.runtime.precision
    try:
        device = choose_device(config.runtime.device, precision)
    except ConfigError:
        device = choose_device("auto")
    loaded = load_attacks(config)
    for name, attack in loaded.items():
        key = config.key("attack", name)
        _check_unchanged(manifest, f"attacks.{name}", key, attack.digest)
        if attack.attack.on_ray != manifest.on_ray(name):
            raise ConfigError(f"{key}: manifest.json was altered: its on_ray is not that of the attack.")
    models, spaces = {name: load_run_model(name, config, device) for name in config.all_models}, manifest.label_spaces
    for name, model in models.items():
        _check_unchanged(manifest, f"models.{name}", config.key("model", name), model.digest)
        model.space = spaces[name]
    attacks = make_attacks(config, {name: attack.attack for name, attack in loaded.items()}, spaces)
    attacker = Attacker(models, attacks, manifest.layout.stored)
    compiled_alike = True
    if config.runtime.compile:
        try:
            compile_models(attacker, device, manifest.shape, config.runtime.batch_size)
        except PipelineError as error:
            logger.warning("runtime.compile: %s; its predictions are compared as from another environment.", error)
            compiled_alike = False
    chunk = chunk_images(device, config.runtime.batch_size, manifest.shape)
    recorded = manifest.identity.get("runtime.chunk")
    if device.type == config.runtime.device and isinstance(recorded, int) and recorded > 0:
        chunk = recorded
    with Lanes(device, chunk) as lanes:
        yield Recomputation(attacker, lanes, versions(device), compiled_alike, manifest, plan, findings)


def _check_unchanged(manifest: Manifest, name: str, key: str, digest: str | None) -> None:
    if digest != manifest.identity.get(f"{name}.content"):
        raise ConfigError(f"{key}: what the config names has changed since the run, so it cannot be asked again.")


@dataclass(frozen=True)
class _Answer:
    """What E models say of M rows in V variants, and what A attacks make of them.

    logits: E times (V, M, classes). differing: A times (K, M) int64, values of a row that an attack does not give
    again: with K = 1 those whose stored sign is not its direction's or, of an attack that is not on a ray, at each of
    its K epsilons those that are another. share: A times (K, M), the part of the row's squared direction that lies
    there, 0 where all of the gradient is rounding; or the share of all values.
    """

    logits: list[Tensor]
    differing: list[Tensor]
    share: list[Tensor]


def _look_again(attacker: Attacker, clipped: bool, *chunk: Tensor) -> _Answer:
    """Ask the models about a chunk again, and attack it again. `clipped`: the stored sign is 0 where clip(x + s) is x.

    The chunk: V times the images (N, C, H, W) uint8; A times the stored sign (N, C, H, W) int8; the model's index of
    the class whose loss each attack changed, (N, A) int64; random numbers, (N,) int64; valid rows, (N,) bool.
    """
    *pictures, classes, draws, valid = chunk
    images, signs = pictures[: -len(attacker.attacks)], pictures[-len(attacker.attacks) :]
    models = {name: own_copy(model) for name, model in attacker.models.items()}
    clean: dict[str, Tensor] = {}
    found, first = [], 1
    for index, (each, sign) in enumerate(zip(attacker.attacks, signs, strict=True)):
        attacked = AttackedModel(models[each.model], images[0], targeted=each.goal.target is not None)
        own = classes[:, index].contiguous()
        perturbed = each.perturb(attacked, images[0], own, draws)
        if perturbed.direction is None:
            stored = images[first : first + len(each.levels)]
            differs = torch.stack([*map(torch.ne, perturbed.images, stored)]).flatten(2)
            share = differs.float().mean(2)
        else:
            again = direction_sign(perturbed.direction)
            if clipped:
                again = again * (step(images[0], again, 1) != images[0])
            differs = (again != sign).flatten(1)
            share = _squares(perturbed.direction, differs).unsqueeze(0)
            differs = differs.unsqueeze(0)
        if each.asks_model:
            # The clean logits of the run came with the gradient, and some layers (attention) have another kernel for
            # that, with other last digits.
            clean.setdefault(each.model, attacked.logits)
            if perturbed.direction is not None:
                chosen = attacked.logits.log_softmax(1).gather(1, own.unsqueeze(1)).squeeze(1)
                share = share.where(-chosen.expm1() > SATURATED, 0.0)
        found.append((differs.sum(2)[:, valid].cpu(), share[:, valid].cpu()))
        first += len(each.levels)
    logits = [torch.stack(answers)[:, valid].cpu() for _, answers in look(models, images, clean)]
    return _Answer(logits, *map(list, zip(*found, strict=True)))


def _squares(direction: Tensor, chosen: Tensor) -> Tensor:
    """The part of each row's squares of a direction (N, C, H, W) that lies where (N, C * H * W) says, (N,)."""
    values = direction.float().flatten(1)
    # Of very small numbers the squares would be 0.
    squares = (values / values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).square()
    return (squares * chosen).sum(1) / squares.sum(1).clamp(min=1.0)


class Recomputation:
    """Derives the rows of one shard after another anew."""

    def __init__(
        self,
        attacker: Attacker,
        lanes: Lanes,
        versions: Mapping[str, str],
        compiled_alike: bool,
        manifest: Manifest,
        plan: Plan,
        findings: Findings,
    ) -> None:
        self.attacker, self.lanes, self.versions, self.compiled_alike = attacker, lanes, versions, compiled_alike
        self.variants, self.layout, self.config = manifest.variants, manifest.layout, manifest.resolved
        self.spaces = {name: model.space for name, model in attacker.models.items()}
        self.plan, self.findings = plan, findings
        precision = self.config.runtime.precision
        self.tolerance, self.sign_tolerance = TOLERANCE[precision], SIGN_TOLERANCE[precision]
        self.exact = True

    def compare_environment(self, receipt: Receipt) -> None:
        """Each shard has its own: a run may have been resumed elsewhere."""
        changes = version_changes(receipt.versions, self.versions)
        changes += [] if self.compiled_alike else ["not compiled now"]
        self.exact = not changes
        self.findings.changes.update(changes)

    def check(
        self,
        names: Sequence[str],
        mask: NDArray[np.bool_],
        images: Sequence[Tensor],
        signs: Sequence[Tensor],
        recorded: Scores,
        clean: pa.Table,
        draws: NDArray[np.int64],
    ) -> None:
        """Ask the models again, in the same batch of the same shape, with the same holes.

        Args:
            names: what messages call the rows of each variant.
            mask: (N,) which rows of the run's batch are stored; M of them are.
            images: V times (M, C, H, W) uint8, clean first.
            signs: A times (M, C, H, W) int8, the direction of each attack that is stored, or follows from the images.
            recorded, clean: what the rows say of all these images, and the rows of the clean ones.
            draws: (M,) random numbers of the rows.
        """
        labels = torch.from_numpy(recorded.label.filled(UNLABELLED))
        attacks = list(zip(self.attacker.attacks, by_attack(self.variants), strict=True))
        owned = [self._own_classes(each, labels, recorded) for each, _ in attacks]
        targets = [self._targets(each, indices[-1], recorded) for each, indices in attacks]
        changed = [own if target is None else target for own, target in zip(owned, targets, strict=True)]
        random = torch.from_numpy(draws)
        rows = [self._padded(mask, values) for values in (*images, *signs, torch.stack(changed, 1), random)]
        valid = self._padded(mask, torch.ones(len(labels), dtype=torch.bool))
        answer = self._ask(rows, valid)
        logits = dict(zip(self.spaces, answer.logits, strict=True))
        of_variants: list[Tensor | None] = [None]
        for (_, indices), target in zip(attacks, targets, strict=True):
            of_variants += [target] * len(indices)
        own = [logits[name][index] for index, name in enumerate(own_models(self.variants, list(self.spaces)))]
        predictions = torch.stack([values.argmax(-1) for values in answer.logits])
        again = score(self.variants, own, predictions, labels, of_variants, self.spaces)
        strict = self.exact and np.array_equal(recorded.confidence, again.confidence)
        try:
            self._compare_predictions(answer, again, recorded, names, clean, strict)
            self._compare_confidences(again, recorded, names)
            for index, (each, indices) in enumerate(attacks):
                target, of_clean = targets[index], logits[each.model][0]
                if target is not None:
                    expected = each.goal.classes(of_clean, owned[index], random)
                    self._compare_target(each, expected, target, of_clean, names[indices[-1]], clean, strict)
                own_names = [names[variant] for variant in indices]
                self._compare_images(each, answer.differing[index], answer.share[index], own_names, clean, strict)
        except DamageError:
            second = self._ask(rows, valid)
            for name, before, now in zip(self.spaces, answer.logits, second.logits, strict=True):
                if not bool(((before - now).abs() <= self.tolerance).all()):
                    raise PipelineError(
                        f"{self.config.key('model', name)}: it is not deterministic: asked twice about the same images "
                        "it gives different answers, so nothing can be recomputed; see whether it draws random "
                        "numbers or keeps something between calls."
                    ) from None
            raise

    def _padded(self, mask: NDArray[np.bool_], values: Tensor) -> Tensor:
        """The values of M rows, each in its place in the run's batch, with 0 between them."""
        batch = torch.zeros((self.plan.batch_size, *values.shape[1:]), dtype=values.dtype)
        batch[torch.from_numpy(np.flatnonzero(mask))] = values
        return batch

    def _ask(self, rows: Sequence[Tensor], valid: Tensor) -> _Answer:
        ask = partial(_look_again, self.attacker, not self.layout.stores_sign)
        try:
            parts = [future.result() for future in self.lanes.submit(ask, *rows, valid=valid)]
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"A batch of {self.plan.batch_size}, as the run had it, does not fit in this device's memory; free "
                "what else uses it, or verify on the machine of the run."
            ) from error
        # What each lane says of its own rows, side by side.
        chunks = zip(*((part.logits, part.differing, part.share) for part in parts), strict=True)
        whole = _Answer(*([torch.cat(own, 1) for own in zip(*lists, strict=True)] for lists in chunks))
        if not all(bool(torch.isfinite(values).all()) for values in (*whole.logits, *whole.share)):
            raise NonFiniteError("The model gives NaN or infinity here, which it did not in the run.")
        return whole

    def _own_classes(self, attack: ModelAttack, labels: Tensor, recorded: Scores) -> Tensor:
        """Each row's own class, by which an attack goes, (M,) the model's indices."""
        # A prediction is taken as it is recorded: one that lies on a near tie may fall otherwise here.
        space = self.spaces[attack.model]
        clean = recorded.prediction[recorded.models.index(attack.model), 0]
        own = torch.from_numpy(np.argsort(space.to_recorded)[clean])
        if attack.goal.label == "prediction":
            return own
        return torch.where(labels == UNLABELLED, own, space.model_labels(labels))

    def _targets(self, attack: ModelAttack, variant: int, recorded: Scores) -> Tensor | None:
        """The recorded targets of an attack, (M,) the model's indices; None where it has none."""
        if attack.goal.target is None:
            return None
        return torch.from_numpy(np.argsort(self.spaces[attack.model].to_recorded)[recorded.target.data[variant]])

    def _near_ties(self, logits: Tensor, recorded: NDArray[np.int64], space: LabelSpace) -> NDArray[np.bool_]:
        """(V, M): whether the recorded class is as close to the top one as another environment may bring it."""
        known = (recorded >= 0) & (recorded < logits.shape[-1])
        chosen = torch.from_numpy(np.argsort(space.to_recorded)[np.where(known, recorded, 0)])
        behind = logits.amax(-1) - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        close: NDArray[np.bool_] = (behind < self.tolerance).numpy() & known
        return close

    def _compare_predictions(
        self, answer: _Answer, again: Scores, recorded: Scores, names: Sequence[str], clean: pa.Table, strict: bool
    ) -> None:
        """The models predict what is recorded, but on near ties. In an environment like the recorded one, where the
        confidences are the same to the last digit, nothing is excused (`strict`)."""
        asked = zip(answer.logits, recorded.prediction, self.spaces.values(), strict=True)
        close = np.stack([self._near_ties(logits, said, space) for logits, said, space in asked])
        differs = recorded.prediction != again.prediction
        wrong = differs if strict else differs & ~close
        self.findings.recomputed += differs.size
        self.findings.near_ties += int((differs & ~wrong).sum())
        self.findings.mismatches += int(wrong.sum())
        for model, variant in np.ndindex(wrong.shape[:2]):
            of = f" in {model_columns(recorded.models[model])[0]}" if len(recorded.models) > 1 else ""
            what = f"predictions{of} that do not follow from its pixels"
            refuse_rows(names[variant], wrong[model, variant], what, clean)

    def _compare_confidences(self, again: Scores, recorded: Scores, names: Sequence[str]) -> None:
        for column in ("confidence", "label_confidence"):
            off = np.ma.abs(getattr(again, column) - getattr(recorded, column))
            wrong = np.ma.filled(off > self.tolerance, False).any(1)
            if wrong.any():
                raise DamageError(f"{names[int(wrong.argmax())]} has a {column} that does not follow from its pixels.")
            self.findings.last_digits += int(np.ma.filled(off > 0, False).sum())

    def _compare_target(
        self,
        attack: ModelAttack,
        expected: Tensor,
        target: Tensor,
        logits: Tensor,
        name: str,
        clean: pa.Table,
        strict: bool,
    ) -> None:
        """Compare the targets, (M,) the model's indices; the least likely class may be a near tie too."""
        wrong = (target != expected).numpy()
        if attack.goal.target == "least_likely" and not strict:
            above = logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.amin(1)
            ties = wrong & (above < self.tolerance).numpy()
            self.findings.near_ties += int(ties.sum())
            wrong &= ~ties
        refuse_rows(name, wrong, "targets that are not the attack's", clean)

    def _compare_images(
        self,
        attack: ModelAttack,
        differing: Tensor,
        share: Tensor,
        names: Sequence[str],
        clean: pa.Table,
        strict: bool,
    ) -> None:
        """The images of an attack are those that it makes, or lie along the sign of its direction, but for rounding."""
        # A CPU gives each gradient again to the last digit; of CUDA some backward passes (of adaptive pooling and
        # resizing) add in any order. What asks no model is the same everywhere.
        exact, on_ray = not attack.asks_model or (strict and self.lanes.device.type == "cpu"), attack.attack.on_ray
        wrong = (differing > 0 if exact else share > (self.sign_tolerance if on_ray else VALUE_TOLERANCE)).numpy()
        self.findings.near_tie_signs += int(differing.numpy()[~wrong].sum())
        they = "do not lie along the sign of the attack's direction" if on_ray else "the attack does not reproduce"
        # With one direction the first name stands for all.
        for name, own in zip(names, wrong, strict=False):
            refuse_rows(name, own, f"images that {they}", clean)
