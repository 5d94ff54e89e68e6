"""The contenders other than ours, each in a process of its own: the bound, the plain model work, and the peers.

    python scripts/peers.py torchattacks CONFIG.yaml 2048 MARKS.json

`scripts/benchmark.py` starts them. Each reads the config that ours would read, and leaves marks: when how many
images were finished.

- bound: our own engine and nothing else: batches in memory, nothing decoded, encoded or stored. On CUDA the copies to
  and from the device are part of it.
- plain: the model work in PyTorch as anyone would write it, one batch in memory over and over.
- torchattacks, foolbox, art: as their documentation shows them, between a DataLoader and `datasets`. Nobody freezes
  the parameters there, so foolbox and art compute the weights' gradients along: ResNet-18 takes them a quarter longer.
"""

import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import typer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import models, transforms

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.cores import available_cores
from pipeline.models.checkpoints import load_checkpoint
from pipeline.models.digits_net import NETS

# Batches that the bound goes through over and over; more would only take longer to decode.
BOUND_BATCHES = 8

Marks = list[tuple[float, int]]
# A batch and its labels to (epsilon, images in [0, 1], predictions), clean first.
Attack = Callable[[Tensor, Tensor], Iterator[tuple[float, Tensor, Tensor]]]


class Stopwatch:
    """When how many images were finished."""

    def __init__(self) -> None:
        self.marks: Marks = []
        self.images = 0

    def finished(self, images: int) -> None:
        self.images += images
        self.marks.append((time.time(), self.images))


# --------------------------------------------------------------------------------------------- the bound


def run_bound(config: Config, images: int) -> Marks:
    """Our own engine over batches that are already in memory."""
    # Here, so that the peers' memory holds nothing of ours.
    from pipeline.engine.execute import attack_ahead
    from pipeline.engine.loader import load_batches
    from pipeline.engine.progress import Busy
    from pipeline.engine.run import open_run

    few = min(images, BOUND_BATCHES * config.runtime.batch_size)
    run = open_run(config.model_copy(update={"source": config.source.model_copy(update={"limit": few})}))
    pin = run.device.type == "cuda"
    batches = list(load_batches(run.reader, run.plan, run.plan.shards, config.runtime.workers, pin=pin))
    watch = Stopwatch()
    for batch, _ in attack_ahead(run, chain.from_iterable(repeat(batches, math.ceil(images / few))), Busy()):
        watch.finished(batch.place.stop - batch.place.start)
    return watch.marks


# --------------------------------------------------------------------------- what everyone writes themselves


def victim(config: Config, device: torch.device) -> nn.Module:
    """The model with its normalisation in front, as PyTorch users wrap it."""
    torch.manual_seed(config.runtime.seed)
    (section,) = config.all_models.values()
    if section.kind == "digits":
        net = NETS[section.call[0]]
        model = net.make()
        load_checkpoint(model, net.weights)
    elif section.kind == "factory":
        from pipeline.models.resnet20 import resnet20

        model = resnet20()
        if section.weights is not None:
            load_checkpoint(model, Path(section.weights))
    else:
        model = models.get_model(str(section.call[0]), weights=None)
    if section.mean is not None and section.std is not None:
        model = nn.Sequential(transforms.Normalize(section.mean, section.std), model)
    return model.eval().to(device)


def load_images(config: Config, images: int) -> DataLoader[Any]:
    """Batches of float images in [0, 1] and their labels, decoded by a worker for each core."""
    preprocess = config.preprocess
    steps: list[Any] = [] if preprocess.resize is None else [transforms.Resize(preprocess.resize)]
    steps += [] if preprocess.crop is None else [transforms.CenterCrop(preprocess.crop)]
    transform = transforms.Compose([*steps, transforms.ToTensor()])

    def decode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "image": [transform(image.convert(preprocess.mode)) for image in rows["image"]],
            "label": rows["label"],
        }

    source = datasets.load_dataset(config.model_dump()["source"]["path"], split="test")
    return DataLoader(
        source.select(range(images)).with_transform(decode),
        batch_size=config.runtime.batch_size,
        num_workers=available_cores(),
        pin_memory=torch.cuda.is_available(),
    )


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return model(images).argmax(1)


