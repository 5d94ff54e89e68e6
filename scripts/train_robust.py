"""Train the same classifier on each kind of a dataset's images, and see what each kind protects against.

    python scripts/train_robust.py out/digits-ensemble
    python scripts/train_robust.py out/cifar10 --epochs 10 --seeds 3 --workers 2

Each arm trains the same architecture from the same weights, on the same source images in the same order, for as many
steps. They differ in what is shown in place of a share of the clean images: nothing else, random signs of the same size
(the control), stored images of one source model, stored images of all, FGSM made on the model itself in each step, or
both. What is trained is the dataset's first model, untrained, unless --model names another.

Each trained model is tested on clean images, on noise, on stored images of the test split, and on fresh images of FGSM
and PGD, made against

- the trained model itself, which sees its weights (white-box);
- the source models;
- models held out: architectures that made none of the images, trained here on clean images (black-box). What stored
  images protect against shows here.

OUTPUT/defence.json holds all results. It is written after each training: run the same command again to resume, or with
more --seeds to add some. The report of the dataset shows it.
"""

import contextlib
import hashlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Annotated

import torch
import typer
from arms import CLEAN_ONLY, Contents, Reader, Recipe
from defence_table import describe
from outcomes import Condition, Pictures, ask, fresh_pictures, outcomes, stored_pictures
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from training import descent, shifted

from pipeline.check.verify import announce_factories
from pipeline.config.schema import ModelConfig
from pipeline.core.cores import available_cores
from pipeline.core.errors import ConfigError, Interrupted, NonFiniteError, PipelineError
from pipeline.core.interrupts import interruptible
from pipeline.engine.run import choose_device, load_run_model, versions
from pipeline.models.base import Model
from pipeline.models.factory import FactoryConfig
from pipeline.models.load import load_model
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest, current_manifest
from pipeline.reporting.defence import DEFENCE, ITSELF, Arm, Defence, Training, read_defence
from pipeline.reporting.page import report as write_report

# Test images on which the held-out models' attacks are tried after each epoch.
HISTORY_ROWS = 500
# Images below this side are small: starting a second thread takes longer than a layer, and they have held-out models of
# their own.
LARGE_FROM = 32
SMALL_HELD_OUT, HELD_OUT = ("elu", "normed"), ("grouped", "average")


@dataclass(frozen=True)
class Study:
    """What all trainings on a dataset share.

    target, held_out: models to be trained, the latter by their names. arms: those that are trained.
    """

    output: Path
    manifest: Manifest
    contents: Contents
    recipe: Recipe
    target: ModelConfig
    held_out: dict[str, ModelConfig]
    arms: tuple[Arm, ...]
    device: torch.device

    def new_model(self, name: str, seed: int) -> Model:
        """An untrained model: a held-out one, or `itself` for the target.

        Raises:
            ConfigError: there is no such model, or it does not fit the images or has too few classes.
        """
        key, config = ("--model", self.target) if name == ITSELF else ("--held-out", self.held_out[name])
        model = load_model(config.model_copy(update={"weights": None}), seed=seed, device=self.device)
        classes, needed = model.count_classes(self.manifest.shape), len(self.manifest.dataset_classes)
        if classes < needed:
            raise ConfigError(f"{key}: it tells {classes} classes apart, and the dataset has {needed}.")
        return model

    def open(self, arm: Arm, seed: int) -> Reader:
        """What an arm shows.

        Raises:
            ConfigError, PipelineError: as `training_dataset`, or a batch is more than there is.
        """
        reader = Reader.open(arm, self.contents, self.recipe, self.output, seed)
        if not reader.steps:
            rows = len(reader.data)
            raise ConfigError(f"--batch-size: {self.recipe.batch_size} images are more than a worker gets of {rows}.")
        return reader

    def digests(self) -> dict[str, str]:
        """What tells the target and the held-out models from others of the same name: their parameters' shapes.

        Raises:
            ConfigError: as `new_model`.
        """
        found = {}
        for name in (ITSELF, *self.held_out):
            state = self.new_model(name, seed=0).module.state_dict()
            shapes = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
            found[name] = hashlib.sha256(shapes.encode()).hexdigest()[:16]
        return found

    def source(self, name: str) -> Model:
        """A source model, as it was when the dataset was made.

        Raises:
            ConfigError: it cannot be loaded, or has changed since.
        """
        model = load_run_model(name, self.manifest.resolved, self.device)
        if model.digest != self.manifest.identity.get(f"models.{name}.content"):
            raise ConfigError(f"models.{name}: the model has changed since the dataset was made; put it back.")
        return model


