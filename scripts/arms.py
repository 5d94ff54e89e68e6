"""The arms of `train_robust.py`: what each kind of training shows beside clean images, a batch at a time.

All arms of a seed show the same source images in the same order, and attack the same share of them. (A window of
`training_dataset` closes after 4,096 rows or 64 MB. Where images take more than 16 KB each, which of these comes first
may depend on what an arm reads, and then the order does.)
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline import training_dataset
from pipeline.attacks.base import direction_sign
from pipeline.attacks.fgsm import FGSM
from pipeline.attacks.noise import Noise
from pipeline.config.schema import AttackConfig
from pipeline.core.errors import ConfigError
from pipeline.core.lattice import step
from pipeline.models.attacked import AttackedModel
from pipeline.models.base import Model
from pipeline.output.manifest import Manifest
from pipeline.read.dataset import TrainingDataset
from pipeline.reporting.defence import Arm

CLEAN_ONLY = Arm(id="clean", title="clean only", kind="clean")


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained and tested; the same for all of them.

    clean: the share of images that are shown clean, in all arms but the one that shows nothing else. test_rows: how
    many images of the test split are used, the first as stored.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    clean: float
    workers: int
    train_split: str
    test_split: str
    test_rows: int


@dataclass(frozen=True)
class Contents:
    """What a dataset has for the arms.

    attack: the id of the gradient attack whose stored images are shown by source and are tested on. is_plain: whether
    it is plain FGSM, as it is where the dataset has that. levels: its epsilons in grey levels, rising. attacks: the
    sections of all gradient attacks at these epsilons, by their ids. left_out: the ids of those at others, which cannot
    be compared. singles: the models that `attack` attacks. sources: those of any of `attacks`. noise: the id of an
    attack of that kind, None without one.
    """

    attack: str
    is_plain: bool
    levels: tuple[int, ...]
    attacks: dict[str, AttackConfig]
    left_out: tuple[str, ...]
    singles: tuple[str, ...]
    sources: tuple[str, ...]
    noise: str | None

    @classmethod
    def of(cls, manifest: Manifest) -> "Contents":
        """Look at a dataset.

        Raises:
            ConfigError: none of its attacks follows a model's gradient.
        """
        sections = manifest.resolved.all_attacks
        gradient = {name: section for name, section in sections.items() if section.asks_model}
        if not gradient:
            raise ConfigError("attacks: none of the dataset's attacks asks a model; add one of kind fgsm.")
        plain = [
            name for name, one in gradient.items() if (one.kind, one.label, one.target) == ("fgsm", "dataset", None)
        ]
        attack = (plain or [*gradient])[0]
        levels = gradient[attack].levels
        attacks = {name: section for name, section in gradient.items() if section.levels == levels}
        made = [variant for variant in manifest.variants if variant.attack in attacks]
        return cls(
            attack=attack,
            is_plain=attack in plain,
            levels=levels,
            attacks=attacks,
            left_out=tuple(name for name in gradient if name not in attacks),
            singles=tuple(dict.fromkeys(str(one.model) for one in made if one.attack == attack)),
            sources=tuple(dict.fromkeys(str(one.model) for one in made)),
            noise=next((name for name, section in sections.items() if section.kind == "noise"), None),
        )

    @property
    def epsilons(self) -> list[str]:
        """The levels as a reader asks for them."""
        return [f"{level}/255" for level in self.levels]

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms of the dataset, in the order of the table. With one source, that one is all sources."""
        several = len(self.singles) > 1
        singles = [
            Arm(id=f"one:{model}", title=f"stored, one source: {model}", kind="one")
            for model in self.singles
            if several
        ]
        which = "all sources" if several else "one source"
        described = {name: _described(section) for name, section in self.attacks.items()}
        counts = Counter(described.values())
        alls = [
            Arm(id=f"all:{name}", title=f"stored, {which}: {words}{f' ({name})' * (counts[words] > 1)}", kind="all")
            for name, words in described.items()
        ]
        alls.sort(key=lambda arm: arm.id != f"all:{self.attack}")
        return (
            CLEAN_ONLY,
            Arm(id="noise", title="noise (control)", kind="noise"),
            *singles,
            *alls,
            Arm(id="fly", title="own FGSM on the fly", kind="fly"),
            Arm(id="both", title="stored and on the fly", kind="both"),
        )


