"""Variants: what the subsets of a dataset hold.

A variant is the clean images, or those of one attack on one model at one epsilon. Arrays over the variants of a run are
(V, ...), clean first.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

# What an attack or a model is called in names of subsets and columns: no hyphen, which parts them.
ID = r"[A-Za-z][A-Za-z0-9_]{0,63}"
SUBSET = rf"(?:clean|(?:{ID}-){{0,2}}eps-[0-9]{{1,3}})"


@dataclass(frozen=True)
class Variant:
    """What a subset holds.

    level: the epsilon in grey levels, 1..255; 0 for clean. attack, model: the ids of what made the images; None on
    clean, and `model` of an attack that asks no model. subset: the name of the folder and of the config on the Hub.
    """

    level: int
    attack: str | None
    model: str | None
    subset: str

    @property
    def epsilon(self) -> float:
        """The epsilon of images in [0, 1]."""
        return self.level / 255

    @property
    def column(self) -> str:
        """The name of its image column where all variants of an image share a row."""
        return self.subset.replace("-", "_")

    @property
    def maker(self) -> str:
        """As `maker`. Not of clean."""
        return maker(self.attack, self.model)

    @property
    def pair(self) -> str:
        """What parts its attack and its model from others of the run, in names of columns; empty if there is one."""
        return re.sub(r"-?(clean|eps-[0-9]+)$", "", self.subset).replace("-", "_")

    def at(self, level: int) -> "Variant":
        """The same attack on the same model at another level, 1..255, whether or not the run has it."""
        return replace(self, level=level, subset=re.sub(r"(clean|eps-[0-9]+)$", f"eps-{level}", self.subset))


CLEAN = Variant(level=0, attack=None, model=None, subset="clean")


def maker(attack: str | None, model: str | None) -> str:
    """What made images, for people: "fgsm on resnet20", or "noise", which asks no model."""
    return f"{attack} on {model}" if model else str(attack)


def own_model(variant: Variant, models: Sequence[str]) -> str:
    """The id of the model that the rows of a variant are about: the first of all, where they are of none."""
    return variant.model or models[0]


def make_variants(attacks: Mapping[str, tuple[Sequence[str | None], Sequence[int]]]) -> tuple[Variant, ...]:
    """The variants of a run, clean first; then attack by attack, model by model, by rising epsilon.

    A subset is called `[ATTACK-][MODEL-]eps-K`. What the run has only one of is left out of the name.

    Args:
        attacks: by id, the models that each attacks (None: it asks none) and its epsilons in grey levels.
    """
    models = {model for attacked, _ in attacks.values() for model in attacked if model is not None}
    made = [CLEAN]
    for attack, (attacked, levels) in attacks.items():
        for model in attacked:
            named = [attack] if len(attacks) > 1 else []
            named += [model] if model is not None and len(models) > 1 else []
            made += [Variant(level, attack, model, "-".join([*named, f"eps-{level}"])) for level in sorted(levels)]
    return tuple(made)


def group_variants(made: Iterable[tuple[int, str, str | None]]) -> tuple[Variant, ...]:
    """The variants of a run, clean first, from the level, the attack and the model of each that is attacked."""
    attacks: dict[str, tuple[list[str | None], list[int]]] = {}
    for level, attack, model in made:
        models, levels = attacks.setdefault(attack, ([], []))
        models += [model] if model not in models else []
        levels += [level] if level not in levels else []
    return make_variants(attacks)


def by_attack(variants: Sequence[Variant]) -> list[list[int]]:
    """Which variants of a run, clean first, are made by each attack on each model: their indices, in order."""
    found: dict[tuple[str | None, str | None], list[int]] = {}
    for index, variant in enumerate(variants[1:], start=1):
        found.setdefault((variant.attack, variant.model), []).append(index)
    return list(found.values())


def at_levels(recorded: Sequence[Variant], levels: Iterable[int]) -> tuple[Variant, ...]:
    """What each attack makes of each model at some grey levels, in their order, clean at 0; they need not be among the
    recorded variants of the run, of which clean is the first."""
    attacked = {variant.pair: variant for variant in recorded[1:] or recorded}
    return tuple(
        variant for level in levels for variant in ([one.at(level) for one in attacked.values()] if level else [CLEAN])
    )


def plain_id(name: str) -> str:
    """An id out of a name that a model or an attack has elsewhere, such as `google/vit-base` or `path/to/file.py:make`.

    It is the last part of the name; what an id cannot hold becomes an underscore.
    """
    last = re.split(r"[/:]", name.rstrip("/"))[-1]
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", last).strip("_")[:64]
    return plain if re.fullmatch(ID, plain) else f"m_{plain}"[:64]