def train(model: Model, reader: Reader, seed: int, after_epoch: Callable[[Model], float]) -> tuple[float, list[float]]:
    """Train a model in place, by AdamW and one cycle of its learning rate; then freeze it.

    Args:
        model: untrained.
        reader: what it learns from.
        seed: of the shifts, of what is attacked on the way, and of whatever is random in the model.
        after_epoch: is given the model in eval mode.

    Returns:
        Seconds, without those of `after_epoch`, and what that said after each epoch.

    Raises:
        NonFiniteError: the loss is no number.
    """
    recipe, device, module = reader.recipe, model.mean.device, model.module.requires_grad_(True)
    torch.manual_seed(seed)
    # Of their own, so that arms that draw more are moved alike.
    shifts, draws = (torch.Generator().manual_seed(seed) for _ in range(2))
    descend = descent(module, recipe.learning_rate, recipe.epochs * reader.steps)
    seconds, history = 0.0, []
    for epoch in range(recipe.epochs):
        module.train()
        began = time.perf_counter()
        for images, labels, now in reader.batches(epoch, draws):
            images, labels = shifted(images.to(device, non_blocking=True), shifts), labels.to(device)
            if now.any():
                now = now.to(device)
                images[now] = reader.attacked(model, images[now], labels[now], draws)
            loss = F.cross_entropy(model(model.unit(images)), labels)
            descend(loss)
        # To look at the loss waits for the device, too.
        if not math.isfinite(loss.detach()):
            raise NonFiniteError("The loss is no number any more; lower --learning-rate.")
        seconds += time.perf_counter() - began
        module.eval()
        history.append(after_epoch(model))
    module.requires_grad_(False)
    return seconds, history


def run(study: Study, defence: Defence, seeds: int) -> Defence:
    """Train and test what is missing, seed by seed, and write the results after each training.

    Args:
        study: what is trained.
        defence: the results so far.
        seeds: how many, from 0 on: of weights, order and draws.
    """
    done = {(one.arm, one.seed) for one in defence.trainings}
    missing = {seed: [arm for arm in study.arms if (arm.id, seed) not in done] for seed in range(seeds)}
    missing = {seed: arms for seed, arms in missing.items() if arms}
    if not missing:
        return defence
    began, before = time.monotonic(), defence.seconds
    pictures, labels = stored_pictures(study.output, study.contents, study.recipe)
    clean = pictures[Condition("clean", None, 0)]
    for name in study.contents.sources:
        own = study.manifest.label_spaces[name].model_labels(labels)
        pictures |= fresh_pictures(study.source(name), name, clean, own, study.contents.levels)
    folder = OutputFolder(study.output)
    total = sum(len(arms) + len(study.held_out) for arms in missing.values())
    with tqdm(total=total, unit="training", disable=None) as bar:
        for seed, arms in missing.items():
            unseen: Pictures = {}
            for name in study.held_out:
                made, error = held_out_pictures(study, name, seed, clean, labels)
                unseen |= made
                errors = {**defence.held_out_errors.get(name, {}), seed: error}
                defence = defence.model_copy(update={"held_out_errors": {**defence.held_out_errors, name: errors}})
                bar.update()
            for arm in arms:
                training = train_arm(study, arm, seed, pictures | unseen, unseen, labels)
                defence = defence.model_copy(
                    update={
                        "trainings": (*defence.trainings, training),
                        "seconds": before + time.monotonic() - began,
                    }
                )
                folder.store.write(DEFENCE, defence.model_dump_json(indent=1).encode())
                bar.write(
                    f"seed {seed}, {arm.title}: {training.images:,} images in {training.seconds:.1f} s; wrong "
                    f"{training.tests[0].error:.1%} clean, {training.history[-1]:.1%} under attacks of held-out models",
                    file=sys.stderr,
                )
                bar.update()
    return defence


def held_out_pictures(study: Study, name: str, seed: int, clean: Tensor, labels: Tensor) -> tuple[Pictures, float]:
    """Train a held-out model on clean images, and attack it; and its error on the clean images."""
    model = study.new_model(name, seed)
    train(model, study.open(CLEAN_ONLY, seed), seed, lambda _: 0.0)
    return fresh_pictures(model, name, clean, labels, study.contents.levels), error_on(model, clean, labels)


def error_on(model: Model, images: Tensor, labels: Tensor) -> float:
    """The share of images that a model gets wrong."""
    return float((ask(model, images).argmax(1) != labels).float().mean())


