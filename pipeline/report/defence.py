"""The defence: what training on a dataset buys, as `scripts/train_robust.py` measured it.

The script writes defence.json into the dataset's folder, after each training; the report shows it.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError, model_validator

from pipeline.core.errors import PipelineError
from pipeline.output.folder import OutputFolder

DEFENCE = "defence.json"

# What attacks the images that a trained model is tested on.
ITSELF = "itself"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spread:
    """The mean of one share for each seed, and its standard deviation; None where there is one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Spread | None":
        """None where there are no shares."""
        if not shares:
            return None
        return cls(statistics.fmean(shares), statistics.stdev(shares) if len(shares) > 1 else None)

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}%"

    def below(self, other: "Spread") -> bool:
        """Whether it is less by more than both standard deviations together, as far as these are known."""
        return other.mean - self.mean > (self.deviation or 0) + (other.deviation or 0)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Strict):
    """What one kind of training shows beside clean images.

    kind: nothing, random signs, stored images of one source model or of all, the model's own FGSM made in each step, or
    the last two together.
    """

    id: str
    title: str
    kind: Literal["clean", "noise", "one", "all", "fly", "both"]

    @property
    def name(self) -> str:
        """The title, which says so if the arm is the control."""
        return f"{self.title} (the control)" if self.kind == "noise" and "control" not in self.title else self.title


class Outcome(_Strict):
    """What one trained model makes of some images of the test split.

    images: clean, stored or noise as the dataset has them, or made anew by an attack. against: whose gradient made
    them: `itself` (the trained model's), the id of a source model, or the name of a held-out one; None for clean and
    noise. level: the epsilon in grey levels, 0 for clean. wrong of `rows` it gets wrong, and is so sure of these
    answers on average (softmax maximum); None where none is wrong.
    """

    images: Literal["clean", "stored", "noise", "fgsm", "pgd"]
    against: str | None
    level: NonNegativeInt
    rows: NonNegativeInt
    wrong: NonNegativeInt
    wrong_confidence: float | None

    @property
    def error(self) -> float:
        """The share that is wrong."""
        return self.wrong / self.rows

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if not 0 < self.rows >= self.wrong:
            raise ValueError("there are no images, or more are wrong than there are")
        return self


class Training(_Strict):
    """One training of an arm, and its tests.

    images: seen in `seconds`, of which reading, attacks and steps are parts, tests not. history: after each epoch the
    mean error over the held-out models' FGSM at every epsilon.
    """

    arm: str
    seed: NonNegativeInt
    images: NonNegativeInt
    seconds: NonNegativeFloat
    history: tuple[float, ...]
    tests: tuple[Outcome, ...]


