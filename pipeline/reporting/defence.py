"""The defence: what training on a dataset buys, as `scripts/train_robust.py` measured it.

The script writes defence.json into the dataset's folder, after each training; the report shows it.
"""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, ValidationError, model_validator

from pipeline.core.errors import PipelineError
from pipeline.output.folder import OutputFolder, Record

DEFENCE = "defence.json"

# What attacks the images that a trained model is tested on.
ITSELF = "itself"

# Images, whose gradient made them, and the epsilon in grey levels, as `Defence.errors` takes them.
Tested = tuple[str, Sequence[str | None], int]

# How many standard errors a 95% interval reaches to each side of a mean of 2, 3, ... 10 seeds (Student's t). The last
# is taken for more seeds, too: their interval is a little narrower.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Above this clean error of the arm "clean only" nothing is said of the others.
MOST_CLEAN_ERROR = 0.45
TOO_FEW_STEPS = "Too few steps to compare; raise --epochs."
RULE = "A difference counts if its 95% interval over the seeds does not contain 0."

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

    @property
    def points(self) -> str:
        """In percent, without the sign."""
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"

    def __str__(self) -> str:
        return f"{self.points}%"


def compare(ours: Sequence[float], others: Sequence[float]) -> int | None:
    """Which of two arms has the larger errors, one for each seed, by their differences within each seed.

    Returns:
        1 where ours are larger and -1 where they are smaller; 0 where the 95% interval of the difference has 0 in it.
        None where one seed alone, or different seeds, allow no answer.
    """
    if len(ours) != len(others) or len(ours) < 2:
        return None
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) <= T_95[min(len(differences), 10) - 2] * error:
        return 0
    return 1 if mean > 0 else -1


class Arm(Record):
    """What one kind of training shows beside clean images.

    kind: nothing, random signs, stored images of one source model or of all, the model's own FGSM made in each step, or
    the last two together.
    """

    id: str
    title: str
    kind: Literal["clean", "noise", "one", "all", "fly", "both"]


class Outcome(Record):
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


class Training(Record):
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