def train_arm(study: Study, arm: Arm, seed: int, pictures: Pictures, unseen: Pictures, labels: Tensor) -> Training:
    """Train the target as an arm does, and test it.

    Args:
        study: what all trainings share.
        arm: what is shown.
        seed: of weights, order and draws.
        pictures: what it is tested on, beside attacks on itself.
        unseen: those of them that attack held-out models.
        labels: theirs.
    """
    model, reader = study.new_model(ITSELF, seed), study.open(arm, seed)
    tried = [images[:HISTORY_ROWS] for condition, images in unseen.items() if condition.images == "fgsm"]
    wanted = labels[:HISTORY_ROWS].repeat(len(tried))
    images = torch.cat(tried)
    seconds, history = train(model, reader, seed, lambda model: error_on(model, images, wanted))
    clean = pictures[Condition("clean", None, 0)]
    itself = fresh_pictures(model, ITSELF, clean, labels, study.contents.levels)
    return Training(
        arm=arm.id,
        seed=seed,
        images=study.recipe.epochs * reader.steps * study.recipe.batch_size,
        seconds=seconds,
        history=tuple(history),
        tests=tuple(outcomes(model, pictures | itself, labels)),
    )


def make_study(output: Path, recipe: Recipe, model: str | None, held_out: Sequence[str], arms: Sequence[str]) -> Study:
    """Find out what there is to train.

    Args:
        output: the dataset's folder.
        recipe: how.
        model: a callable that makes the target; None: the dataset's first model.
        held_out: callables that make a model from channels, side and classes; none: two of `held_out.py`.
        arms: ids; none: all.

    Raises:
        ConfigError: the dataset does not do for it, or there is no such arm.
        PipelineError: the dataset cannot be read.
    """
    folder = OutputFolder(output)
    manifest = current_manifest(folder)
    channels, height, width = manifest.shape
    if height != width:
        raise ConfigError(
            f"preprocess.crop: train_robust.py takes square images; these are {width}x{height}; set preprocess.crop."
        )
    contents = Contents.of(manifest)
    announce_factories(folder, manifest)
    known = {arm.id: arm for arm in contents.arms}
    unknown = [arm for arm in arms if arm not in known]
    if unknown:
        raise ConfigError(f"--arms: there is no arm {unknown[0]!r}; there are {', '.join(known)}.")
    target = next(iter(manifest.resolved.all_models.values()))
    made = {"kind": "factory", "mean": target.mean, "std": target.std}
    kwargs = {"channels": channels, "side": height, "classes": len(manifest.dataset_classes)}
    own = SMALL_HELD_OUT if height < LARGE_FROM else HELD_OUT
    held_out = held_out or [f"{Path(__file__).with_name('held_out.py')}:{name}" for name in own]
    names = [name.rpartition(":")[2] for name in held_out]
    twice = [name for name in names if names.count(name) > 1 or name in (*contents.sources, ITSELF)]
    if twice:
        raise ConfigError(f"--held-out: two models are called {twice[0]}; rename the callable.")
    return Study(
        output=output,
        manifest=manifest,
        contents=contents,
        recipe=recipe,
        target=target if model is None else FactoryConfig(**made, name=model),
        held_out={
            name: FactoryConfig(**made, name=where, kwargs=kwargs) for name, where in zip(names, held_out, strict=True)
        },
        arms=tuple(arm for arm in contents.arms if not arms or arm.id in arms),
        device=choose_device("auto"),
    )


def begin(study: Study, model: str | None, *, overwrite: bool) -> Defence:
    """The results so far, none at first, as they go on.

    Args:
        study: what is trained.
        model: as `make_study` has it.
        overwrite: forget the results that cannot be resumed.

    Raises:
        ConfigError: a model cannot be made, or `overwrite` is false and there are results that cannot be resumed.
        PipelineError: `overwrite` is false and the file is none of ours.
    """
    folder = OutputFolder(study.output)
    first, there = next(iter(study.manifest.resolved.all_models)), versions(study.device)
    new = Defence(
        run_id=study.manifest.run_id,
        command=shlex.join(sys.argv),
        machine=f"{available_cores()} cores, {there['device']}",
        versions=there,
        seconds=0,
        recipe=asdict(study.recipe),
        target=first if model is None else PurePath(model).name,
        sources=study.contents.sources,
        held_out=tuple(study.held_out),
        levels=study.contents.levels,
        arms=study.arms,
        trainings=(),
        receipts=study.manifest.receipts,
        digests=study.digests(),
    )
    if DEFENCE not in folder.store.sizes():
        return new
    try:
        former = former_results(folder, new)
    except PipelineError:
        if overwrite:
            return new
        raise
    trained = {one.arm for one in former.trainings} | {arm.id for arm in study.arms}
    arms = tuple(arm for arm in study.contents.arms if arm.id in trained)
    return former.model_copy(update={"command": new.command, "arms": arms})


