"""Findings: what a report says of a dataset, as numbers and sentences.

Counts are the manifest's, and exact. What only rows can say follows from a sample of one split, of one attack on one
model: a page that looked at every split and variant as closely would show nothing.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.variants import CLEAN, Variant, own_model
from pipeline.output.manifest import Manifest, Subset
from pipeline.output.transfer import Transfer, by_epsilon
from pipeline.reporting.sample import Sample

# Variants that pictures show, spread over those there are; the first and the last to succeed come on top.
SHOWN_VARIANTS = 5


@dataclass(frozen=True)
class Focus:
    """What the page looks at closely: the sample of one split, and one variant, the `index`-th of it.

    `images` is what those of the split are called; `shown` are the variants with pictures, clean first; `subsets` the
    exact counts of the split by variant; `model` is the one that the sample is about, the first of `models`; `attacks`
    are all of the run; `name` gives that of a recorded class; `titles` what people call each model.
    """

    sample: Sample
    images: str
    index: int
    shown: tuple[Variant, ...]
    subsets: Mapping[Variant, Subset]
    models: tuple[str, ...]
    attacks: tuple[str, ...]
    name: Callable[[int], str]
    titles: Mapping[str, str]

    @property
    def variant(self) -> Variant:
        return self.sample.variants[self.index]

    @property
    def model(self) -> str:
        return self.models[0]


def by_interest(splits: Sequence[str]) -> list[str]:
    """Splits in the order in which they are worth a close look: held-out images say more than those of training."""
    held_out = [split for split in ("test", "validation") if split in splits]
    return [*held_out, *(split for split in reversed(splits) if split not in held_out)]


def images_of(manifest: Manifest, split: str) -> str:
    """What the images of a split are called: `test images`."""
    # Those of a folder without splits are stored as `train`, whatever they are.
    unnamed = manifest.config["source"].get("split") is None and [*manifest.split_rows] == ["train"]
    return "images" if unnamed else f"{split} images"


def focus_on(manifest: Manifest, sample: Sample) -> Focus:
    """Look closely at a sample that has rows, and at the smallest epsilon that reaches half of what it could.

    Larger ones show more noise and nothing new. Where none does, it is the one that reaches most.
    """
    model, reached = own_model(sample.variants[1], list(manifest.spaces)), sample.success.sum(1)
    half = np.flatnonzero(2 * reached >= _started(sample).sum())
    most = int(reached.argmax()) or len(reached) - 1
    spread = {1 + int(index) for index in np.linspace(0, len(sample.variants) - 2, SHOWN_VARIANTS).round()}
    # Examples are of the images that give in first and of those that give in last: so they must be seen to.
    onset = sample.onset[sample.success.any(0)]
    spread |= {int(onset.min()), int(onset.max())} if len(onset) else set()
    return Focus(
        sample=sample,
        images=images_of(manifest, sample.split),
        index=int(half[0]) if reached.any() and len(half) else most,
        shown=(CLEAN, *(sample.variants[index] for index in sorted(spread))),
        subsets={subset.variant: subset for subset in manifest.subsets if subset.split == sample.split},
        models=(model, *(name for name in manifest.spaces if name != model)),
        attacks=tuple(manifest.resolved.all_attacks),
        name=class_names(manifest, model),
        titles=manifest.titles,
    )


def headline(focus: Focus) -> str:
    """What the attack does to the answers, in a sentence or two."""
    sample, (_, _, share) = focus.sample, focus.sample.words
    on = f"{focus.titles[focus.model]} on {focus.images}"
    reads = f"The {share} of {on} is {percent(right_share(focus, 0))} clean"
    with_it = f"with {focus.variant.attack}, " if len(focus.attacks) > 1 else ""
    if not sample.success[focus.index].any():
        return (
            f"{reads}; {with_it}no step up to {sample.variants[-1].level} of 255 grey levels succeeds on any of them."
        )
    counts = focus.subsets[focus.variant]
    reached = f" {percent(ratio(counts.fooled, counts.rows))} are on target." if sample.target is not None else ""
    return (
        f"{reads}; {with_it}moving every pixel value by at most {focus.variant.level} of 255 grey levels leaves "
        f"{percent(right_share(focus, focus.index))}.{reached}"
    )


def mistaken(focus: Focus) -> str:
    """How sure the model is where the attack succeeds, in a sentence; empty where it does not."""
    success, confidence = focus.sample.success[focus.index], focus.sample.confidence[focus.index]
    if not success.any():
        return ""
    surer = share_of_surer(focus)
    compared = "" if surer is None else f", and surer than when the image was clean in {percent(surer, 0)} of the cases"
    return (
        f"Where the attack succeeds at {focus.variant.level}/255, the model is {percent(mean(confidence[success]), 0)} "
        f"sure of its answer on average{compared}."
    )


def share_of_surer(focus: Focus) -> float | None:
    """Of the images where the attack succeeds: those whose answer is surer than when clean; None where nobody knows."""
    sample, success = focus.sample, focus.sample.success[focus.index]
    gained = sample.confidence[focus.index][success] - sample.confidence[0][success]
    return None if np.isnan(gained).any() else mean(gained > 0)


def sureness(sample: Sample) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Mean confidence in right and in wrong answers, (1 + K,) each, clean first; None where there are none."""
    pairs = list(zip(sample.confidence, sample.right, strict=True))
    return tuple(mean(sure[right]) for sure, right in pairs), tuple(mean(sure[~right]) for sure, right in pairs)


