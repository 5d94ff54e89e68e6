"""What `train_robust.py` prints: three tables, and what they show in plain sentences.

Every number is one of a seed first, and then a mean and a standard deviation over the seeds. Differences are taken
within a seed: its trainings began with the same weights, saw the same images in the same order, and were attacked
through the same held-out models.
"""

import statistics
from collections.abc import Mapping, Sequence

from pipeline.reporting.defence import (
    ITSELF,
    RULE,
    TOO_FEW_STEPS,
    Defence,
    Spread,
    Tested,
    columns,
    compare,
    exposes,
    tabulate,
    untrained,
)

# One number for each seed.
Values = Sequence[float]
# An error this close to another is taken for reached.
HALF_A_POINT = 0.005
# A held-out model is called weak where its clean error is above this, and above twice that of the arm of clean images.
WEAK_ERROR = 0.05


def tables(defence: Defence) -> str:
    """All tables, which read as text and as Markdown; the errors are percentages."""
    levels, middle, held_out, seeds = defence.levels, defence.middle, defence.held_out, len(defence.seeds)
    apart: dict[str, Tested] = {f"{name} {level}": ("fgsm", [name], level) for name in held_out for level in levels}
    others: dict[str, Tested] = {
        f"{name} {level}": (images, against, level)
        for name, images, against in (
            ("own FGSM", "fgsm", [ITSELF]),
            ("own PGD", "pgd", [ITSELF]),
            ("source FGSM", "fgsm", defence.sources),
            ("noise", "noise", [None]),
        )
        for level in levels
    }
    sure = {arm.id: defence.mistaken_confidence(arm.id, "fgsm", held_out, middle) for arm in defence.arms}
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    rule = f" {RULE}" if seeds > 1 else ""
    return "\n\n".join(
        [
            f"Error in percent on {defence.trainings[0].tests[0].rows:,} test images, {spread}; epsilons in grey "
            f"levels. FGSM and PGD attack the models held out ({_held_out(defence)}), own FGSM the trained one.{rule}",
            markdown(defence, columns(defence), {"images/s": {arm.id: _rate(defence, arm.id) for arm in defence.arms}}),
            f"FGSM from each held-out model, and how sure the network is of its wrong answers at {middle}/255:",
            markdown(
                defence, apart, {"sure when wrong": {arm: _points(Spread.of(each)) for arm, each in sure.items()}}
            ),
            "Attacks on the trained model itself, FGSM on the source models (their mean), and noise:",
            markdown(defence, others, {}),
        ]
    )


def _held_out(defence: Defence) -> str:
    """The names of the held-out models, with their own errors on clean images where these are recorded."""
    found = {name: Spread.of(_weakness(defence, name)) for name in defence.held_out}
    return ", ".join(f"{name}, clean error {errors}" if errors else name for name, errors in found.items())


def _weakness(defence: Defence, name: str) -> list[float]:
    """The clean error of a held-out model, by seed."""
    return [error for seed, error in sorted(defence.held_out_errors.get(name, {}).items()) if seed in defence.seeds]