def run_plain(config: Config, images: int) -> Marks:
    """One forward, one backward to the input and a forward for each epsilon, with nothing around them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = victim(config, device).requires_grad_(False)
    batch = next(iter(load_images(config, config.runtime.batch_size)))
    pixels, labels = batch["image"].to(device), batch["label"].to(device)
    (section,) = config.all_attacks.values()
    watch = Stopwatch()
    while watch.images < images:
        clean = pixels.clone().requires_grad_()
        logits = model(clean)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), clean)
        predictions = [logits.argmax(1)]
        for level in section.levels:
            predictions.append(predict(model, (pixels + level / 255 * gradient.sign()).clamp(0, 1)))
        torch.stack(predictions).cpu()
        watch.finished(len(pixels))
    return watch.marks


# --------------------------------------------------------------------------------------------- the peers


def torchattacks_attack(model: nn.Module, epsilons: Sequence[float], example: Tensor) -> Attack:
    """torchattacks: an attack object for each epsilon, called with images and labels."""
    del example
    torchattacks = importlib.import_module("torchattacks")
    attacks = {epsilon: torchattacks.FGSM(model, eps=epsilon) for epsilon in epsilons}

    def attack(images: Tensor, labels: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
        yield 0.0, images, predict(model, images)
        for epsilon, fgsm in attacks.items():
            attacked = fgsm(images, labels)
            yield epsilon, attacked, predict(model, attacked)

    return attack


def foolbox_attack(model: nn.Module, epsilons: Sequence[float], example: Tensor) -> Attack:
    """foolbox: one call with all epsilons, which attacks once for each."""
    foolbox = importlib.import_module("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=example.device)
    fgsm = foolbox.attacks.LinfFastGradientAttack()

    def attack(images: Tensor, labels: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
        yield 0.0, images, predict(wrapped, images)
        _, clipped, _ = fgsm(wrapped, images, labels, epsilons=list(epsilons))
        for epsilon, attacked in zip(epsilons, clipped, strict=True):
            yield epsilon, attacked, predict(wrapped, attacked)

    return attack


def art_attack(model: nn.Module, epsilons: Sequence[float], example: Tensor) -> Attack:
    """The Adversarial Robustness Toolbox: NumPy in, NumPy out."""
    classification = importlib.import_module("art.estimators.classification")
    evasion = importlib.import_module("art.attacks.evasion")
    with torch.no_grad():
        classes = model(example[:1]).shape[1]
    classifier = classification.PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(example.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
    )
    size = len(example)
    attacks = {epsilon: evasion.FastGradientMethod(classifier, eps=epsilon, batch_size=size) for epsilon in epsilons}

    def attack(images: Tensor, labels: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
        clean, known = images.cpu().numpy(), labels.cpu().numpy()
        for epsilon, fgsm in ((0.0, None), *attacks.items()):
            attacked = clean if fgsm is None else fgsm.generate(x=clean, y=known)
            predictions = classifier.predict(attacked, batch_size=size).argmax(1)
            yield epsilon, torch.from_numpy(attacked), torch.from_numpy(predictions)

    return attack


PEERS = {"torchattacks": torchattacks_attack, "foolbox": foolbox_attack, "art": art_attack}
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.Value("int64"),
        "epsilon": datasets.Value("float64"),
        "prediction": datasets.Value("int64"),
    }
)


def run_peer(name: str, config: Config, images: int) -> Marks:
    """Attack and store, a Parquet file for each batch, as PNGs that `datasets` makes of Pillow images."""
    folder = Path(config.output.path)
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = victim(config, device)
    (section,) = config.all_attacks.values()
    epsilons = [level / 255 for level in section.levels]
    attack: Attack | None = None
    watch = Stopwatch()
    for index, batch in enumerate(load_images(config, images)):
        pixels, labels = batch["image"].to(device), batch["label"].to(device)
        attack = attack or PEERS[name](model, epsilons, pixels)
        rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for epsilon, attacked, predictions in attack(pixels, labels):
            rows["image"] += pil_images(attacked)
            rows["label"] += labels.tolist()
            rows["epsilon"] += [epsilon] * len(labels)
            rows["prediction"] += predictions.tolist()
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"{index:05d}.parquet")
        watch.finished(len(labels))
    return watch.marks


def pil_images(images: Tensor) -> list[Image.Image]:
    """(N, C, H, W) in [0, 1] as Pillow images."""
    pixels = (images.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image.squeeze()) for image in pixels]  # Pillow takes grayscale without its channel


def main(
    name: Annotated[str, typer.Argument()],
    config_path: Annotated[Path, typer.Argument()],
    images: Annotated[int, typer.Argument()],
    marks: Annotated[Path, typer.Argument()],
) -> None:
    """Run one contender."""
    datasets.disable_progress_bars()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the bound says how long it compiled
    config = load_config(str(config_path))
    runners = {"bound": run_bound, "plain": run_plain}
    done = runners[name](config, images) if name in runners else run_peer(name, config, images)
    marks.write_text(json.dumps(done))


if __name__ == "__main__":
    typer.run(main)