class Defence(Record):
    """All trainings on one dataset.

    seconds: of the whole, over all sessions. receipts: the digest of the dataset's receipts, which changes when shards
    are added. digests: of the parameters' names and shapes, by model: the target (`itself`) and the held-out ones.
    held_out_errors: on clean images, by held-out model and seed. The last three are empty in older files.
    """

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
    receipts: str = ""
    digests: dict[str, str] = Field(default_factory=dict)
    held_out_errors: dict[str, dict[int, float]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_what_there_is(self) -> Self:
        if not self.levels or not self.arms:
            raise ValueError("there is no epsilon or no arm")
        if len({(one.arm, one.seed) for one in self.trainings}) < len(self.trainings):
            raise ValueError("an arm was trained twice with one seed")
        return self

    @property
    def middle(self) -> int:
        """The epsilon, in grey levels, that sentences are of."""
        return self.levels[len(self.levels) // 2]

    @property
    def seeds(self) -> list[int]:
        """Those with which every arm was trained."""
        done = [{one.seed for one in self.trainings if one.arm == arm.id} for arm in self.arms]
        return sorted(set.intersection(*done))

    def trained(self, arm: str) -> list[Training]:
        """The trainings of an arm, with `seeds` in their order; none where there is no such arm."""
        by_seed = {one.seed: one for one in self.trainings if one.arm == arm}
        return [by_seed[seed] for seed in self.seeds if seed in by_seed]

    def errors(self, arm: str, images: str, against: Sequence[str | None], level: int) -> list[float]:
        """The error of an arm on some images, averaged over whose gradient made them: one number for each seed."""
        return self._by_seed(arm, images, against, level, lambda test: test.error)

    def mistaken_confidence(self, arm: str, images: str, against: Sequence[str | None], level: int) -> list[float]:
        """How sure an arm is of its wrong answers on some images, as `errors`; seeds without wrong answers left out."""
        return self._by_seed(arm, images, against, level, lambda test: test.wrong_confidence)

    def black_box(self, arm: str, level: int) -> Spread | None:
        """The error under FGSM of the held-out models, averaged over these; None where it was not measured."""
        return Spread.of(self.errors(arm, "fgsm", self.held_out, level))

    def _by_seed(
        self, arm: str, images: str, against: Sequence[str | None], level: int, value: Callable[[Outcome], float | None]
    ) -> list[float]:
        means = []
        for training in self.trained(arm):
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


def columns(defence: Defence) -> dict[str, Tested]:
    """What the columns of the main table are of: the held-out models' attacks, and FGSM on the trained model itself."""
    middle, held_out = defence.middle, defence.held_out
    found: dict[str, Tested] = {"clean": ("clean", [None], 0)}
    found |= {f"FGSM {level}": ("fgsm", held_out, level) for level in defence.levels}
    return found | {f"PGD {middle}": ("pgd", held_out, middle), f"own FGSM {middle}": ("fgsm", [ITSELF], middle)}


def tabulate(defence: Defence, tested: Mapping[str, Tested]) -> list[tuple[Arm, list[Spread | None]]]:
    """Each arm, and its error in each column."""
    return [(arm, [Spread.of(defence.errors(arm.id, *of)) for of in tested.values()]) for arm in defence.arms]


def statements(defence: Defence) -> list[str]:
    """What the report says: whether stored images protect, and against what not, as far as that was measured."""
    return [TOO_FEW_STEPS] if untrained(defence) else [said for said in (protects(defence), exposes(defence)) if said]


def untrained(defence: Defence) -> bool:
    """Whether training on clean images alone leaves so many of them wrong that arms cannot be compared."""
    clean = _first(defence, "clean")
    errors = defence.errors(clean.id, "clean", [None], 0) if clean else []
    return bool(errors) and statistics.fmean(errors) > MOST_CLEAN_ERROR


def protects(defence: Defence) -> str:
    """What stored images do against models never seen, beside clean images and the control.

    It is of the first arm on all sources, of one source where there is none. Empty where an arm was not measured.
    """
    arms = [_first(defence, "all", "one"), _first(defence, "clean"), _first(defence, "noise")]
    measured = _measured(defence, arms, ("fgsm", defence.held_out, defence.middle))
    if len(measured) < 3:
        return ""
    (arm, errors), *others = measured
    signs = [compare(errors, other) for _, other in others]
    lead = "Here, stored images show no protection against attacks from unseen models"
    if None in signs:
        lead = "Against attacks from unseen models, one seed allows no verdict"
    elif signs == [-1, -1]:
        lead = "Stored images protect against attacks from unseen models"
    return (
        f"{lead}: FGSM on {', '.join(defence.held_out)} at {defence.middle}/255 leaves {Spread.of(errors)} wrong after "
        f"“{arm.title}”; {_beside(errors, others)}."
    )


def exposes(defence: Defence) -> str:
    """What the same training does under an attack on the trained model itself, beside clean images and its own FGSM.

    The attack is PGD at the largest epsilon of which there are results, and FGSM where there are none of PGD. Empty
    where one of the first two arms was not measured.
    """
    arms = [_first(defence, "all", "one"), _first(defence, "clean"), _first(defence, "fly")]
    for kind, level in ((kind, level) for kind in ("pgd", "fgsm") for level in reversed(defence.levels)):
        measured = _measured(defence, arms, (kind, [ITSELF], level))
        if len(measured) > 1 and measured[1][0] == arms[1]:
            break
    else:
        return ""
    (arm, errors), *others = measured
    clean = others[0][1]
    sign = compare(errors, clean)
    lead = "Stored images do not protect against an attack on the trained model itself"
    if sign is None:
        lead = "Under an attack on the trained model itself, one seed allows no verdict"
    elif sign < 0:
        half = 2 * statistics.fmean(errors) <= statistics.fmean(clean)
        lowered = "lower, too" if half else "lowered, not removed"
        lead = f"Under an attack on the trained model itself the error is {lowered}"
    return (
        f"{lead}: {kind.upper()} on it at {level}/255 leaves {Spread.of(errors)} wrong after “{arm.title}”; "
        f"{_beside(errors, others)}."
    )


def _first(defence: Defence, *kinds: str) -> Arm | None:
    """The first arm of the first of some kinds that there is."""
    return next((arm for kind in kinds for arm in defence.arms if arm.kind == kind), None)


def _measured(defence: Defence, arms: Sequence[Arm | None], of: Tested) -> list[tuple[Arm, list[float]]]:
    """Arms with their errors by seed; without those that were not measured."""
    return [(arm, errors) for arm in arms if arm and (errors := defence.errors(arm.id, *of))]


def _beside(errors: Sequence[float], others: Sequence[tuple[Arm, Sequence[float]]]) -> str:
    """What the other arms leave wrong, and whether that differs; of one seed without a verdict."""
    verdicts = {None: "", 0: ", a difference that does not count", 1: ", which is less", -1: ", which is more"}
    return ", and ".join(
        f"“{arm.title}” leaves {Spread.of(other)}{verdicts[compare(errors, other)]}" for arm, other in others
    )