def former_results(folder: OutputFolder, new: Defence) -> Defence:
    """The results that there are.

    Args:
        folder: of the dataset.
        new: without results, but with the images, models and settings that results must be of.

    Raises:
        ConfigError: they are of others.
        PipelineError: the file is none of ours.
    """
    former, where = read_defence(folder, new.run_id), folder.store.at(DEFENCE)
    if former is None:
        raise ConfigError(f"{where} is of another run of the dataset; --overwrite starts anew.")
    before, now = ({"model": one.target, "held-out": ", ".join(one.held_out), **one.recipe} for one in (former, new))
    for key, value in now.items():
        if before.get(key) != value:
            raise ConfigError(
                f"--{key.replace('_', '-')}: {where} was begun with {before.get(key)}, and this is {value}; name the "
                "same, or start anew with --overwrite."
            )
    if not former.digests:
        raise ConfigError(
            f"{where} does not record the models and images that it is of, so nothing can be added; move it away, or "
            "start anew with --overwrite."
        )
    if former.receipts != new.receipts:
        raise ConfigError(
            f"{where} was measured on other images: shards of the dataset were added, removed or made anew since; "
            "start anew with --overwrite."
        )
    for name, digest in new.digests.items():
        if former.digests.get(name) != digest:
            raise ConfigError(
                f"{'--model' if name == ITSELF else f'--held-out: {name}'}: its parameters are not those of the model "
                f"that {where} was begun with; put that back, or start anew with --overwrite."
            )
    return former


def measure(study: Study, model: str | None, seeds: int, *, overwrite: bool) -> Defence:
    """Go on from the results that there are, while nobody else writes to the dataset's folder.

    Args:
        study, seeds: as `run` has them.
        model, overwrite: as `begin` has them.

    Raises:
        ConfigError: as `begin` and `Study.open`.
        PipelineError: as these, or another process works in the folder.
    """
    with OutputFolder(study.output).store.held(), threads_for(study.manifest.shape):
        defence = begin(study, model, overwrite=overwrite)
        for sentence in left_out(study):
            typer.echo(sentence, err=True)
        # What is wrong shows before the first training, not after it.
        for arm in study.arms:
            study.open(arm, seed=0)
        return run(study, defence, seeds)


def left_out(study: Study) -> list[str]:
    """What of a dataset is not used, in sentences."""
    contents, manifest = study.contents, study.manifest
    said = [
        f"Attack {name} is left out: its epsilons are not those of {contents.attack}, so they cannot be compared."
        for name in contents.left_out
    ]
    if not manifest.complete:
        said.append(
            f"Warning: {study.output} is incomplete. What is trained on now cannot be resumed once more shards are "
            "there; run the generate command that made it first."
        )
    return said


@contextlib.contextmanager
def threads_for(shape: Sequence[int]) -> Iterator[None]:
    """One thread for small images, which is faster for them; else as many as PyTorch takes."""
    before = torch.get_num_threads()
    if max(shape[1:]) < LARGE_FROM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder of a dataset, any layout.")],
    model: Annotated[
        str | None,
        typer.Option(help="What is trained: path/to/file.py:callable [the dataset's first model, untrained]"),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="path/to/file.py:callable(channels, side, classes); repeat it for several [two that fit]"),
    ] = None,
    arms: Annotated[list[str] | None, typer.Option(help="Train this arm; repeat it for several [all]")] = None,
    train_split: Annotated[str, typer.Option(help="What is learnt from.")] = "train",
    test_split: Annotated[str, typer.Option(help="What is tested on.")] = "test",
    test_rows: Annotated[int, typer.Option(min=1, help="Test images that are used, the first as stored.")] = 1000,
    clean: Annotated[float, typer.Option(help="Share of clean images in every arm but the clean one.")] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Times that every image is seen.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0, help="The largest of the cycle.")] = 3e-3,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget results of other settings, models or images.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Make the dataset's report anew.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Copy the results to this file.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write the tables to this file.")] = None,
) -> None:
    """Train a classifier on each kind of a dataset's images, and test all under attacks of models never seen."""
    recipe = Recipe(epochs, batch_size, learning_rate, clean, workers, train_split, test_split, test_rows)
    try:
        for option, path in (("--json", json_path), ("--markdown", markdown_path)):
            if path is not None:
                check_writable(option, path)
        with interruptible(lambda: typer.echo("\nInterrupted. Run the same command again to resume.", err=True)):
            study = make_study(output, recipe, model, held_out or (), arms or ())
            defence = measure(study, model, seeds, overwrite=overwrite)
            text = describe(defence)
            typer.echo(text)
            if markdown_path is not None:
                markdown_path.write_text(text + "\n")
            if json_path is not None:
                json_path.write_text(defence.model_dump_json() + "\n")
            if report:
                typer.echo(f"Report: {write_report(output)}", err=True)
    except Interrupted as interrupt:
        raise typer.Exit(128 + interrupt.signum) from None
    except PipelineError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
