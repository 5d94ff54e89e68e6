"""What `train_robust.py` prints: two tables, and what they show in plain sentences.

Every number is one of a seed first, and then a mean and a standard deviation over the seeds. Differences are taken
within a seed: its trainings began with the same weights, saw the same images in the same order, and were attacked
through the same held-out models.
"""

import statistics
from collections.abc import Sequence

from pipeline.report.defence import ITSELF, Defence

# Images, whose gradient made them, and the epsilon, as `Defence.errors` takes them.
Tested = tuple[str, Sequence[str | None], int]
# One number for each seed.
Values = Sequence[float]


def tables(defence: Defence) -> str:
    """Both tables, which read as text and as Markdown; the errors are percentages."""
    levels, middle, held_out = defence.levels, defence.middle, defence.held_out
    errors: dict[str, Tested] = {"clean": ("clean", [None], 0)}
    errors |= {f"FGSM {level}": ("fgsm", held_out, level) for level in levels}
    errors |= {f"PGD {middle}": ("pgd", held_out, middle), f"own FGSM {middle}": ("fgsm", [ITSELF], middle)}
    apart: dict[str, Tested] = {f"{name} {level}": ("fgsm", [name], level) for name in held_out for level in levels}
    rows = {arm.title: [percent(defence.errors(arm.id, *of)) for of in errors.values()] for arm in defence.arms}
    for arm in defence.arms:
        rows[arm.title].append(f"{statistics.mean(rates(defence, arm.id)):,.0f}")
    more = {arm.title: [percent(defence.errors(arm.id, *of)) for of in apart.values()] for arm in defence.arms}
    for arm in defence.arms:
        more[arm.title].append(percent(defence.mistaken_confidence(arm.id, "fgsm", held_out, middle)))
    seeds = len(defence.seeds)
    return "\n\n".join(
        [
            f"Error in percent on {defence.trainings[0].tests[0].rows:,} test images, {_spread_of(seeds)}; epsilons in "
            f"grey levels. FGSM and PGD attack the models held out ({', '.join(held_out)}), own FGSM the trained one.",
            markdown(["trained on", *errors, "images/s"], rows),
            f"FGSM from each held-out model, and how sure the network is of its wrong answers at {middle}/255:",
            markdown(["trained on", *apart, "sure when wrong"], more),
        ]
    )


def _spread_of(seeds: int) -> str:
    return f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"


def markdown(header: Sequence[str], rows: dict[str, list[str]]) -> str:
    """A table with a line for each name."""
    lines = [list(header), *([name, *cells] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def percent(values: Values) -> str:
    """Mean and standard deviation in percent; of one seed the value, of none a dash."""
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def black_box(defence: Defence, arm: str) -> list[float]:
    """The error under FGSM of the held-out models, averaged over them and over the epsilons."""
    by_level = [defence.errors(arm, "fgsm", defence.held_out, level) for level in defence.levels]
    return [statistics.mean(values) for values in zip(*by_level, strict=True)]


def rates(defence: Defence, arm: str) -> list[float]:
    """Images a second while training."""
    return [one.images / one.seconds for one in defence.trainings if one.arm == arm and one.seed in defence.seeds]


def compared(ours: Values, others: Values, name: str) -> str:
    """An error beside another: "12.0 ± 1.0%, 30.1 ± 2.2 points below the control (42.1 ± 2.0%)". A difference that is
    no larger than its spread is said to be within it.
    """
    by_seed = [one - other for one, other in zip(ours, others, strict=True)]
    side = "below" if statistics.mean(by_seed) < 0 else "above"
    points = percent([value if side == "above" else -value for value in by_seed])
    words = f"{percent(ours)}%, {points} points {side} {name} ({percent(others)}%)"
    if len(by_seed) == 1:
        return f"{words}, of one seed, which shows no spread"
    within = abs(statistics.mean(by_seed)) <= statistics.stdev(by_seed)
    return f"{words}, which is within the spread" if within else words


def findings(defence: Defence) -> list[str]:
    """What the tables show of stored images of all sources, in six sentences at most; fewer where arms are missing."""
    arms: dict[str, list[str]] = {}
    for arm in defence.arms:
        arms.setdefault(arm.kind, []).append(arm.id)
    if "all" not in arms:
        return []
    stored, middle = arms["all"][0], defence.middle
    unseen = {arm.id: black_box(defence, arm.id) for arm in defence.arms}
    which = next(arm.title for arm in defence.arms if arm.id == stored).removeprefix("stored, ").partition(":")[0]
    said = []
    for kind, name in (("clean", "clean training"), ("noise", "the control"), ("one", "the best single source")):
        if kind in arms:
            best = min(arms[kind], key=lambda arm: statistics.mean(unseen[arm]))
            other = f"{name}, {best.partition(':')[2]}" if kind == "one" else name
            said.append(
                f"Under FGSM of held-out models, averaged over the epsilons, stored images of {which} have an error of "
                f"{compared(unseen[stored], unseen[best], other)}."
            )
    tested: dict[str, Tested] = {
        f"Under FGSM on the trained model itself at {middle}/255": ("fgsm", [ITSELF], middle),
        "On clean images": ("clean", [None], 0),
    }
    for what, of in tested.items():
        if "clean" in arms:
            ours, clean = (defence.errors(arm, *of) for arm in (stored, arms["clean"][0]))
            fly = f"; own FGSM on the fly has {percent(defence.errors('fly', *of))}%" if "fly" in arms else ""
            said.append(f"{what} they have {compared(ours, clean, 'clean training')}{fly}.")
    if "fly" in arms:
        said.append(_cost(defence, stored))
    return said


def _cost(defence: Defence, stored: str) -> str:
    """What stored images save against own FGSM in each step: images a second, and epochs to the same error."""
    ours, fly = (statistics.mean(rates(defence, arm)) for arm in (stored, "fly"))
    goal = mean_history(defence, "fly")[-1]
    needed = [epochs_until(mean_history(defence, arm), goal) for arm in (stored, "fly")]
    when = [f"after epoch {epoch}" if epoch else f"in none of {defence.recipe['epochs']} epochs" for epoch in needed]
    return (
        f"Training takes {ours:,.0f} stored images/s, and {fly:,.0f} where own FGSM is made on the fly. This ends with "
        f"an error of {100 * goal:.1f}% under FGSM of held-out models: it is there {when[1]}, and stored images "
        f"{when[0]}."
    )


def mean_history(defence: Defence, arm: str) -> list[float]:
    """The black-box error after each epoch, averaged over the seeds."""
    histories = [one.history for one in defence.trainings if one.arm == arm and one.seed in defence.seeds]
    return [statistics.mean(values) for values in zip(*histories, strict=True)]


def epochs_until(history: Values, error: float) -> int | None:
    """After how many epochs an error is at most so large for the first time; None if it never is."""
    return next((epoch for epoch, value in enumerate(history, start=1) if value <= error), None)


def describe(defence: Defence) -> str:
    """All that is printed."""
    return "\n".join([tables(defence), "", *findings(defence)])
