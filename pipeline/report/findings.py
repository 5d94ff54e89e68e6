"""Findings: what a report says of a dataset, as numbers and sentences.

Counts are the manifest's, and exact. What only rows can say follows from a sample of one split: a page that looked
at every split and epsilon as closely would show nothing.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.output.folder import EvaluatorCounts
from pipeline.output.manifest import Manifest, Subset
from pipeline.report.sample import Aim, Sample

# Epsilons that pictures show, spread over those there are; the first and the last to succeed come on top.
SHOWN_LEVELS = 5
MOST_FLIPS = 10


@dataclass(frozen=True)
class Words:
    """How the page speaks of an attack's success, of the answers that are `right` in a sample, and of the others."""

    success: str
    right: str
    wrong: str
    share: str


WORDS: dict[Aim, Words] = {
    "fooled": Words("fooled", "right", "wrong", "accuracy"),
    "target": Words("on target", "right", "wrong", "accuracy"),
    "changed": Words("changed", "as when clean", "changed", "unchanged answers"),
}


@dataclass(frozen=True)
class Focus:
    """What the page looks at closely: the sample of one split, and one epsilon, `level`, the `index`-th of it.

    `shown` are the levels with pictures, clean first; `subsets` the exact counts of the split by level; `victim` and
    `evaluators` names of models; `name` gives that of a recorded class.
    """

    sample: Sample
    index: int
    shown: tuple[int, ...]
    subsets: Mapping[int, Subset]
    victim: str
    evaluators: tuple[str, ...]
    words: Words
    name: Callable[[int], str]

    @property
    def level(self) -> int:
        return self.sample.levels[self.index]


@dataclass(frozen=True)
class Sureness:
    """Mean confidence at one epsilon, None where there is nothing to count.

    `right` and `wrong` of such answers; `mistakes` are the latter. Of the images where the attack succeeds, which are
    `successes`: `before` when clean, `after` now, and the share that is `surer` now.
    """

    level: int
    right: float | None
    wrong: float | None
    mistakes: int
    successes: int
    before: float | None
    after: float | None
    surer: float | None


@dataclass(frozen=True)
class Flip:
    """A class that becomes another: how often, as which share of its images, and how sure the victim then is."""

    before: str
    after: str
    count: int
    share: float | None
    confidence: float | None


def focus_split(splits: Sequence[str]) -> str:
    """The split to look at closely: held-out images say more than those that a victim was trained on."""
    return next((split for split in ("test", "validation") if split in splits), splits[-1])


def focus_on(manifest: Manifest, sample: Sample) -> Focus:
    """Look closely at a sample that has rows, and at the smallest epsilon that reaches half of what it could.

    Larger ones show more noise and nothing new. Where none does, it is the one that reaches most.
    """
    reached = sample.success.sum(1)
    half = np.flatnonzero(2 * reached >= _started(sample).sum())
    most = int(reached.argmax()) or len(reached) - 1
    attacked = sample.levels[1:]
    spread = {attacked[index] for index in np.linspace(0, len(attacked) - 1, SHOWN_LEVELS).round().astype(int)}
    # Examples are of the images that give in first and of those that give in last: so they must be seen to.
    onset = sample.onset[sample.success.any(0)]
    decisive = {sample.levels[index] for index in (onset.min(), onset.max())} if len(onset) else set()
    return Focus(
        sample=sample,
        index=int(half[0]) if reached.any() and len(half) else most,
        shown=(0, *sorted(spread | decisive)),
        subsets={subset.level: subset for subset in manifest.subsets if subset.split == sample.split},
        victim=model_name(manifest.config["model"]),
        evaluators=evaluator_names(manifest),
        words=WORDS[sample.aim],
        name=class_names(manifest),
    )


def headline(focus: Focus) -> str:
    """What the attack did, in a sentence or two."""
    sample, split = focus.sample, focus.sample.split
    clean, there = (sureness(sample, index) for index in (0, focus.index))
    step = f"moving every pixel value by at most {focus.level} of 255 grey levels"
    reads = f"The model {focus.victim} reads {percent(right_share(focus, 0))} of the {split} images right"
    if not there.successes:
        nothing = {"fooled": "fools it on any of them", "target": "reaches a target", "changed": "changes an answer"}
        start = reads if sample.labelled else f"The model {focus.victim} stands firm"
        return f"{start}; no step up to {sample.levels[-1]} of 255 grey levels {nothing[sample.aim]}."
    surer = percent(there.surer, 0)
    if sample.aim == "fooled":
        whose = f"the {clean.mistakes:,}" if len(sample) == sample.rows else "those"
        before = "" if clean.wrong is None else f", against {percent(clean.wrong, 0)} for {whose} on clean images"
        return (
            f"{reads}; {step} leaves {percent(right_share(focus, focus.index))}. Its mistakes are then "
            f"{percent(there.wrong, 0)} sure on average{before}, and {surer} of the fooled images get a surer answer "
            "than when they were clean."
        )
    counts = focus.subsets[focus.level]
    share = ratio(counts.fooled, counts.rows) if sample.aim == "target" else mean(sample.success[focus.index])
    does = "call its target" if sample.aim == "target" else "call something else"
    return (
        f"{step.capitalize()} makes the model {focus.victim} {does} {percent(share)} of the {split} images. It is then "
        f"{percent(there.after, 0)} sure on average, and surer than of the clean image in {surer} of the cases."
    )


