"""What training on a dataset protects against: what each arm shows, and errors that are those of the images they name."""

import copy
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import pipeline
from pipeline.attacks.base import direction_sign
from pipeline.attacks.iterative import PGD, PGDConfig
from pipeline.core.lattice import step
from pipeline.models.attacked import AttackedModel
from pipeline.models.base import Model
from pipeline.report.defence import ITSELF, Arm, Defence, Outcome, Training
from tests.conftest import REPOSITORY, generate

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import defence_table
import held_out
import train_robust
from arms import CLEAN_ONLY, Contents, Reader, Recipe

LEVELS = (16, 48)
RECIPE = Recipe(
    epochs=1,
    batch_size=16,
    learning_rate=3e-3,
    clean=0.5,
    workers=0,
    train_split="train",
    test_split="test",
    test_rows=60,
)
OPTIONS = ("--epochs", "1", "--batch-size", "16", "--test-rows", "60")
ARMS = (
    "clean",
    "noise",
    "one:conv",
    "one:flat",
    "all:plain",
    "all:guessed",
    "all:unlikely",
    "fly",
    "both",
)
NETS = """
from torch import nn

def conv():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


def make(folder: Path, attacks: dict[str, Any]) -> Path:
    """A dataset of 80 digits to learn from and 80 to test on, of 8 pixels a side, attacked through two models."""
    (folder / "nets.py").write_text(NETS)
    epsilons = {"epsilons": [f"{level}/255" for level in LEVELS]}
    config = {
        "source": {"kind": "digits", "split": ["train", "test"], "limit": 80},
        "preprocess": {"mode": "L", "resize": 8},
        "models": {name: {"kind": "factory", "name": f"{folder}/nets.py:{name}"} for name in ("conv", "flat")},
        "attacks": {name: copy.deepcopy(section | epsilons) for name, section in attacks.items()},
        "output": {"path": str(folder / "out")},
        "runtime": {"device": "cpu", "workers": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    generate(folder / "config.yaml")
    return folder / "out"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With three gradient attacks and noise. The plain one is not the first, and has not the name of its kind."""
    return make(
        tmp_path_factory.mktemp("digits"),
        {
            "guessed": {"kind": "fgsm", "label": "prediction"},
            "plain": {"kind": "fgsm"},
            "unlikely": {"kind": "fgsm", "target": "least_likely"},
            "signs": {"kind": "noise"},
        },
    )


@pytest.fixture
def output(digits: Path, tmp_path: Path) -> Path:
    """The dataset, of a test's own."""
    return Path(shutil.copytree(digits, tmp_path / "out"))


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The script, run whole on the dataset with two seeds; and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    output = Path(shutil.copytree(digits, folder / "out"))
    result = run(output, *OPTIONS, "--seeds", 2, "--json", folder / "copy.json", "--markdown", folder / "tables.md")
    assert result.exit_code == 0, result.output
    return output, result


