"""Train the same classifier twice from a dataset's shards, without and with its adversarial images, and compare.

    fgsm generate digits
    python scripts/train_robust.py out/digits
    python scripts/train_robust.py out/cifar10 --model scripts/resnet20.py:resnet20 --epochs 60 --workers 4

Both trainings see the same source images in the same order, for as many steps and from the same initial weights; one
sees them all clean, the other a part of them at an epsilon drawn anew in each epoch. The table that is printed shows
what either gets right:

- clean:  the clean images of the test split;
- stored: its adversarial images as they are in the dataset. They were made against the dataset's models, so for a newly
          trained model they are transferred attacks, and improvement on them alone would flatter;
- fresh:  FGSM made against the very model that is tested, which sees its weights (white-box), with the project's own
          attack on the 8-bit lattice.

The architecture is that of the dataset's first model, untrained, unless --model names another.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pipeline import training_dataset
from pipeline.attacks.base import Goal
from pipeline.attacks.fgsm import FGSM
from pipeline.check.verify import announce_factories
from pipeline.config.schema import ModelConfig
from pipeline.core.epsilon import reading_levels
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.engine.compute import Attacker, ModelAttack
from pipeline.models.base import Model
from pipeline.models.factory import FactoryConfig
from pipeline.models.load import load_model
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest, require_manifest
from pipeline.read.training import TrainingDataset

CLEAN_ONLY, MIXED = "clean only", "clean + adversarial"
WEIGHT_DECAY = 1e-2
# Small shifts stand in for more data: up to a 16th of a side, 4 pixels of 64.
SHIFT_SHARE = 16
TEST_BATCH = 256

# What is tested, `clean` or an attack at a level such as `fresh 8/255`, and the share that is right.
Accuracies = dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the same for all of them."""

    epochs: int
    batch_size: int
    learning_rate: float
    workers: int


@dataclass(frozen=True)
class Result:
    """What one trained model gets right."""

    training: str
    seed: int
    steps: int
    images: int
    accuracy: Accuracies


def new_model(config: ModelConfig, manifest: Manifest, seed: int, device: torch.device) -> Model:
    """An untrained model for the dataset's images and classes, ready to be trained.

    Raises:
        ConfigError: there is no such model, or it does not fit the images or has too few classes.
    """
    model = load_model(config.model_copy(update={"weights": None}), seed=seed, device=device)
    classes, needed = model.count_classes(manifest.shape), len(manifest.dataset_classes)
    if classes < needed:
        raise ConfigError(f"--model: it tells {classes} classes apart, and the dataset has {needed}.")
    return model


def shifted(images: Tensor) -> Tensor:
    """A batch moved by one random offset; what leaves on one side is black on the other."""
    height, width = images.shape[-2:]
    most = max(1, min(height, width) // SHIFT_SHARE)
    top, left = torch.randint(0, 2 * most + 1, (2,)).tolist()
    return F.pad(images, [most] * 4)[..., top : top + height, left : left + width]


def train(model: Model, data: TrainingDataset, recipe: Recipe, seed: int) -> tuple[int, int]:
    """Train a model in place, by AdamW and one cycle of its learning rate; then freeze it.

    Args:
        model: untrained.
        data: what it learns from; its epochs are counted from 0.
        recipe: how.
        seed: of the shifts and whatever is random in the model.

    Returns:
        Steps, and images seen.
    """
    torch.manual_seed(seed)
    module = model.module.train().requires_grad_(True)
    loader = DataLoader(data, recipe.batch_size, num_workers=recipe.workers, drop_last=True)
    steps_per_epoch = whole_batches(len(data), recipe)
    if not steps_per_epoch:
        raise ConfigError(f"--batch-size: {recipe.batch_size} images are more than a worker gets of {len(data)}.")
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps_per_epoch
    )
    steps = images = 0
    for epoch in range(recipe.epochs):
        data.set_epoch(epoch)
        for images_u8, labels in loader:
            batch = shifted(images_u8.to(model.mean.device, non_blocking=True))
            optimizer.zero_grad()
            F.cross_entropy(model(model.unit(batch)), labels.to(model.mean.device)).backward()
            optimizer.step()
            schedule.step()
            steps, images = steps + 1, images + len(labels)
    module.eval().requires_grad_(False)
    return steps, images


