"""What models make of the test split: of its clean and stored images, and of images that are attacked anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from arms import Contents, Recipe
from torch import Tensor

from pipeline import training_dataset
from pipeline.attacks.base import Attack, Goal
from pipeline.attacks.fgsm import FGSM
from pipeline.attacks.iterative import PGD, PGDConfig
from pipeline.attacks.noise import Noise
from pipeline.engine.compute import ModelAttack
from pipeline.models.attacked import AttackedModel
from pipeline.models.base import Model
from pipeline.read.dataset import TrainingDataset
from pipeline.reporting.defence import Outcome

TEST_BATCH = 256


@dataclass(frozen=True)
class Condition:
    """Which images are tested, as `Outcome` says it."""

    images: Literal["clean", "stored", "noise", "fgsm", "pgd"]
    against: str | None
    level: int


# (N, C, H, W) uint8 each, of the same N rows of the test split, on the CPU.
Pictures = dict[Condition, Tensor]


def stored_pictures(output: Path, contents: Contents, recipe: Recipe) -> tuple[Pictures, Tensor]:
    """The test split as the dataset has it: clean, with noise, and attacked; and its labels (N,) int64.

    Noise is made here where the dataset has none. Stored images of plain FGSM are left out: `fresh_pictures` makes the
    same from the source models.

    Raises:
        ConfigError, PipelineError: as `training_dataset`.
    """

    def first_rows(data: TrainingDataset) -> tuple[Tensor, Tensor]:
        images, labels = zip(*islice(data, recipe.test_rows), strict=True)
        return torch.stack(images), torch.tensor(labels)

    read = partial(training_dataset, output, recipe.test_split, shuffle=False, allow_incomplete=True)
    clean, labels = first_rows(read(clean=1))
    pictures = {Condition("clean", None, 0): clean}
    for level, epsilon in zip(contents.levels, contents.epsilons, strict=True):
        if contents.noise is None:
            noisy = _noise(clean, level)
        else:
            noisy, _ = first_rows(read(attacks=contents.noise, epsilons=[epsilon], clean=0))
        pictures[Condition("noise", None, level)] = noisy
        for model in () if contents.is_plain else contents.singles:
            attacked, _ = first_rows(read(models=model, attacks=contents.attack, epsilons=[epsilon], clean=0))
            pictures[Condition("stored", model, level)] = attacked
    return pictures, labels


def _noise(images: Tensor, level: int) -> Tensor:
    nobody: Any = None  # it asks no model
    (noisy,) = Noise().perturb(nobody, images, nobody, (level,), _draws(images)).images
    return noisy


def fresh_pictures(model: Model, name: str, images: Tensor, labels: Tensor, levels: Sequence[int]) -> Pictures:
    """The images of FGSM and PGD on a model, with the settings that the config has by default.

    Args:
        model: frozen.
        name: what `against` says.
        images: (N, C, H, W) uint8, clean.
        labels: (N,) int64, the model's own indices; -1 where it does not know the class.
        levels: epsilons in grey levels, rising.
    """
    settings = PGDConfig(epsilons=tuple(f"{level}/255" for level in levels))
    attacks: dict[Literal["fgsm", "pgd"], Attack] = {"fgsm": FGSM(), "pgd": PGD(**settings.arguments)}
    made: dict[Condition, list[Tensor]] = {}
    device = model.mean.device
    for rows in zip(*(whole.split(TEST_BATCH) for whole in (images, labels, _draws(images))), strict=True):
        clean, own, draws = (part.to(device) for part in rows)
        seen = AttackedModel(model, clean, targeted=False)
        classes = Goal().classes(seen.logits, own, draws)
        for kind, attack in attacks.items():
            bound = ModelAttack(attack, kind, name, True, tuple(levels), Goal())
            moved = bound.perturb(seen, clean, classes, draws).images
            for level, part in zip(levels, moved, strict=True):
                made.setdefault(Condition(kind, name, level), []).append(part.cpu())
    return {condition: torch.cat(parts) for condition, parts in made.items()}


def _draws(images: Tensor) -> Tensor:
    """A random number for each row, the same for every model."""
    return torch.randint(2**32, (len(images),), generator=torch.Generator().manual_seed(0))


def outcomes(model: Model, pictures: Pictures, labels: Tensor) -> list[Outcome]:
    """What a frozen model makes of images.

    Args:
        model: that answers in the dataset's classes.
        pictures: the images.
        labels: (N,) int64, of the dataset.
    """
    found = []
    for condition, images in pictures.items():
        confidences, answers = ask(model, images).softmax(1).max(1)
        mistakes = confidences[answers != labels]
        found.append(
            Outcome(
                images=condition.images,
                against=condition.against,
                level=condition.level,
                rows=len(labels),
                wrong=len(mistakes),
                wrong_confidence=float(mistakes.mean()) if len(mistakes) else None,
            )
        )
    return found


def ask(model: Model, images: Tensor) -> Tensor:
    """Logits (N, classes) on the CPU, of images (N, C, H, W) uint8."""
    return torch.cat([model.predict(part.to(model.mean.device)).cpu() for part in images.split(TEST_BATCH)])
