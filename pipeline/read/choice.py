"""Which of a dataset's variants a reader is given, and how often each of them is drawn."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from pipeline.core.variants import CLEAN, Variant, at_levels
from pipeline.output.manifest import Manifest

# The id of a model or of an attack, or several.
Ids = str | Sequence[str]


def choose_variants(
    recorded: Sequence[Variant],
    levels: Iterable[int] | None,
    *,
    models: Ids | None = None,
    attacks: Ids | None = None,
) -> tuple[Variant, ...]:
    """The variants of some attacks on some models: epsilon by epsilon, and within one as the dataset has them.

    Args:
        recorded: the variants of the dataset, clean first.
        levels: in grey levels, 0 for clean, in the order wanted; they need not be recorded. None: clean and all that
            are, rising.
        models, attacks: their ids; None: all. What is of no model is left out by `attacks` alone.

    Raises:
        ConfigError: there is no such model or attack, or none of these attacks attacks one of these models.
    """
    of_models = _known("models", models, [variant.model for variant in recorded])
    of_attacks = _known("attacks", attacks, [variant.attack for variant in recorded])
    chosen = [
        variant
        for variant in recorded[1:]
        if (attacks is None or variant.attack in of_attacks)
        and (models is None or variant.model is None or variant.model in of_models)
    ]
    if recorded[1:] and not chosen:
        raise ConfigError(f"models, attacks: {' and '.join(of_attacks)} did not attack {' or '.join(of_models)}.")
    if levels is not None:
        return at_levels([CLEAN, *chosen], levels)
    return CLEAN, *sorted(chosen, key=lambda variant: variant.level)


def variants_to_read(
    manifest: Manifest, levels: Iterable[int] | None, *, models: Ids | None = None, attacks: Ids | None = None
) -> tuple[Variant, ...]:
    """As `choose_variants`, but only those whose images are stored or can be made.

    An attack that is not on a ray has images at its own epsilons alone. Unless `attacks` names it, it is left out at
    an epsilon that another attack has recorded, and a warning says so.

    Raises:
        ConfigError: as `choose_variants`, or such an attack is named in `attacks`, or no attack has that epsilon
            recorded.
    """
    chosen, recorded = choose_variants(manifest.variants, levels, models=models, attacks=attacks), manifest.variants
    recorded_levels = {variant.level for variant in chosen if variant in recorded} if attacks is None else set()
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    readable = []
    for variant in chosen:
        if variant in recorded or manifest.on_ray(variant.attack):
            readable.append(variant)
        elif variant.level not in recorded_levels:
            own = [other.level for other in recorded if variant.at(other.level) == other]
            raise ConfigError(
                f"epsilons: {variant.level}/255 is not recorded of attack {variant.attack}, whose images do not "
                f"lie along one direction from which others follow; recorded: {', '.join(f'{k}/255' for k in own)}."
            )
        else:
            left_out[variant.maker].append(f"{variant.level}/255")
    if left_out:
        lacking = ", ".join(f"{maker} at {' and '.join(epsilons)}" for maker, epsilons in left_out.items())
        warnings.warn(
            f"epsilons: left out, as these images are neither recorded nor can they be made: {lacking}. Name the "
            "attacks that you want in `attacks`.",
            stacklevel=3,
        )
    return tuple(readable)


def _known(key: str, ids: Ids | None, there: Sequence[str | None]) -> list[str]:
    """The ids as a list, all of them for None; each is one of those that are there."""
    known = list(dict.fromkeys(name for name in there if name is not None))
    names = known if ids is None else [ids] if isinstance(ids, str) else list(ids)
    unknown = [name for name in names if name not in known]
    if ids is not None and (unknown or not names):
        got = repr(unknown[0]) if unknown else "none"
        raise ConfigError(f"{key}: got {got}; the dataset has attacked images of {', '.join(known) or 'none'}.")
    return names


def draw_shares(variants: Sequence[Variant], weights: Mapping[str, float]) -> NDArray[np.float64]:
    """How often each variant is drawn where all are there, in proportion, the most frequent 1.

    A model is drawn among those that are attacked, an attack among those on it and those that ask no model, then one of
    the attack's epsilons. At each of these draws all are as likely but for their weights. A weight of 0 takes its
    variants away before anything is drawn.

    Args:
        variants: (V,), none of them clean.
        weights: by the id of a model or an attack, or `k/255`, 0 or more; what is missing weighs 1.

    Returns:
        (V,) float64 in [0, 1].

    Raises:
        ConfigError: a weight is of nothing that is there, or no number of 0 or more, or nothing is left.
    """
    names = [(variant.model, variant.attack, f"{variant.level}/255") for variant in variants]
    known = list(dict.fromkeys(name for each in names for name in each if name is not None))
    for key, weight in weights.items():
        if key not in known:
            raise ConfigError(f"weights: there is no {key!r} to draw; there are {', '.join(known)}.")
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ConfigError(f"weights: {key} weighs {weight!r}; a weight is a number of 0 or more.")
    left = [each for each in names if all(weights.get(str(name), 1) > 0 for name in each)]
    if not left:
        raise ConfigError("weights: nothing is left to draw; give an attack, a model and an epsilon more than 0.")

    def share(name: str | None, among: Iterable[str | None]) -> float:
        heavy = {one: weights.get(str(one), 1) for one in among}
        # Weights may be such that their sum is infinite.
        most = max(heavy.values())
        return (heavy[name] / most) / math.fsum(weight / most for weight in heavy.values())

    shares = dict.fromkeys(names, 0.0)
    models: Sequence[str | None] = list(dict.fromkeys(model for model, *_ in left if model is not None)) or [None]
    for model in models:
        own = [each for each in left if each[0] in (model, None)]
        for each in own:
            _, attack, epsilon = each
            shares[each] += (
                share(model, models)
                * share(attack, [other for _, other, _ in own])
                * share(epsilon, [level for _, other, level in own if other == attack])
            )
    # In proportion to the largest: where all are as likely these are ones, whose sums are exact.
    most = max(shares.values())
    return np.array([shares[each] / most for each in names], dtype=np.float64)