def whole_batches(rows: int, recipe: Recipe) -> int:
    """The steps of an epoch: workers share the rows as evenly as can be, and each drops its own last short batch."""
    workers = max(1, recipe.workers)
    each, more = divmod(rows, workers)
    return more * ((each + 1) // recipe.batch_size) + (workers - more) * (each // recipe.batch_size)


def evaluate(model: Model, output: Path, split: str, levels: Sequence[int], workers: int) -> Accuracies:
    """What a trained model gets right: clean, stored at each level, and fresh at each level.

    Args:
        model: trained and frozen.
        output: the dataset's folder.
        split: what it is tested on.
        levels: epsilons in grey levels; at those that are not recorded, stored images are made along the recorded sign.
        workers: of the DataLoader.
    """
    right: dict[str, int] = {}
    clean = training_dataset(output, split, clean=1, shuffle=False)
    attack = ModelAttack(FGSM(), "attack", "trained", asks_model=True, levels=tuple(levels), goal=Goal())
    attacker = Attacker({"trained": model}, (attack,), stored=lambda *_: ())
    for images, labels in _batches(clean, workers, model):
        draws = torch.zeros_like(labels)
        predictions = attacker(images, labels.unsqueeze(1), draws, valid=draws == 0).predictions[0]
        counts = (predictions == labels.cpu()).sum(1).tolist()
        for name, count in zip(["clean", *(f"fresh {level}/255" for level in levels)], counts, strict=True):
            right[name] = right.get(name, 0) + count
    for level in levels:
        stored = training_dataset(output, split, epsilons=[f"{level}/255"], clean=0, shuffle=False)
        right[f"stored {level}/255"] = sum(
            int((model.predict(images).argmax(1) == labels).sum())
            for images, labels in _batches(stored, workers, model)
        )
    return {name: right[name] / len(clean) for name in conditions(levels)}


def _batches(data: TrainingDataset, workers: int, model: Model) -> Iterator[tuple[Tensor, Tensor]]:
    device = model.mean.device
    for images, labels in DataLoader(data, TEST_BATCH, num_workers=workers):
        yield images.to(device), labels.to(device)


def conditions(levels: Sequence[int]) -> list[str]:
    """What is tested, in the order in which the table shows it."""
    return ["clean", *(f"{kind} {level}/255" for kind in ("stored", "fresh") for level in levels)]


def compare(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each condition what either training gets right and what the second gains, over the seeds."""
    rows = []
    for condition in results[0].accuracy:
        values = {
            training: [result.accuracy[condition] for result in results if result.training == training]
            for training in (CLEAN_ONLY, MIXED)
        }
        # Pairs of one seed began with the same weights and saw the same images in the same order.
        values["gain"] = [mixed - clean for clean, mixed in zip(values[CLEAN_ONLY], values[MIXED], strict=True)]
        rows.append({"images": condition, **{name: over_seeds(numbers) for name, numbers in values.items()}})
    return rows


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation, None of one seed."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "stdev": spread, "values": list(values)}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: a line for each condition; it reads as text and as Markdown."""
    header = ["images", CLEAN_ONLY, MIXED, "gain"]
    forms = {CLEAN_ONLY: ".1%", MIXED: ".1%", "gain": "+.1%"}
    lines = [[row["images"], *(shown(row[name], form) for name, form in forms.items())] for row in rows]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in [header, rule, *lines]
    )


def shown(value: Mapping[str, Any], form: str) -> str:
    """A mean and its spread."""
    return format(value["mean"], form) + ("" if value["stdev"] is None else f" ± {value['stdev']:.1%}")


def averaged_gains(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What adversarial images in training gain on `clean`, `stored` and `fresh` images, averaged over the epsilons."""
    gains = {}
    for kind in ("clean", "stored", "fresh"):
        by_seed = zip(*(row["gain"]["values"] for row in rows if row["images"].startswith(kind)), strict=True)
        gains[kind] = over_seeds([statistics.mean(values) for values in by_seed])
    return gains


def closing_note(rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> str:
    """What the table shows, and what it does not."""
    gains = averaged_gains(rows)
    seeds = len(gains["clean"]["values"])
    spread = f"{seeds} seeds, mean ± standard deviation" if seeds > 1 else "One seed, so nothing is known of the spread"
    return (
        f"{spread}; either training saw {results[0].images:,} images in {results[0].steps:,} steps.\n"
        f"Averaged over the epsilons, adversarial images in training gained {shown(gains['stored'], '+.1%')} on stored "
        f"attacks, {shown(gains['fresh'], '+.1%')} under fresh ones, and {shown(gains['clean'], '+.1%')} on clean "
        "images.\n"
        "Stored attacks were made against another model; only fresh ones were made against the model they test. "
        f"{verdict(gains['stored'], gains['fresh'])}\n"
        "Even fresh FGSM is a single step. Iterated attacks (PGD, AutoAttack) leave less, so nothing here measures "
        "robustness."
    )


def verdict(stored: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """What the gain under fresh attacks says of the gain on stored ones; a gain within the spread is none."""
    noise = fresh["stdev"] or 0.0
    if stored["mean"] <= (stored["stdev"] or 0.0):
        return "On stored attacks nothing was gained that could hold there."
    if fresh["mean"] > noise:
        return "Some of what was gained on stored attacks holds there."
    if fresh["mean"] < -noise:
        return "What was gained on stored attacks does not hold there: the model is easier to attack than before."
    return "What was gained on stored attacks does not hold there: the difference is within the spread."


def run(
    output: Path,
    splits: tuple[str, str],
    config: ModelConfig,
    recipe: Recipe,
    *,
    clean: float,
    train_levels: Sequence[int],
    test_levels: Sequence[int],
    seeds: int,
    device: torch.device,
) -> Iterator[Result]:
    """Train and test both ways for each seed; results as they come.

    Args:
        output: the dataset's folder.
        splits: to train on and to test on.
        config: the model; its weights are not loaded.
        recipe: how both are trained.
        clean: share of clean images in the mixed training.
        train_levels: what its other images are drawn from, in grey levels.
        test_levels: the epsilons of the table.
        seeds: how many, from 0 on: of weights, order, draws and shifts.
        device: where it runs.
    """
    manifest = require_manifest(OutputFolder(output))
    drawn, tested = ([f"{level}/255" for level in levels] for levels in (train_levels, test_levels))
    # What is wrong with what comes later should not be found after a training.
    for share in (1.0, clean):
        training_dataset(output, splits[0], epsilons=drawn, clean=share)
    training_dataset(output, splits[1], epsilons=tested)
    for seed in range(seeds):
        for training, share in ((CLEAN_ONLY, 1.0), (MIXED, clean)):
            began = time.monotonic()
            data = training_dataset(output, splits[0], epsilons=drawn, clean=share, seed=seed)
            model = new_model(config, manifest, seed, device)
            steps, images = train(model, data, recipe, seed)
            trained = time.monotonic() - began
            accuracy = evaluate(model, output, splits[1], test_levels, recipe.workers)
            typer.echo(
                f"seed {seed}, {training}: {images:,} images in {steps:,} steps, {trained:.0f} s; "
                f"clean {accuracy['clean']:.1%}",
                err=True,
            )
            yield Result(training, seed, steps, images, accuracy)


def check_writable(option: str, path: Path) -> None:
    """Find out whether a file can be written, and leave none behind: a run that is cut short has no table.

    Raises:
        ConfigError: it cannot.
    """
    there = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written ({error.strerror}); name another file.") from None
    if not there:
        path.unlink()


def main(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder of a dataset, either layout.")],
    model: Annotated[
        str | None,
        typer.Option(help="path/to/file.py:callable or package.module:callable [the dataset's first model, untrained]"),
    ] = None,
    train_split: Annotated[str, typer.Option(help="What is learnt from.")] = "train",
    test_split: Annotated[str, typer.Option(help="What is tested on.")] = "test",
    clean: Annotated[float, typer.Option(help="Share of clean images in the mixed training.")] = 0.5,
    epsilon: Annotated[
        list[str] | None, typer.Option(help="Train at this epsilon, such as 8/255; may be repeated [all recorded]")
    ] = None,
    test_epsilon: Annotated[
        list[str] | None, typer.Option(help="Test at this epsilon; may be repeated [all recorded]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of either kind.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Times that every image is seen.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0, help="The largest of the cycle.")] = 3e-3,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write the table to this file.")] = None,
) -> None:
    """Train on clean images, and on clean and adversarial ones; print one table for both."""
    try:
        for option, path in (("--json", json_path), ("--markdown", markdown_path)):
            if path is not None:
                check_writable(option, path)
        manifest = require_manifest(OutputFolder(output))
        recorded = manifest.levels[1:]
        config = next(iter(manifest.resolved.all_models.values()))
        if model is not None:
            config = FactoryConfig(kind="factory", name=model, mean=config.mean, std=config.std)
        else:
            announce_factories(OutputFolder(output), manifest)
        recipe = Recipe(epochs, batch_size, learning_rate, workers)
        results = list(
            run(
                output,
                (train_split, test_split),
                config,
                recipe,
                clean=clean,
                train_levels=reading_levels(epsilon) if epsilon else recorded,
                test_levels=reading_levels(test_epsilon) if test_epsilon else recorded,
                seeds=seeds,
                device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            )
        )
    except PipelineError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    rows = compare(results)
    text = f"{markdown(rows)}\n\n{closing_note(rows, results)}"
    typer.echo(text)
    if markdown_path is not None:
        markdown_path.write_text(text + "\n")
    if json_path is not None:
        report = {
            "command": shlex.join(sys.argv),
            "run_id": manifest.run_id,
            "recipe": {**asdict(recipe), "clean": clean, "train_split": train_split, "test_split": test_split},
            "table": rows,
            "averaged_gains": averaged_gains(rows),
            "results": [asdict(result) for result in results],
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