def _described(section: AttackConfig) -> str:
    """An attack for people, with what it does not have in common with the others: "FGSM, label: prediction"."""
    parts = [section.title]
    parts += ["label: prediction"] if section.label == "prediction" else []
    parts += [f"target: {section.target}"] if section.target is not None else []
    return ", ".join(parts)


@dataclass(frozen=True)
class Reader:
    """What an arm shows.

    data: clean and stored images mixed or, where both stored and other images are attacked, pairs of them.
    """

    arm: Arm
    contents: Contents
    recipe: Recipe
    data: TrainingDataset

    @classmethod
    def open(cls, arm: Arm, contents: Contents, recipe: Recipe, output: Path, seed: int) -> "Reader":
        """Open what an arm reads.

        Raises:
            ConfigError, PipelineError: as `training_dataset`.
        """
        read = partial(training_dataset, output, recipe.train_split, seed=seed, allow_incomplete=True)
        name = arm.id.partition(":")[2]
        match arm.kind:
            case "one":
                data = read(attacks=contents.attack, models=name, clean=recipe.clean)
            case "all":
                data = read(attacks=name, clean=recipe.clean)
            case "both":
                data = read(attacks=contents.attack, pairs=True)
            case "noise" if contents.noise is not None:
                data = read(attacks=contents.noise, epsilons=contents.epsilons, clean=recipe.clean)
            case _:
                data = read(clean=1)
        return cls(arm, contents, recipe, data)

    @property
    def steps(self) -> int:
        """Batches of an epoch: workers share the rows as evenly as can be, and each drops its last short batch."""
        workers, size = max(1, self.recipe.workers), self.recipe.batch_size
        each, more = divmod(len(self.data), workers)
        return more * ((each + 1) // size) + (workers - more) * (each // size)

    def batches(self, epoch: int, draws: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """An epoch: images (N, C, H, W) uint8, labels (N,) int64, and which rows are to be attacked now, (N,) bool."""
        self.data.set_epoch(epoch)
        loader = DataLoader(self.data, self.recipe.batch_size, num_workers=self.recipe.workers, drop_last=True)
        for images, labels in loader:
            lots = torch.rand(len(labels), generator=draws)
            now = torch.zeros(len(labels), dtype=torch.bool)
            if self.arm.kind == "fly" or (self.arm.kind == "noise" and self.contents.noise is None):
                now = lots >= self.recipe.clean
            if self.arm.kind == "both":
                clean, stored = images.unbind(1)
                half = (1 + self.recipe.clean) / 2
                now = (lots >= self.recipe.clean) & (lots < half)
                images = torch.where((lots >= half).view(-1, 1, 1, 1), stored, clean)
            yield images, labels, now

    def attacked(self, model: Model, images: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        """Clean images, (N, C, H, W) uint8, attacked now, by FGSM on the model that is trained or by random signs, each
        at a level that is drawn for it.
        """
        levels = torch.tensor(self.contents.levels, dtype=torch.int16)
        own = levels[torch.randint(len(levels), (len(images),), generator=draws)].to(images.device)
        words = torch.randint(2**32, (len(images),), generator=draws).to(images.device)
        seen = AttackedModel(model, images, targeted=False)
        attack = Noise() if self.arm.kind == "noise" else FGSM()
        # In training mode batch norm would show the attack a model that depends on the batch, and learn from it.
        model.module.eval()
        direction = attack.perturb(seen, images, labels, (), words).direction
        model.module.train()
        assert direction is not None
        return step(images, direction_sign(direction), own.view(-1, 1, 1, 1))