def tiles(focus: Focus) -> list[tuple[str, str, str, str]]:
    """The figures at the head of the page: of what, how much, a note, and the colour."""
    words, level = focus.words, f"{focus.level}/255"
    clean, there = (sureness(focus.sample, index) for index in (0, focus.index))
    images = f"of {focus.subsets[0].rows:,} {focus.sample.split} images"
    first = [(f"{words.share}, clean", percent(right_share(focus, 0)), images, "right")]
    return [
        *(first if focus.sample.labelled else ()),
        (f"{words.share} at {level}", percent(right_share(focus, focus.index)), images, "wrong"),
        (
            f"confidence when {words.wrong}",
            percent(there.wrong, 0),
            f"at {level}; clean {percent(clean.wrong, 0)}",
            "wrong",
        ),
        ("surer than when clean", percent(there.surer, 0), f"of those {words.success} at {level}", "wrong"),
    ]


def sureness(sample: Sample, index: int) -> Sureness:
    """How sure the victim is at one of a sample's epsilons."""
    confidence, right, success = sample.confidence[index], sample.right[index], sample.success[index]
    before, after = sample.confidence[0][success], confidence[success]
    return Sureness(
        level=sample.levels[index],
        right=mean(confidence[right]),
        wrong=mean(confidence[~right]),
        mistakes=int((~right).sum()),
        successes=int(success.sum()),
        before=mean(before),
        after=mean(after),
        surer=mean(after > before),
    )


def flips(focus: Focus) -> list[Flip]:
    """Which class becomes which where the attack succeeds at the epsilon in focus, the most frequent first."""
    sample, success = focus.sample, focus.sample.success[focus.index]
    before, after = sample.prediction[0], sample.prediction[focus.index]
    counts = Counter(zip(before[success].tolist(), after[success].tolist(), strict=True))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_FLIPS]
    return [
        Flip(
            before=focus.name(was),
            after=focus.name(becomes),
            count=count,
            share=ratio(count, int((_started(sample) & (before == was)).sum())),
            confidence=mean(sample.confidence[focus.index][success & (before == was) & (after == becomes)]),
        )
        for (was, becomes), count in ranked
    ]


def confusion(focus: Focus, most: int) -> tuple[list[int], NDArray[np.float64]]:
    """What the classes that the attack moves most are taken for at the epsilon in focus.

    Args:
        focus: of an attack that succeeds there.
        most: how many classes at most.

    Returns:
        The classes, R of them in order, and (R, R + 1) shares of the images that are called each when clean: those that
        are then called each of them, and, last, all others. NaN in the rows of classes without images.
    """
    sample, success, started = focus.sample, focus.sample.success[focus.index], _started(focus.sample)
    before, after = sample.prediction[0], sample.prediction[focus.index]
    moved = Counter(before[success].tolist()) + Counter(after[success].tolist())
    classes = sorted(sorted(moved, key=lambda index: (-moved[index], index))[:most])
    shares = np.full((len(classes), len(classes) + 1), np.nan)
    for row, index in enumerate(classes):
        answers = after[started & (before == index)]
        if len(answers):
            shares[row] = [*(np.mean(answers == other) for other in classes), np.mean(~np.isin(answers, classes))]
    return classes, shares


def _started(sample: Sample) -> NDArray[np.bool_]:
    """(M,) rows that an attack can succeed on: plain, those that are right when clean."""
    started: NDArray[np.bool_] = sample.right[0] if sample.target is None else sample.prediction[0] != sample.target
    return started


def right_share(focus: Focus, index: int) -> float | None:
    """Accuracy at an epsilon, exact; without labels the share of answers that stayed, in the sample."""
    if not focus.sample.labelled:
        return mean(focus.sample.right[index])
    return accuracies(focus.subsets[focus.sample.levels[index]])[0]


def accuracies(subset: Subset) -> list[float | None]:
    """The accuracy of the victim and of each evaluator, in order."""
    correct = [subset.correct, *(counts.correct for counts in subset.evaluators.values())]
    return [ratio(count, subset.labelled) for count in correct]


def transfer_rate(counts: EvaluatorCounts) -> float | None:
    """Of the images that fool the victim and that an evaluator reads right when clean: the share that fools both."""
    return ratio(counts.transferred, counts.exposed)


def by_split(manifest: Manifest) -> dict[str, list[Subset]]:
    """The counts of every epsilon, clean first, of each split that has rows."""
    splits = {split: [there for there in manifest.subsets if there.split == split] for split in manifest.split_rows}
    return {split: subsets for split, subsets in splits.items() if any(subset.rows for subset in subsets)}


def evaluator_names(manifest: Manifest) -> tuple[str, ...]:
    """The ids of the evaluators, in order."""
    return tuple(dict.fromkeys(name for subset in manifest.subsets for name in subset.evaluators))


def class_names(manifest: Manifest) -> Callable[[int], str]:
    """What a recorded class is called: its index where it has no name."""
    classes = manifest.recorded_classes or ()
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