class Defence(_Strict):
    """All trainings on one dataset. seconds: of the whole, over all sessions."""

    run_id: str
    command: str
    machine: str
    versions: dict[str, str]
    seconds: NonNegativeFloat
    recipe: dict[str, str | int | float]
    target: str
    sources: tuple[str, ...]
    held_out: tuple[str, ...]
    levels: tuple[int, ...]
    arms: tuple[Arm, ...]
    trainings: tuple[Training, ...]

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if not self.levels:
            raise ValueError("there is no epsilon")
        return self

    @property
    def middle(self) -> int:
        """The epsilon, in grey levels, that sentences are of."""
        return self.levels[len(self.levels) // 2]

    @property
    def seeds(self) -> list[int]:
        """Those with which every arm was trained."""
        done = [{one.seed for one in self.trainings if one.arm == arm.id} for arm in self.arms]
        return sorted(set.intersection(*done)) if done else []

    def errors(self, arm: str, images: str, against: Sequence[str | None], level: int) -> list[float]:
        """The error of an arm on some images, averaged over whose gradient made them: one number for each seed."""
        return self._by_seed(arm, images, against, level, lambda test: test.error)

    def mistaken_confidence(self, arm: str, images: str, against: Sequence[str | None], level: int) -> list[float]:
        """How sure an arm is of its wrong answers on some images, as `errors`; seeds without wrong answers left out."""
        return self._by_seed(arm, images, against, level, lambda test: test.wrong_confidence)

    def black_box(self, arm: str, level: int) -> Spread | None:
        """The error under FGSM of the held-out models, averaged over these; None where it was not measured."""
        return Spread.of(self.errors(arm, "fgsm", self.held_out, level))

    def white_box(self, arm: str, attack: str) -> Spread | None:
        """The error under an attack on the trained model itself, at the middle epsilon."""
        return Spread.of(self.errors(arm, attack, [ITSELF], self.middle))

    def _by_seed(
        self, arm: str, images: str, against: Sequence[str | None], level: int, value: Callable[[Outcome], float | None]
    ) -> list[float]:
        means = []
        for training in self.trainings:
            if training.arm == arm and training.seed in self.seeds:
                wanted = [
                    value(test)
                    for test in training.tests
                    if (test.images, test.level) == (images, level) and test.against in against
                ]
                known = [one for one in wanted if one is not None]
                if known:
                    means.append(sum(known) / len(known))
        return means


def read_defence(folder: OutputFolder, run_id: str) -> Defence | None:
    """What training on the dataset bought; None where nobody has measured it on this run.

    Raises:
        PipelineError: the file is not one that the script wrote.
    """
    if DEFENCE not in folder.store.sizes():
        return None
    try:
        defence = Defence.model_validate_json(folder.store.read(DEFENCE))
    except ValidationError as error:
        raise PipelineError(
            f"{folder.store.at(DEFENCE)} is not a file that scripts/train_robust.py wrote ({error.error_count()} "
            "faults); move it away."
        ) from None
    if defence.run_id != run_id:
        logger.warning("%s is of another run (%s) and is not shown.", folder.store.at(DEFENCE), defence.run_id[:16])
        return None
    return defence


def tabulate(defence: Defence) -> tuple[list[str], list[tuple[Arm, list[Spread | None]]]]:
    """The headings of a table, and for each arm its errors: clean, black-box by epsilon, white-box in the middle."""
    kinds = [kind for kind in ("fgsm", "pgd") if any(defence.white_box(arm.id, kind) for arm in defence.arms)]
    head = ["clean"]
    head += [f"black-box, {level}/255" for level in defence.levels]
    head += [f"white-box {kind.upper()}, {defence.middle}/255" for kind in kinds]
    rows = []
    for arm in defence.arms:
        clean = Spread.of(defence.errors(arm.id, "clean", [None], 0))
        attacked = [defence.black_box(arm.id, level) for level in defence.levels]
        rows.append((arm, [clean, *attacked, *(defence.white_box(arm.id, kind) for kind in kinds)]))
    return head, rows


def protects(defence: Defence) -> str:
    """What stored images do against models never seen, beside clean images and the control.

    It is of the first arm on all sources, of one source where there is none. Empty where an arm was not measured.
    """
    arms = [_first(defence, "all", "one"), _first(defence, "clean"), _first(defence, "noise")]
    compared = _measured(arms, lambda arm: defence.black_box(arm, defence.middle))
    if len(compared) < 3:
        return ""
    (arm, share), *others = compared
    lead = "That stored images protect against attacks from models never seen does not show here"
    if share.deviation is None:
        lead = "Against attacks from models never seen there is one seed, so no spread is known"
    elif all(share.below(other) for _, other in others):
        lead = "Stored images protect against attacks from models never seen"
    return (
        f"{lead}: FGSM on {', '.join(defence.held_out)} at {defence.middle}/255 leaves {share} wrong after "
        f"“{arm.name}”; {_beside(share, others)}."
    )


def exposes(defence: Defence) -> str:
    """What the same training does under FGSM on the trained model itself, beside clean images and its own FGSM.

    Empty where one of the first two was not measured.
    """
    arms = [_first(defence, "all", "one"), _first(defence, "clean"), _first(defence, "fly")]
    compared = _measured(arms, lambda arm: defence.white_box(arm, "fgsm"))
    if len(compared) < 2 or compared[1][0] != arms[1]:
        return ""
    (arm, share), *others = compared
    lead = "They do not protect against an attack on the trained model itself"
    if share.deviation is None:
        lead = "Under an attack on the trained model itself no spread is known either"
    elif share.below(others[0][1]):
        lead = "Under an attack on the trained model itself the error is lower, too"
    return f"{lead}: FGSM on it leaves {share} wrong after “{arm.name}”; {_beside(share, others)}."


def _first(defence: Defence, *kinds: str) -> Arm | None:
    """The first arm of the first of some kinds that there is."""
    return next((arm for kind in kinds for arm in defence.arms if arm.kind == kind), None)


def _measured(arms: Sequence[Arm | None], measure: Callable[[str], Spread | None]) -> list[tuple[Arm, Spread]]:
    """Arms with what is measured of them; without those of which nothing is."""
    return [(arm, share) for arm in arms if arm and (share := measure(arm.id))]


def _beside(share: Spread, others: Sequence[tuple[Arm, Spread]]) -> str:
    """What the other arms leave wrong, and whether that differs."""
    said = []
    for arm, other in others:
        verdict = "a difference within the spread"
        if share.below(other) or other.below(share):
            verdict = "which is more" if share.below(other) else "which is less"
        said.append(f"“{arm.name}” leaves {other}, {verdict}")
    return ", and ".join(said)