def _started(sample: Sample) -> NDArray[np.bool_]:
    """(M,) rows that an attack can succeed on: plain, those that are right when clean."""
    started: NDArray[np.bool_] = sample.right[0] if sample.target is None else sample.prediction[0] != sample.target
    return started


def right_share(focus: Focus, index: int) -> float | None:
    """Accuracy at an epsilon, exact; without labels the share of answers that stayed, in the sample."""
    if not focus.sample.labelled:
        return mean(focus.sample.right[index])
    return accuracy(focus.subsets[focus.sample.variants[index]], focus.model)


def accuracy(subset: Subset, model: str) -> float | None:
    """Of the labelled images the share that a model predicts right."""
    return ratio(subset.models[model].correct, subset.labelled)


def noise_levels(focus: Focus) -> dict[int, Subset]:
    """The counts of random noise in the split, the control of any other attack, by its epsilon in grey levels."""
    made = ((variant, subset) for variant, subset in focus.subsets.items() if variant not in focus.sample.variants)
    return {variant.level: subset for variant, subset in made if variant.model is None}


def by_split(manifest: Manifest) -> dict[str, list[list[Subset]]]:
    """The counts of splits that have rows, by interest: those of clean images, then of each attack on each model."""
    splits: dict[str, list[list[Subset]]] = {}
    for split in by_interest(list(manifest.split_rows)):
        own = [subset for subset in manifest.subsets if subset.split == split]
        if any(subset.rows for subset in own):
            groups = itertools.groupby(own, key=lambda subset: (subset.attack, subset.model))
            splits[split] = [list(group) for _, group in groups]
    return splits


def matrices(manifest: Manifest) -> dict[str, list[list[Transfer]]]:
    """The rows of the transfer matrix by split, the one most worth a look first; empty with one model or no labels.

    Models have their titles there in place of their ids.
    """
    titles = manifest.titles
    rows = [
        [cell.model_copy(update={key: titles.get(getattr(cell, key)) for key in ("model", "looking")}) for cell in row]
        for row in (by_epsilon(manifest.transfer) if len(manifest.spaces) > 1 else [])
    ]
    splits = by_interest(list(dict.fromkeys(row[0].split for row in rows)))
    return {split: [row for row in rows if row[0].split == split] for split in splits}


def who_travels(rows: Sequence[Sequence[Transfer]], level: int) -> str:
    """Whose images other models lose most on, against noise of the same epsilon, in a sentence; empty if none can say.

    It is about one split, and of the epsilons at which it can be said, about the one nearest to `level`.
    """
    noise = {row[0].level: row for row in rows if row[0].model is None}
    shares = ((_lost_by_others(row, row[0].model), row) for row in rows if row[0].model is not None)
    made = [(share, row) for share, row in shares if share is not None]
    # Without noise anywhere, there is nothing to prefer.
    made = [(share, row) for share, row in made if row[0].level in noise] or made
    if not made:
        return ""
    nearest = min((row[0].level for _, row in made), key=lambda other: (abs(other - level), other))
    share, best = max((each for each in made if each[1][0].level == nearest), key=lambda each: each[0])
    others = [cell.looking for cell in best if cell.looking != best[0].model]
    who, they = "the other models together get", "they get"
    if len(others) == 1:
        who, they = f"{others[0]} gets", "it gets"
    floor = _lost_by_others(noise[nearest], best[0].model) if nearest in noise else None
    against = (
        "the run has no noise of that epsilon to compare with"
        if floor is None
        else f"with noise it is {percent(floor)}"
    )
    return (
        f"At {nearest}/255 no images transfer better than those of {best[0].maker}: {who} {percent(share)} wrong of "
        f"those that {they} right when clean; {against}."
    )


def _lost_by_others(row: Sequence[Transfer], model: str | None) -> float | None:
    """The share that all models but one lose of what they predict right when clean."""
    others = [cell for cell in row if cell.looking != model]
    return ratio(sum(cell.lost for cell in others), sum(cell.clean_correct for cell in others))


def class_names(manifest: Manifest, model: str) -> Callable[[int], str]:
    """What a class that is recorded of a model's answer is called: its index where it has no name."""
    classes = manifest.spaces[model].recorded_classes or ()
    return lambda index: (classes[index].strip() or "(no name)") if index < len(classes) else str(index)


def source_name(source: Mapping[str, Any]) -> str:
    """What people call the source of a config: a Hub id, or the last folder of a path."""
    path = str(source.get("path") or source["kind"])
    return path if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else Path(path).name


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def mean(values: NDArray[Any]) -> float | None:
    """The mean, None where there are no values or where one is not known (NaN)."""
    return float(values.mean(dtype=np.float64)) if len(values) and not np.isnan(values).any() else None