def markdown(defence: Defence, tested: Mapping[str, Tested], more: Mapping[str, Mapping[str, str]]) -> str:
    """A table with a line for each arm.

    Args:
        defence: the results.
        tested: the columns of errors.
        more: other columns, each a cell for every arm.
    """
    lines = [["trained on", *tested, *more]]
    for arm, errors in tabulate(defence, tested):
        lines.append([arm.title, *map(_points, errors), *(cells[arm.id] for cells in more.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def _points(spread: Spread | None) -> str:
    return spread.points if spread else "-"


def over_epsilons(defence: Defence, arm: str) -> list[float]:
    """The error under FGSM of the held-out models, averaged over them and over the epsilons; by seed."""
    by_level = [defence.errors(arm, "fgsm", defence.held_out, level) for level in defence.levels]
    return [statistics.mean(values) for values in zip(*by_level, strict=True)]


def rates(defence: Defence, arm: str) -> list[float]:
    """Images a second while training, by seed."""
    return [one.images / one.seconds for one in defence.trained(arm)]


def _rate(defence: Defence, arm: str) -> str:
    return _mean_of(rates(defence, arm), ",.0f")


def _mean_of(values: Values, form: str) -> str:
    """A mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def beside(ours: Values, others: Values, name: str) -> str:
    """An error beside another: "12.0 ± 1.0% wrong, 30.1 ± 2.2 points below the control (42.1 ± 2.0%)"."""
    by_seed = [one - other for one, other in zip(ours, others, strict=True)]
    side = "below" if statistics.mean(by_seed) < 0 else "above"
    points = Spread.of([value if side == "above" else -value for value in by_seed])
    verdict = {None: ", of one seed, which allows no verdict", 0: ", a difference that does not count"}
    return (
        f"{Spread.of(ours)} wrong, {_points(points)} points {side} {name} ({Spread.of(others)})"
        f"{verdict.get(compare(ours, others), '')}"
    )


def findings(defence: Defence) -> list[str]:
    """What the tables show of stored images of all sources, in six sentences at most; fewer where arms are missing."""
    arms: dict[str, list[str]] = {}
    for arm in defence.arms:
        arms.setdefault(arm.kind, []).append(arm.id)
    if untrained(defence):
        return [TOO_FEW_STEPS]
    if "all" not in arms:
        return []
    stored = arms["all"][0]
    unseen = {arm.id: over_epsilons(defence, arm.id) for arm in defence.arms}
    which = next(arm.title for arm in defence.arms if arm.id == stored).removeprefix("stored, ").partition(":")[0]
    said = []
    for kind, name in (("clean", "clean training"), ("noise", "the control"), ("one", "the best single source")):
        if kind in arms:
            best = min(arms[kind], key=lambda arm: statistics.mean(unseen[arm]))
            other = f"{name}, {best.partition(':')[2]}" if kind == "one" else name
            said.append(
                f"Under FGSM of held-out models, averaged over the epsilons, training on stored images of {which} "
                f"leaves {beside(unseen[stored], unseen[best], other)}."
            )
    if exposed := exposes(defence):
        said.append(exposed)
    if "clean" in arms:
        ours, clean = (defence.errors(arm, "clean", [None], 0) for arm in (stored, arms["clean"][0]))
        said.append(
            f"On clean images, training on stored images of {which} leaves {beside(ours, clean, 'clean training')}."
        )
    if "fly" in arms:
        said.append(_cost(defence, stored))
    return said


def _cost(defence: Defence, stored: str) -> str:
    """What stored images save against own FGSM in each step: images a second, and epochs to the same error."""
    ours, fly = (rates(defence, arm) for arm in (stored, "fly"))
    ratio = _mean_of([one / other for one, other in zip(ours, fly, strict=True)], ".2f")
    ends = mean_history(defence, "fly")[-1]
    needed = [epochs_until(mean_history(defence, arm), ends + HALF_A_POINT) for arm in ("fly", stored)]
    when = [f"after epoch {epoch}" if epoch else f"in none of {defence.recipe['epochs']} epochs" for epoch in needed]
    return (
        f"Training takes {_rate(defence, stored)} stored images/s, and {_rate(defence, 'fly')} where own FGSM is made "
        f"on the fly: {ratio} times as many. On the fly ends at {100 * ends:.1f}% under FGSM of held-out models, "
        f"reached within half a point {when[0]}; stored images reach it {when[1]}."
    )


def mean_history(defence: Defence, arm: str) -> list[float]:
    """The black-box error after each epoch, averaged over the seeds."""
    histories = [one.history for one in defence.trained(arm)]
    return [statistics.mean(values) for values in zip(*histories, strict=True)]


def epochs_until(history: Values, error: float) -> int | None:
    """After how many epochs an error is at most so large for the first time; None if it never is."""
    return next((epoch for epoch, value in enumerate(history, start=1) if value <= error), None)


def weak_models(defence: Defence) -> list[str]:
    """A warning for each held-out model that has learnt too little: its attacks are then weak, too."""
    clean = [statistics.mean(defence.errors(arm.id, "clean", [None], 0)) for arm in defence.arms if arm.kind == "clean"]
    most = max([WEAK_ERROR, *(2 * error for error in clean)])
    return [
        f"Warning: held-out model {name} leaves {Spread.of(errors)} of clean images wrong; its attacks say little. "
        "Name another with --held-out, or raise --epochs."
        for name in defence.held_out
        if (errors := _weakness(defence, name)) and statistics.mean(errors) > most
    ]


def describe(defence: Defence) -> str:
    """All that is printed."""
    return "\n".join([tables(defence), "", *weak_models(defence), *findings(defence)])