def run(*arguments: str | int | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train_robust.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def read(output: Path) -> Defence:
    return Defence.model_validate_json((output / "defence.json").read_bytes())


def study_of(output: Path, recipe: Recipe = RECIPE) -> train_robust.Study:
    return train_robust.make_study(output, recipe, None, train_robust.HELD_OUT, ())


def test_every_arm_is_trained_and_tested_with_every_seed(whole: tuple[Path, Result]) -> None:
    output, result = whole
    defence = read(output)
    assert [(one.seed, one.arm) for one in defence.trainings] == [(seed, arm) for seed in (0, 1) for arm in ARMS]
    assert (defence.target, defence.sources, defence.held_out) == ("conv", ("conv", "flat"), ("elu", "normed"))
    wanted = [("clean", None, 0)]
    for level in LEVELS:
        wanted += [("noise", None, level), *(("stored", source, level) for source in defence.sources)]
        for against in (*defence.sources, *defence.held_out, ITSELF):
            wanted += [("fgsm", against, level), ("pgd", against, level)]
    for training in defence.trainings:
        assert sorted(((one.images, one.against, one.level) for one in training.tests), key=str) == sorted(
            wanted, key=str
        )
        assert (training.images, len(training.history)) == (80, 1)
        assert {one.rows for one in training.tests} == {60}
    folder = output.parent
    assert json.loads((folder / "copy.json").read_text()) == json.loads((output / "defence.json").read_text())
    assert (folder / "tables.md").read_text() == result.stdout
    assert len(result.stderr.splitlines()) >= len(defence.trainings)


def trained(study: train_robust.Study, name: str, arm: str, seed: int) -> Model:
    model = study.new_model(name, seed)
    (found,) = [one for one in study.arms if one.id == arm]
    train_robust.train(model, study.open(found, seed), seed, lambda _: 0.0)
    return model


def fgsm(model: Model, images: Tensor, labels: Tensor, level: int) -> Tensor:
    direction = AttackedModel(model, images, targeted=False).gradient(images, labels)
    return step(images, direction_sign(direction), level)


def pgd(model: Model, images: Tensor, labels: Tensor, level: int) -> Tensor:
    schedule = PGDConfig(epsilons=(f"{level}/255",)).schedule
    draws = torch.randint(2**32, (len(images),), generator=torch.Generator().manual_seed(0))
    seen = AttackedModel(model, images, targeted=False)
    return PGD(schedule).perturb(seen, images, labels, (level,), draws).images[0]


def test_the_tables_are_those_of_predictions_that_are_made_here(whole: tuple[Path, Result]) -> None:
    output, result = whole
    study, defence = study_of(output), read(output)

    def stored(level: int, **chosen: str) -> Tensor:
        return pipeline.load(output, [f"{level}/255"], "test", **chosen).with_format("torch")["image"][:60]

    rows = pipeline.load(output, [0], "test").with_format("torch")
    clean, labels = rows["image"][:60], rows["label"][:60]
    sources = {name: study.source(name) for name in ("conv", "flat")}
    errors: dict[tuple[Any, ...], list[float]] = {}
    for seed in (0, 1):
        model = trained(study, ITSELF, "all:plain", seed)
        models = {ITSELF: model, **sources, **{name: trained(study, name, "clean", seed) for name in study.held_out}}
        images = {("clean", None, 0): clean}
        for level in LEVELS:
            images["noise", None, level] = stored(level, attacks="signs")
            for name in sources:
                images["stored", name, level] = stored(level, attacks="plain", models=name)
            for name, attacked in models.items():
                images["fgsm", name, level] = fgsm(attacked, clean, labels, level)
                images["pgd", name, level] = pgd(attacked, clean, labels, level)
        (training,) = [one for one in defence.trainings if (one.arm, one.seed) == ("all:plain", seed)]
        for test in training.tests:
            confidences, answers = model.predict(images[test.images, test.against, test.level]).softmax(1).max(1)
            wrong = answers != labels
            assert test.wrong == int(wrong.sum())
            assert test.wrong_confidence == (pytest.approx(float(confidences[wrong].mean())) if wrong.any() else None)
            errors.setdefault((test.images, test.against, test.level), []).append(float(wrong.float().mean()))
        unseen = [errors["fgsm", name, level][seed] for name in study.held_out for level in LEVELS]
        assert training.history[-1] == pytest.approx(sum(unseen) / 4)

    def shown(images: str, level: int, *against: str | None) -> str:
        first, second = (sum(errors[images, name, level][seed] for name in against) / len(against) for seed in (0, 1))
        return f"{50 * (first + second):.1f} ± {100 * abs(first - second) / 2**0.5:.1f}"

    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in result.stdout.splitlines()]
    first, second = [line[1:] for line in lines if line[0] == "stored, all sources: FGSM"]
    assert first[:-1] == [
        shown("clean", 0, None),
        *(shown("fgsm", level, "elu", "normed") for level in LEVELS),
        shown("pgd", 48, "elu", "normed"),
        shown("fgsm", 48, ITSELF),
    ]
    assert second == [shown("fgsm", level, name) for name in study.held_out for level in LEVELS]
    rates = [one.images / one.seconds for one in defence.trainings if one.arm == "all:plain"]
    assert first[-1] == f"{sum(rates) / 2:,.0f}"


