"""Recompute: ask the models again about the stored bytes, in the batches of the run, and compare what they say.

Every recorded prediction, confidence and sign is derived anew. In another environment last digits differ: what lies
that close is counted, and is no damage.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.attacks.base import AttackedModel, Goal, direction_sign
from pipeline.attacks.load import load_attack
from pipeline.check.findings import DamageError, Findings, refuse_rows
from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, NonFiniteError, PipelineError
from pipeline.core.lanes import Lanes, chunk_images
from pipeline.core.lattice import step
from pipeline.core.plan import Plan
from pipeline.engine.compute import Attacker, compile_victim, own_copy
from pipeline.engine.run import (
    attack_target,
    choose_device,
    load_run_model,
    make_attacker,
    naming_evaluator,
    versions,
)
from pipeline.engine.scores import score
from pipeline.layouts.base import Scores, evaluator_columns
from pipeline.models.label_space import LabelSpace
from pipeline.output.folder import Receipt
from pipeline.output.manifest import Manifest

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
    loaded = load_attack(config.attack)
    _check_unchanged("attack.kind: the code", loaded.digest, manifest.identity.get("attack.content"))
    victim = load_run_model(config.model, config, device)
    _check_unchanged("model: the victim", victim.digest, manifest.identity.get("model.content"))
    spaces = manifest.spaces
    victim.space = spaces["model"]
    evaluators = {}
    for other in config.evaluators:
        name = f"evaluators.{other.id}"
        with naming_evaluator(other.id):
            evaluators[other.id] = model = load_run_model(other, config, device)
            known = manifest.identity.get(f"{name}.content") if name in spaces else None
            _check_unchanged("the model", model.digest, known)
        model.space = spaces[name]
    goal = Goal(config.attack.label, attack_target(config, victim.space))
    attacker = make_attacker(config, loaded.attack, victim, goal, evaluators)
    compiled_alike = True
    if config.runtime.compile:
        try:
            compile_victim(attacker, device, manifest.shape, config.runtime.batch_size)
        except PipelineError as error:
            logger.warning("%s; its predictions are compared as from another environment.", error)
            compiled_alike = False
    chunk = chunk_images(device, config.runtime.batch_size, manifest.shape)
    recorded = manifest.identity.get("runtime.chunk")
    if device.type == config.runtime.device and isinstance(recorded, int) and recorded > 0:
        chunk = recorded
    with Lanes(device, chunk) as lanes:
        yield Recomputation(attacker, lanes, versions(device), compiled_alike, manifest, plan, findings)


def _check_unchanged(what: str, digest: str | None, recorded: Any) -> None:
    if digest != recorded:
        raise ConfigError(f"{what} that the config names has changed since the run, so it cannot be asked again.")


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


def _look_again(attacker: Attacker, clipped: bool, *chunk: Tensor) -> _Answer:
    """Ask the models about a chunk again, and attack it again.

    Args:
        attacker: the attack, and the models that are asked.
        clipped: whether the stored sign is 0 where clip(x + s) is x.
        chunk: 1 + K times (N, C, H, W) uint8, the stored sign (N, C, H, W) int8, the model's index (N,) int64 of the
            class whose loss was changed, the random numbers of the rows (N,) int64, then which rows are valid, (N,)
            bool.
    """
    *images, sign, classes, draws, valid = chunk
    victim = own_copy(attacker.victim)
    # The clean logits of the run came with the gradient, and some layers (attention) have another kernel for
    # that, with other last digits.
    model = AttackedModel(victim, images[0], targeted=attacker.goal.target is not None)
    perturbed = attacker.attack.perturb(model, images[0], classes, attacker.levels, draws)
    logits = [torch.stack([model.logits, *map(victim.predict, images[1:])])]
    logits += [torch.stack([*map(other.predict, images)]) for other in map(own_copy, attacker.evaluators.values())]
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
        self.variants, self.layout, self.on_ray = manifest.variants, manifest.layout, manifest.on_ray
        self.plan, self.findings = plan, findings
        precision = manifest.resolved.runtime.precision
        self.tolerance, self.sign_tolerance = TOLERANCE[precision], SIGN_TOLERANCE[precision]
        self.exact = True

    def compare_environment(self, receipt: Receipt) -> None:
        """Each shard has its own: a run may have been resumed elsewhere."""
        here = self.versions
        changes = [
            f"{name} {receipt.versions.get(name)} then, {here.get(name)} now"
            for name in {**receipt.versions, **here}
            if receipt.versions.get(name) != here.get(name)
        ]
        changes += [] if self.compiled_alike else ["not compiled now"]
        self.exact = not changes
        self.findings.changes.update(changes)

    def check(
        self,
        names: Sequence[str],
        mask: NDArray[np.bool_],
        images: Sequence[Tensor],
        sign: Tensor,
        recorded: Scores,
        clean: pa.Table,
        draws: NDArray[np.int64],
    ) -> None:
        """Ask the models again, in the same batch of the same shape, with the same holes.

        Args:
            names: what messages call the rows of each variant.
            mask: (N,) which rows of the run's batch are stored; M of them are.
            images: V times (M, C, H, W) uint8, clean first.
            sign: (M, C, H, W) int8, the direction that is stored, or follows from the images.
            recorded: what the rows say of these images.
            clean: the rows of the clean images.
            draws: (M,) random numbers of the rows.
        """
        labels = torch.from_numpy(recorded.label.filled(UNLABELLED))
        own, target = self._wanted(labels, recorded)
        changed = own if target is None else target
        random = torch.from_numpy(draws)
        rows = [self._padded(mask, values) for values in (*images, sign, changed, random)]
        valid = self._padded(mask, torch.ones(len(changed), dtype=torch.bool))
        answer = self._ask(rows, valid)
        victim, *others = answer.logits
        spaces = {name: evaluator.space for name, evaluator in self.attacker.evaluators.items()}
        evaluations = [logits.argmax(-1) for logits in others]
        again = score(self.variants, victim, labels, target, self.attacker.victim.space, evaluations, spaces)
        strict = self.exact and np.array_equal(recorded.confidence, again.confidence)
        try:
            self._compare_predictions(answer, again, recorded, names, clean, strict)
            self._compare_confidences(again, recorded, names)
            if target is not None:
                expected = self.attacker.goal.classes(victim[0], own, random)
                self._compare_target(expected, target, victim[0], names[-1], clean, strict)
            self._compare_signs(answer, names, clean, strict)
        except DamageError:
            second = self._ask(rows, valid)
            asked = ["model", *(f"evaluators, {name}" for name in self.attacker.evaluators)]
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

    def _ask(self, rows: Sequence[Tensor], valid: Tensor) -> _Answer:
        ask = partial(_look_again, self.attacker, not self.layout.stores_sign)
        try:
            parts = [future.result() for future in self.lanes.submit(ask, *rows, valid=valid)]
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

    def _wanted(self, labels: Tensor, recorded: Scores) -> tuple[Tensor, Tensor | None]:
        """Of each row, as the model's indices (M,): its own class, by which the attack went, and its target, if any.

        As they are recorded: a prediction that lies on a near tie may fall otherwise here.
        """
        space = self.attacker.victim.space
        to_model = np.argsort(space.to_recorded)
        own = torch.from_numpy(to_model[recorded.prediction[0, 0]])
        if self.attacker.goal.label == "dataset":
            own = torch.where(labels == UNLABELLED, own, space.model_labels(labels))
        return own, None if recorded.target is None else torch.from_numpy(to_model[recorded.target])

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
        victim's confidences are the same to the last digit, nothing is excused (`strict`)."""
        models = [self.attacker.victim, *self.attacker.evaluators.values()]
        asked = zip(answer.logits, recorded.prediction, models, strict=True)
        close = np.stack([self._near_ties(logits, said, model.space) for logits, said, model in asked])
        differs = recorded.prediction != again.prediction
        wrong = differs if strict else differs & ~close
        self.findings.recomputed += differs.size
        self.findings.near_ties += int((differs & ~wrong).sum())
        self.findings.mismatches += int(wrong.sum())
        for model, variant in np.ndindex(wrong.shape[:2]):
            of = f" in {evaluator_columns(recorded.models[model])[0]}" if model else ""
            what = f"predictions{of} that its pixels do not give"
            refuse_rows(names[variant], wrong[model, variant], what, clean)

    def _compare_confidences(self, again: Scores, recorded: Scores, names: Sequence[str]) -> None:
        for column in ("confidence", "label_confidence"):
            off = np.ma.abs(getattr(again, column) - getattr(recorded, column))
            wrong = np.ma.filled(off > self.tolerance, False).any(1)
            if wrong.any():
                raise DamageError(f"{names[int(wrong.argmax())]} has a {column} that its pixels do not give.")
            self.findings.last_digits += int(np.ma.filled(off > 0, False).sum())

    def _compare_target(
        self,
        expected: Tensor,
        target: Tensor,
        logits: Tensor,
        name: str,
        clean: pa.Table,
        strict: bool,
    ) -> None:
        """Compare the targets, (M,) the model's indices; the least likely class may be a near tie too."""
        wrong = (target != expected).numpy()
        if self.attacker.goal.target == "least_likely" and not strict:
            above = logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.amin(1)
            ties = wrong & (above < self.tolerance).numpy()
            self.findings.near_ties += int(ties.sum())
            wrong &= ~ties
        refuse_rows(name, wrong, "targets that are not the attack's", clean)

    def _compare_signs(self, answer: _Answer, names: Sequence[str], clean: pa.Table, strict: bool) -> None:
        """The images lie along the sign of the gradient, but where that is rounding.

        A CPU gives each gradient again to the last digit; of CUDA some backward passes (of adaptive pooling and
        resizing) add in any order.
        """
        exact = strict and self.lanes.device.type == "cpu"
        tolerance = self.sign_tolerance if self.on_ray else VALUE_TOLERANCE
        wrong = (answer.differing > 0 if exact else answer.share > tolerance).numpy()
        self.findings.near_tie_signs += int(answer.differing.numpy()[~wrong].sum())
        they = "do not lie along the sign of the loss gradient" if self.on_ray else "the attack does not make again"
        refuse_rows(names[1], wrong, f"images that {they}", clean)
