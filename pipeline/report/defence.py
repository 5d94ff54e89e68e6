"""The defence: what training on a dataset buys, as `scripts/train_robust.py` measured it.

The script writes defence.json into the dataset's folder, after each training; the report shows it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from pipeline.core.errors import PipelineError
from pipeline.output.folder import OutputFolder

DEFENCE = "defence.json"

# What attacks the images that a trained model is tested on.
ITSELF = "itself"


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

    @property
    def seeds(self) -> list[int]:
        """Those with which every arm was trained."""
        done = [{one.seed for one in self.trainings if one.arm == arm.id} for arm in self.arms]
        return sorted(set.intersection(*done)) if done else []

    def errors(self, arm: str, images: str, against: Sequence[str | None], level: int) -> list[float]:
        """The error of an arm on some images, averaged over whose gradient made them: one number for each seed."""
        return self._by_seed(arm, images, against, level, lambda test: test.error)

    def _by_seed(
        self, arm: str, images: str, against: Sequence[str | None], level: int, value: Callable[[Outcome], float]
    ) -> list[float]:
        means = []
        for training in self.trainings:
            if training.arm == arm and training.seed in self.seeds:
                wanted = [
                    value(test)
                    for test in training.tests
                    if (test.images, test.level) == (images, level) and test.against in against
                ]
                if wanted:
                    means.append(sum(wanted) / len(wanted))
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
    return defence if defence.run_id == run_id else None
