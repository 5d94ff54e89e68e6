"""Train the models of a config that have no weights yet, on the clean images of its train split.

    python scripts/train_sources.py cifar10-ensemble
    fgsm generate cifar10-ensemble

These are the models of kind factory whose `weights` name a .safetensors file that does not exist; the file is written.
Images are read, resized and cropped as the run itself would. All of them are kept in memory, as uint8.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from training import accuracy, train

from pipeline.config.load import load_config
from pipeline.config.schema import Config, ModelConfig
from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError, explained
from pipeline.engine.loader import load_batches
from pipeline.engine.run import Run, open_run
from pipeline.models.load import load_model

TRAIN = "train"
BATCH_SIZE = 128

# Of each split: images (N, C, H, W) uint8 and labels (N,) int64.
Images = dict[str, tuple[Tensor, Tensor]]


def without_weights(config: Config) -> list[str]:
    """The ids of the models that are to be trained."""
    return [
        name
        for name, model in config.all_models.items()
        if model.kind == "factory" and (model.weights or "").endswith(".safetensors") and not file_of(model).exists()
    ]


def file_of(model: ModelConfig) -> Path:
    return Path(str(model.weights)).expanduser()


@contextlib.contextmanager
def writing(name: str, path: Path) -> Iterator[Path]:
    """Where the weights of a model are written before they have the name of their file: one cut short is no weights.

    Raises:
        ConfigError: they cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(
        f"models.{name}.weights: {path} cannot be written",
        "name another file",
        errors=(OSError, SafetensorError),
        kind=ConfigError,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)


def open_untrained(config: Config, names: list[str]) -> Run:
    """The run of a config, with models that have no weights yet; nothing is compiled for them."""
    models = dict(config.all_models)
    models |= {name: models[name].model_copy(update={"weights": None}) for name in names}
    runtime = config.runtime.model_copy(update={"compile": False})
    return open_run(config.with_models(models).model_copy(update={"runtime": runtime}))


def read_images(run: Run) -> Images:
    """All clean images of a run.

    Raises:
        ConfigError: there is no train split, or an image has no label.
    """
    if TRAIN not in run.source.splits:
        raise ConfigError(f"source.split: there is no split {TRAIN} to train on, only {', '.join(run.source.splits)}.")
    found = {}
    for split in run.source.splits:
        shards = [shard for shard in run.plan.shards if shard.split == split]
        batches = load_batches(run.reader, run.plan, shards, run.config.runtime.workers)
        parts = [(batch.images[batch.valid], batch.labels[batch.valid]) for batch in batches]
        images, labels = (torch.cat(part).to(run.device) for part in zip(*parts, strict=True))
        if (labels == UNLABELLED).any():
            raise ConfigError(f"source: images of split {split} have no label, and a model is trained on labels.")
        found[split] = images, labels
    return found


def train_source(run: Run, config: ModelConfig, name: str, found: Images, epochs: int) -> None:
    """Train one model of a run and write its weights.

    Args:
        run: whose model it is.
        config: of the model.
        name: its id. Its place among the models is the seed.
        found: the images of each split.
        epochs: how often each is seen.
    """
    started, seed = time.perf_counter(), [*run.models].index(name)
    model = load_model(config.model_copy(update={"weights": None}), seed=seed, device=run.device)
    to_model = run.models[name].space.model_labels
    images, labels = found[TRAIN]
    torch.manual_seed(seed)
    train(
        model.module.requires_grad_(True),
        lambda images_u8: model(model.unit(images_u8)),
        images,
        to_model(labels),
        epochs=epochs,
        batch_size=min(BATCH_SIZE, len(images)),
        flip=images.shape[1] == 3,  # what is grayscale here is mostly writing, which does not read mirrored
    )
    path = file_of(config)
    with writing(name, path) as aside:
        save_file({key: value.contiguous() for key, value in model.module.state_dict().items()}, aside)
        aside.replace(path)
    right = [f"{split} {accuracy(model.predict, each, to_model(own)):.4f}" for split, (each, own) in found.items()]
    size = sum(parameter.numel() for parameter in model.module.parameters())
    seconds = time.perf_counter() - started
    typer.echo(f"{name}: {size:,} parameters, accuracy {', '.join(right)}; {path}, {seconds:.0f} s")


def main(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A config file, or the name of a shipped config.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times that every image is seen.")] = 15,
) -> None:
    """Train the models of a config that have no weights yet."""
    try:
        loaded = load_config(config, overrides or ())
        names = without_weights(loaded)
        if not names:
            typer.echo(f"Nothing to train: no model of {config} is of kind factory and lacks its .safetensors file.")
            return
        run = open_untrained(loaded, names)
        found = read_images(run)
        for name in names:
            # What cannot be written shows before the training, not after it.
            with writing(name, file_of(loaded.all_models[name])) as aside:
                aside.touch()
        typer.echo(f"Training {', '.join(names)} on {len(found[TRAIN][0]):,} images, {epochs} epochs each.")
        for name in names:
            train_source(run, loaded.all_models[name], name, found, epochs)
    except PipelineError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    # It warns of models that are right by chance alone, which is what untrained ones are.
    logging.getLogger("pipeline.engine.run").setLevel(logging.ERROR)
    typer.run(main)
