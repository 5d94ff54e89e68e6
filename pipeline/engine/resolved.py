"""Resolved: what a run is about to do, in a few lines for people, once every `auto` is decided."""

from collections.abc import Mapping, Sequence

from pipeline.core.errors import listing, shortened
from pipeline.core.plan import Plan
from pipeline.engine.run import Run

# Class names that are shown, and characters of each.
MOST_CLASSES, MOST_NAME = 5, 30
# Where a model's mean and std come from.
ORIGINS = {"config": "from the config", "weights": "published with it", None: "by default"}


def describe_run(run: Run) -> list[str]:
    """What a run was resolved to: its images and classes, each model's input, and what computes."""
    _, height, width = run.reader.shape
    rows = ", ".join(f"{name} {count(number)}" for name, number in planned(run.plan).items())
    classes = [shortened(name, MOST_NAME) for name in next(iter(run.spaces.values())).dataset_classes]
    shown = listing(classes, MOST_CLASSES)
    config = run.config
    lines = [f"Images: {rows}; {width}x{height} {config.preprocess.mode}; {len(classes):,} classes: {shown}"]
    for name, model in run.models.items():
        section = config.all_models[name]
        mean, std = _values(section.mean or ()), _values(section.std or ())
        whence = [ORIGINS[model.stated.get(key)] for key in ("mean", "std")]
        said = whence[0] if whence[0] == whence[1] else f"mean {whence[0]}, std {whence[1]}"
        lines.append(f"Model {name}: mean {mean}, std {std} ({said})")
    computes = f"{run.device.type} in {config.runtime.precision}, {run.plan.batch_size:,} images a batch"
    return [*lines, f"Computes on {computes}"]


def planned(plan: Plan) -> Mapping[str, int | None]:
    """The rows of each split; None where that is not known."""
    splits: dict[str, int | None] = {}
    for shard in plan.shards:
        before = splits.get(shard.split, 0)
        splits[shard.split] = None if before is None or shard.rows is None else before + shard.rows
    return splits


def count(number: int | None) -> str:
    """A number for people."""
    return "unknown" if number is None else f"{number:,}"


def _values(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
