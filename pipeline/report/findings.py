"""Findings: what a report says of a dataset, as numbers and sentences.

Counts are the manifest's, and exact. What only rows can say follows from a sample of one split: a page that looked
at every split and variant as closely would show nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.variants import CLEAN, Variant
from pipeline.output.folder import ModelCounts
from pipeline.output.manifest import Manifest, Subset
from pipeline.report.sample import Sample

# Variants that pictures show, spread over those there are; the first and the last to succeed come on top.
SHOWN_VARIANTS = 5


@dataclass(frozen=True)
class Focus:
    """What the page looks at closely: the sample of one split, and one variant, the `index`-th of it.

    `shown` are the variants with pictures, clean first; `subsets` the exact counts of the split by variant; `victim`
    and `evaluators` names of models; `name` gives that of a recorded class.
    """

    sample: Sample
    index: int
    shown: tuple[Variant, ...]
    subsets: Mapping[Variant, Subset]
    victim: str
    evaluators: tuple[str, ...]
    name: Callable[[int], str]

    @property
    def variant(self) -> Variant:
        return self.sample.variants[self.index]


def by_interest(splits: Sequence[str]) -> list[str]:
    """Splits in the order in which they are worth a close look: held-out images say more than a victim's own."""
    held_out = [split for split in ("test", "validation") if split in splits]
    return [*held_out, *(split for split in reversed(splits) if split not in held_out)]


def focus_on(manifest: Manifest, sample: Sample) -> Focus:
    """Look closely at a sample that has rows, and at the smallest epsilon that reaches half of what it could.

    Larger ones show more noise and nothing new. Where none does, it is the one that reaches most.
    """
    reached = sample.success.sum(1)
    half = np.flatnonzero(2 * reached >= _started(sample).sum())
    most = int(reached.argmax()) or len(reached) - 1
    spread = {1 + int(index) for index in np.linspace(0, len(sample.variants) - 2, SHOWN_VARIANTS).round()}
    # Examples are of the images that give in first and of those that give in last: so they must be seen to.
    onset = sample.onset[sample.success.any(0)]
    spread |= {int(onset.min()), int(onset.max())} if len(onset) else set()
    return Focus(
        sample=sample,
        index=int(half[0]) if reached.any() and len(half) else most,
        shown=(CLEAN, *(sample.variants[index] for index in sorted(spread))),
        subsets={subset.variant: subset for subset in manifest.subsets if subset.split == sample.split},
        victim=next(iter(manifest.spaces)),
        evaluators=evaluator_names(manifest),
        name=class_names(manifest),
    )


def headline(focus: Focus) -> str:
    """What the attack did, in a few sentences."""
    sample, (_, _, share) = focus.sample, focus.sample.words
    reads = f"The {share} of {focus.victim} on {sample.split} images is {percent(right_share(focus, 0))} clean"
    success, confidence = sample.success[focus.index], sample.confidence[focus.index]
    if not success.any():
        return f"{reads}; no step up to {sample.variants[-1].level} of 255 grey levels succeeds on any of them."
    counts = focus.subsets[focus.variant]
    reached = f" {percent(ratio(counts.fooled, counts.rows))} are on target." if sample.target is not None else ""
    return (
        f"{reads}; moving every pixel value by at most {focus.variant.level} of 255 grey levels leaves "
        f"{percent(right_share(focus, focus.index))}.{reached} Where the attack succeeds, the model is "
        f"{percent(mean(confidence[success]), 0)} sure of its answer on average, and surer than when the image was "
        f"clean in {percent(share_of_surer(focus), 0)} of the cases."
    )


def share_of_surer(focus: Focus) -> float | None:
    """Of the images where the attack succeeds: those whose answer is surer than when they were clean."""
    sample, success = focus.sample, focus.sample.success[focus.index]
    return mean(sample.confidence[focus.index][success] > sample.confidence[0][success])


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
    return accuracies(focus.subsets[focus.sample.variants[index]])[0]


def accuracies(subset: Subset) -> list[float | None]:
    """The accuracy of the victim and of each evaluator, in order."""
    correct = [counts.correct for counts in subset.models.values()]
    return [ratio(count, subset.labelled) for count in correct]


def transfer_rate(counts: ModelCounts) -> float | None:
    """Of the images that fool the victim and that an evaluator reads right when clean: the share that fools both."""
    return ratio(counts.transferred, counts.exposed)


def by_split(manifest: Manifest) -> dict[str, list[Subset]]:
    """The counts of every variant, clean first, of each split that has rows."""
    splits = {split: [there for there in manifest.subsets if there.split == split] for split in manifest.split_rows}
    return {split: subsets for split, subsets in splits.items() if any(subset.rows for subset in subsets)}


def evaluator_names(manifest: Manifest) -> tuple[str, ...]:
    """The ids of the evaluators, in order."""
    return tuple(manifest.spaces)[1:]


def class_names(manifest: Manifest) -> Callable[[int], str]:
    """What a recorded class is called: its index where it has no name."""
    classes = next(iter(manifest.spaces.values())).recorded_classes or ()
    return lambda index: (classes[index].strip() or "(no name)") if index < len(classes) else str(index)


def model_name(model: Mapping[str, Any]) -> str:
    """What people call a model of a config: without the folder of a factory's file."""
    name = str(model.get("name") or model["kind"])
    return name.rpartition("/")[2] if model["kind"] == "factory" else name


def source_name(source: Mapping[str, Any]) -> str:
    """What people call the source of a config: a Hub id, or the last folder of a path."""
    path = str(source.get("path") or source["kind"])
    return path if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else Path(path).name


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def mean(values: NDArray[Any]) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