class Watched:
    """What a model is trained on: uint8 images as its module sees them, and FGSM on it as it is then."""

    def __init__(self, model: Model, clean: Tensor, labels: Tensor) -> None:
        self.images: list[Tensor] = []
        self.fgsm: dict[int, list[Tensor]] = {level: [] for level in LEVELS}
        self._model, self._clean, self._labels = model, clean.split(16), labels.split(16)
        model.module.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if not module.training or inputs[0].requires_grad:
            return
        frozen = copy.deepcopy(self._model)
        frozen.module._forward_pre_hooks.clear()
        frozen.module.eval()
        batch = len(self.images)
        self.images.append((inputs[0] * 255).round().to(torch.uint8))
        for level, made in self.fgsm.items():
            made.append(fgsm(frozen, self._clean[batch], self._labels[batch], level))


def epoch_of(output: Path, arm: str) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """The clean images of an epoch, what an arm trains on in their place, and FGSM on the model that is trained."""
    study = study_of(output)
    contents = study.contents
    clean, labels, _ = map(torch.cat, zip(*open_arm(study, "clean").batches(0, torch.Generator()), strict=True))
    model = study.new_model(ITSELF, 0)
    watched = Watched(model, clean, labels)
    train_robust.train(model, open_arm(study, arm), 0, lambda _: 0.0)
    assert contents.attack == "plain"
    return clean, torch.cat(watched.images), {level: torch.cat(made) for level, made in watched.fgsm.items()}


def open_arm(study: train_robust.Study, arm: str) -> Reader:
    (found,) = [one for one in study.contents.arms if one.id == arm]
    return study.open(found, 0)


def rows_of(output: Path, clean: Tensor) -> Tensor:
    """Which row of the train split each clean image is."""
    stored = pipeline.load(output, [0], "train").with_format("torch")["image"][:]
    same = (clean[:, None] == stored[None]).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def among(shown: Tensor, choices: list[Tensor]) -> Tensor:
    """Of which choice each image is, -1 of none: (N,) of the images (N, ...)."""
    same = torch.stack([(shown == choice).flatten(1).all(1) for choice in choices])
    return torch.where(same.any(0), same.int().argmax(0), -1)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_shows_what_it_says(digits: Path, arm: str) -> None:
    clean, shown, own = epoch_of(digits, arm)
    rows = rows_of(digits, clean)

    def stored(attack: str, model: str | None) -> list[Tensor]:
        read = (pipeline.load(digits, [f"{k}/255"], "train", attacks=attack, models=model) for k in LEVELS)
        return [data.with_format("torch")["image"][:][rows] for data in read]

    name = arm.partition(":")[2]
    fly = [own[level] for level in LEVELS]
    attacked = {
        "clean": [],
        "noise": stored("signs", None),
        "one": stored("plain", name) if arm.startswith("one") else [],
        "all": [*stored(name, "conv"), *stored(name, "flat")] if arm.startswith("all") else [],
        "fly": fly,
        "both": [*stored("plain", "conv"), *stored("plain", "flat"), *fly],
    }[arm.partition(":")[0]]
    which = among(shown, [clean, *attacked])
    assert (which >= 0).all()
    # Each of what may be shown is, and about half of the 80 images are attacked.
    assert set(which.tolist()) == set(range(1 + len(attacked)))
    assert arm == "clean" or 25 <= int((which > 0).sum()) <= 55
    if arm == "noise":
        for index, level in enumerate(LEVELS, start=1):
            noisy, plain = shown[which == index], clean[which == index].int()
            assert ((noisy == (plain + level).clamp(max=255)) | (noisy == (plain - level).clamp(min=0))).all()
    if arm == "both":
        assert 8 <= int((which > 4).sum()) <= 32


def test_all_arms_see_the_same_images_in_the_same_order(digits: Path) -> None:
    study = study_of(digits)
    orders = {
        tuple(
            label
            for epoch in (0, 1)
            for _, labels, _ in open_arm(study, arm).batches(epoch, torch.Generator())
            for label in labels.tolist()
        )
        for arm in ARMS
    }
    assert len(orders) == 1
    assert len(orders.pop()) == 2 * 80
