"""What each arm of a training shows, and errors that are those of the images they name."""

import copy
import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
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
from pipeline.core.errors import ConfigError
from pipeline.core.lattice import step
from pipeline.models.attacked import AttackedModel
from pipeline.models.base import Model
from pipeline.output.folder import OutputFolder
from pipeline.reporting.defence import ITSELF, TOO_FEW_STEPS, Arm, Defence, Outcome, Training, exposes
from tests.conftest import REPOSITORY, generate

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import defence_table
import held_out
import train_robust
from arms import CLEAN_ONLY, Reader, Recipe
from training import shifted

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
# Images, whose gradient made them, and the epsilon in grey levels.
Tested = tuple[str, str | None, int]
NETS = """
from torch import nn

def conv():
    features = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*features, nn.Dropout(), nn.Linear(8 * 36, 10))

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(80, 10))

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


def make(
    folder: Path, attacks: dict[str, Any], resize: int | list[int] = 8, models: Sequence[str] = ("conv", "flat")
) -> Path:
    """A dataset of 80 digits to learn from and 80 to test on, of 8 pixels a side, attacked through two models."""
    (folder / "nets.py").write_text(NETS)
    epsilons = {"epsilons": [f"{level}/255" for level in LEVELS]}
    config = {
        "source": {"kind": "digits", "split": ["train", "test"], "limit": 80},
        "preprocess": {"mode": "L", "resize": resize},
        "models": {name: {"kind": "factory", "name": f"{folder}/nets.py:{name}"} for name in models},
        "attacks": {name: copy.deepcopy(epsilons | section) for name, section in attacks.items()},
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
    return train_robust.make_study(output, recipe, None, (), ())


def test_every_arm_is_trained_and_tested_with_every_seed(whole: tuple[Path, Result]) -> None:
    output, result = whole
    defence = read(output)
    assert [(one.seed, one.arm) for one in defence.trainings] == [(seed, arm) for seed in (0, 1) for arm in ARMS]
    assert (defence.target, defence.sources, defence.held_out) == ("conv", ("conv", "flat"), ("elu", "normed"))
    wanted: list[Tested] = [("clean", None, 0)]
    for level in LEVELS:
        wanted.append(("noise", None, level))
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

    rows = pipeline.load(output, [0], "test").with_format("torch")
    clean, labels = rows["image"][:60], rows["label"][:60]
    sources = {name: study.source(name) for name in ("conv", "flat")}
    errors: dict[Tested, list[float]] = {}
    sure: list[float] = []
    for seed in (0, 1):
        model = trained(study, ITSELF, "all:plain", seed)
        models = {ITSELF: model, **sources, **{name: trained(study, name, "clean", seed) for name in study.held_out}}
        images: dict[Tested, Tensor] = {("clean", None, 0): clean}
        for level in LEVELS:
            images["noise", None, level] = stored(output, "test", level, attacks="signs")[:60]
            for name, attacked in models.items():
                images["fgsm", name, level] = fgsm(attacked, clean, labels, level)
                if name in sources:  # what the dataset has of it is the same
                    own = stored(output, "test", level, attacks="plain", models=name)[:60]
                    assert torch.equal(images["fgsm", name, level], own)
                images["pgd", name, level] = pgd(attacked, clean, labels, level)
        (training,) = [one for one in defence.trainings if (one.arm, one.seed) == ("all:plain", seed)]
        for test in training.tests:
            confidences, answers = model.predict(images[test.images, test.against, test.level]).softmax(1).max(1)
            wrong = answers != labels
            assert test.wrong == int(wrong.sum())
            assert test.wrong_confidence == (pytest.approx(float(confidences[wrong].mean())) if wrong.any() else None)
            errors.setdefault((test.images, test.against, test.level), []).append(float(wrong.float().mean()))
            if (test.images, test.level) == ("fgsm", 48) and test.against in study.held_out:
                sure.append(float(confidences[wrong].mean()))
        unseen = [errors["fgsm", name, level][seed] for name in study.held_out for level in LEVELS]
        assert training.history[-1] == pytest.approx(sum(unseen) / 4)

    def shown(images: str, level: int, *against: str | None) -> str:
        first, second = (sum(errors[images, name, level][seed] for name in against) / len(against) for seed in (0, 1))
        return f"{50 * (first + second):.1f} ± {100 * abs(first - second) / 2**0.5:.1f}"

    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in result.stdout.splitlines()]
    first, second, third = [line[1:] for line in lines if line[0] == "stored, all sources: FGSM"]
    assert first[:-1] == [
        shown("clean", 0, None),
        *(shown("fgsm", level, "elu", "normed") for level in LEVELS),
        shown("pgd", 48, "elu", "normed"),
        shown("fgsm", 48, ITSELF),
    ]
    assert second[:-1] == [shown("fgsm", level, name) for name in study.held_out for level in LEVELS]
    by_seed = [sum(sure[:2]) / 2, sum(sure[2:]) / 2]
    assert second[-1] == f"{50 * sum(by_seed):.1f} ± {100 * abs(by_seed[0] - by_seed[1]) / 2**0.5:.1f}"
    rates = [one.images / one.seconds for one in defence.trainings if one.arm == "all:plain"]
    assert first[-1] == f"{sum(rates) / 2:,.0f} ± {abs(rates[0] - rates[1]) / 2**0.5:,.0f}"
    assert third == [
        shown(images, level, *against)
        for images, against in (("fgsm", [ITSELF]), ("pgd", [ITSELF]), ("fgsm", [*sources]), ("noise", [None]))
        for level in LEVELS
    ]
    for name in study.held_out:
        known = defence.held_out_errors[name]
        assert [*known] == [0, 1]
        assert f"{name}, clean error {50 * sum(known.values()):.1f} ± " in result.stdout
        for seed, error in known.items():
            wrong = trained(study, name, "clean", seed).predict(clean).argmax(1) != labels
            assert error == pytest.approx(float(wrong.float().mean()))


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
    clean, labels, _ = map(torch.cat, zip(*open_arm(study, "clean").batches(0, torch.Generator()), strict=True))
    model = study.new_model(ITSELF, 0)
    watched = Watched(model, clean, labels)
    train_robust.train(model, open_arm(study, arm), 0, lambda _: 0.0)
    return clean, torch.cat(watched.images), {level: torch.cat(made) for level, made in watched.fgsm.items()}


def open_arm(study: train_robust.Study, arm: str) -> Reader:
    (found,) = [one for one in study.contents.arms if one.id == arm]
    return study.open(found, 0)


def stored(output: Path, split: str, level: int, **chosen: Any) -> Tensor:
    """The images of a split at a level, in the order of the rows."""
    data = pipeline.training_dataset(
        output, split, epsilons=[f"{level or 1}/255"], clean=float(level == 0), shuffle=False, **chosen
    )
    return torch.stack([image for image, _ in data])


def rows_of(output: Path, clean: Tensor) -> Tensor:
    """Which row of the train split each clean image is."""
    same = (clean[:, None] == stored(output, "train", 0)[None]).flatten(2).all(2)
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

    def made(attack: str, model: str | None) -> list[Tensor]:
        return [stored(digits, "train", level, attacks=attack, models=model)[rows] for level in LEVELS]

    name = arm.partition(":")[2]
    fly = [own[level] for level in LEVELS]
    choices: dict[str, Callable[[], list[Tensor]]] = {
        "clean": lambda: [],
        "noise": lambda: made("signs", None),
        "one": lambda: made("plain", name),
        "all": lambda: [*made(name, "conv"), *made(name, "flat")],
        "fly": lambda: fly,
        "both": lambda: [*made("plain", "conv"), *made("plain", "flat"), *fly],
    }
    attacked = choices[arm.partition(":")[0]]()
    which = among(shown, [clean, *attacked])
    assert (which >= 0).all()
    # What may be shown is, of which there is much in one arm for 20 images; and about half of all are attacked.
    assert len(set(which.tolist())) >= 1 + len(attacked) - (arm == "both")
    assert arm == "clean" or 25 <= int((which > 0).sum()) <= 55
    if arm == "noise":
        for index, level in enumerate(LEVELS, start=1):
            noisy, plain = shown[which == index], clean[which == index].int()
            assert ((noisy == (plain + level).clamp(max=255)) | (noisy == (plain - level).clamp(min=0))).all()
    assert arm != "both" or 8 <= int((which > 4).sum()) <= 32


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


def test_a_held_out_model_is_trained_on_clean_images_and_never_with_an_arm(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = []

    def watched(model: Any, reader: Reader, *arguments: Any) -> Any:
        trainings.append((type(model.module[-1]).__name__, model.module[0].out_channels, reader.arm.id))
        return real(model, reader, *arguments)

    real = train_robust.train
    monkeypatch.setattr(train_robust, "train", watched)
    result = run(output, *OPTIONS, "--seeds", 2, "--arms", "noise", "--arms", "all:plain", "--no-report")
    assert result.exit_code == 0, result.output
    # By the width of the first layer: elu, normed, and the target with 8.
    once = [("Linear", 24, "clean"), ("Linear", 16, "clean"), ("Linear", 8, "noise"), ("Linear", 8, "all:plain")]
    assert trainings == 2 * once


def without_times(output: Path) -> Any:
    content = json.loads((output / "defence.json").read_text())
    for timed in (content, *content["trainings"]):
        assert timed.pop("seconds") > 0
    return content


def test_a_run_that_was_killed_goes_on_where_it_was(
    whole: tuple[Path, Result], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def killed(study: train_robust.Study, arm: Arm, *arguments: Any) -> Training:
        started.append(arm.id)
        if len(started) == 4:
            raise KeyboardInterrupt
        return real(study, arm, *arguments)

    real = train_robust.train_arm
    monkeypatch.setattr(train_robust, "train_arm", killed)
    with pytest.raises(KeyboardInterrupt):
        train_robust.run(study_of(output), train_robust.begin(study_of(output), None, overwrite=False), 1)
    first = read(output)
    assert [one.arm for one in first.trainings] == list(ARMS[:3])
    (output / "defence.json").write_text(first.model_copy(update={"seconds": 1e6}).model_dump_json())
    # With another seed than at first, which only adds trainings.
    result = run(output, *OPTIONS, "--seeds", 2, "--no-report")
    assert result.exit_code == 0, result.output
    assert started[4:] == [*ARMS[3:], *ARMS]
    assert read(output).seconds > 1e6
    resumed, uninterrupted = without_times(output), without_times(whole[0])
    assert resumed.pop("command") and uninterrupted.pop("command")
    assert resumed == uninterrupted
    again = run(output, *OPTIONS, "--seeds", 1, "--arms", "fly", "--no-report")
    assert again.stdout == result.stdout
    assert len(started) == 4 + len(ARMS[3:]) + len(ARMS)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--epochs", "2"], "--epochs"),
        (["--clean", "0.25"], "--clean"),
        (["--test-rows", "50"], "--test-rows"),
        (["--held-out", f"{held_out.__file__}:elu"], "--held-out"),
        (["--model", "NETS:flat"], "--model"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    whole: tuple[Path, Result], digits: Path, options: list[str], key: str
) -> None:
    output, _ = whole
    before = (output / "defence.json").read_bytes()
    result = run(output, *OPTIONS, *(option.replace("NETS", f"{digits.parent}/nets.py") for option in options))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"Error: {key}: ")
    assert (output / "defence.json").read_bytes() == before


def test_results_of_another_run_are_replaced_only_if_that_is_asked_for(
    whole: tuple[Path, Result], output: Path
) -> None:
    content = (whole[0] / "defence.json").read_text()
    (output / "defence.json").write_text(content.replace(read(whole[0]).run_id, "0" * 16))
    options: list[str | int] = [*OPTIONS, "--seeds", 1, "--arms", "clean", "--no-report"]
    assert run(output, *options).exit_code == 2
    assert run(output, *options, "--overwrite").exit_code == 0
    assert [one.arm for one in read(output).trainings] == ["clean"]
    before = read(output).trainings
    assert run(output, *options, "--overwrite", "--arms", "noise").exit_code == 0
    after = read(output).trainings
    assert (after[:1], [one.arm for one in after]) == (before, ["clean", "noise"]), "the same settings go on"


def test_an_old_file_is_shown_and_not_added_to(whole: tuple[Path, Result], output: Path) -> None:
    content = json.loads((whole[0] / "defence.json").read_text())
    for recorded in ("receipts", "digests", "held_out_errors"):
        del content[recorded]
    (output / "defence.json").write_text(json.dumps(content))
    result = run(output, *OPTIONS, "--seeds", 2, "--no-report")
    assert result.exit_code == 2
    assert f"{output / 'defence.json'} does not record" in result.stderr
    former = Defence.model_validate(content)
    assert defence_table.tables(former).splitlines()[2:] == defence_table.tables(read(whole[0])).splitlines()[2:]


def test_results_of_other_images_or_models_are_not_mixed(whole: tuple[Path, Result], output: Path) -> None:
    content = json.loads((whole[0] / "defence.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "other images": {"receipts": "0" * 64},
        "--model": {"digests": {**content["digests"], ITSELF: "0"}},
        "--held-out: elu": {"digests": {**content["digests"], "elu": "0"}},
    }
    for key, change in changes.items():
        (output / "defence.json").write_text(json.dumps(content | change))
        result = run(output, *OPTIONS, "--seeds", 2, "--no-report")
        assert result.exit_code == 2
        assert key in result.stderr.splitlines()[-1]


def test_a_model_of_the_same_name_and_other_parameters_is_another(digits: Path) -> None:
    study = study_of(digits)
    assert study.digests() == study_of(digits).digests()
    elu = study.held_out["elu"]
    wider = elu.model_copy(update={"kwargs": {"channels": 1, "side": 8, "classes": 11}})
    changed = dataclasses.replace(study, held_out={**study.held_out, "elu": wider})
    different = {name for name, digest in changed.digests().items() if digest != study.digests()[name]}
    assert different == {"elu"}


def test_an_incomplete_dataset_has_other_images_and_a_warning(output: Path) -> None:
    whole = study_of(output)
    assert train_robust.left_out(whole) == []
    next((output / ".run/receipts").glob("test-*")).unlink()
    next((output / "clean").glob("test-*")).unlink()
    study = study_of(output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once, and not again for each reader
        study.open(CLEAN_ONLY, 0)
    assert study.manifest.receipts != whole.manifest.receipts
    (said,) = train_robust.left_out(study)
    assert str(output) in said


def test_one_process_at_a_time_writes_results(output: Path) -> None:
    with OutputFolder(output).store.held():
        result = run(output, *OPTIONS, "--seeds", 1)
    assert result.exit_code == 1
    assert f"{output} is in use" in result.stderr
    assert not (output / "defence.json").exists()


def test_ctrl_c_is_one_sentence_and_results_stay(output: Path) -> None:
    command = [sys.executable, REPOSITORY / "scripts/train_robust.py", output, *OPTIONS, "--seeds", "5"]
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = iter(process.stderr.readline, "")
        assert any("seed 0, clean only" in line for line in said)
        process.send_signal(signal.SIGINT)
        rest = "".join(said)
    assert process.returncode == 130
    assert "the same command again to resume" in rest
    assert "Traceback" not in rest
    assert read(output).trainings[0].arm == "clean"


def test_images_that_are_not_square_are_refused_before_factories_are_announced(tmp_path: Path) -> None:
    output = make(tmp_path, {"plain": {"kind": "fgsm"}}, [8, 10], ["wide"])
    result = run(output)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "Error: preprocess.crop: train_robust.py takes square images; these are 10x8; set preprocess.crop."
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch-size", "81"], "--batch-size: 81 images are more than a worker gets of 80."),
        (["--clean", "nan"], "clean: got nan; it is the share of clean images, from 0 to 1."),
        (["--json", "OUTPUT"], "--json: OUTPUT cannot be written (Is a directory); name another file."),
        (["--test-split", "validation"], "split: OUTPUT has no split 'validation'; it has train, test."),
        (["--model", "NETS:few"], "--model: it tells 3 classes apart, and the dataset has 10."),
        (["--arms", "one:none"], f"--arms: there is no arm 'one:none'; there are {', '.join(ARMS)}."),
        (["--held-out", "NETS:conv"], "--held-out: two models are called conv; rename the callable."),
    ],
)
def test_what_cannot_be_is_one_sentence(
    digits: Path, options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "AdamW")  # nothing is trained before
    places = {"OUTPUT": str(digits), "NETS": f"{digits.parent}/nets.py"}

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    result = run(digits, *map(placed, options))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {placed(sentence)}"
    assert not (digits / "defence.json").exists()


def test_a_folder_that_is_no_output_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "old.md").write_text("kept")
    result = run(tmp_path, "--json", tmp_path / "new.json", "--markdown", tmp_path / "old.md")
    assert result.exit_code == 2
    assert result.stderr == f"Error: {tmp_path} holds no dataset of fgsm-pipeline: there is no manifest.json.\n"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.md", "kept")]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [16, 40, 41])
def test_the_schedule_knows_how_many_steps_there_are(digits: Path, workers: int, batch_size: int) -> None:
    recipe = dataclasses.replace(RECIPE, batch_size=batch_size, workers=workers)
    reader = Reader.open(CLEAN_ONLY, study_of(digits).contents, recipe, digits, 0)
    assert reader.steps == sum(1 for _ in reader.batches(0, torch.Generator()))


@pytest.mark.parametrize(("side", "most"), [(8, 0), (16, 1), (64, 4)])
def test_a_shift_moves_and_keeps_the_size(side: int, most: int) -> None:
    images = torch.zeros(2, 1, side, side, dtype=torch.uint8)
    images[:, :, side // 2, side // 2] = 9
    draws, offsets = torch.Generator().manual_seed(0), set()
    for _ in range(500):
        moved = shifted(images, draws)
        assert moved.shape == images.shape
        ((down, right),) = (moved[0, 0] == 9).nonzero().tolist()
        offsets.add((down - side // 2, right - side // 2))
    assert offsets == set(itertools.product(range(-most, most + 1), repeat=2))


@pytest.mark.parametrize("make_net", [held_out.elu, held_out.normed, held_out.grouped, held_out.average])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_held_out_net_takes_any_side(make_net: Any, channels: int) -> None:
    for side in (*range(8, 17), 28, 32, 48, 64):
        net = make_net(channels, side, 7)
        assert net(torch.rand(2, channels, side, side)).shape == (2, 7)
        assert sum(one.numel() for one in net.parameters()) < 600_000


def test_fgsm_on_the_fly_leaves_batch_norm_as_it_is(digits: Path) -> None:
    study = study_of(digits)
    model, reader = study.new_model("normed", 0), open_arm(study, "fly")
    model.module.train()
    before = copy.deepcopy(model.module.state_dict())
    images, labels, now = next(reader.batches(0, torch.Generator().manual_seed(0)))
    moved = reader.attacked(model, images, labels, torch.Generator().manual_seed(0))
    assert model.module.training
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    model.module.eval()
    assert set(among(moved, [fgsm(model, images, labels, level) for level in LEVELS]).tolist()) == {0, 1}
    assert 0 < int(now.sum()) < len(now)


def test_without_noise_in_the_dataset_the_control_is_made(tmp_path: Path) -> None:
    others = {"epsilons": ["8/255"]}
    output = make(
        tmp_path,
        {
            "bim": {"kind": "bim", "models": ["flat"]},
            "far": {"kind": "bim", "steps": 2},
            "other": {"kind": "fgsm", "label": "prediction", **others},
        },
    )
    study = study_of(output)
    assert [(arm.id, arm.title) for arm in study.arms if arm.kind in ("one", "all")] == [
        ("all:bim", "stored, one source: BIM (bim)"),
        ("all:far", "stored, one source: BIM (far)"),
    ]
    assert study.contents.sources == ("flat", "conv")
    clean, shown, own = epoch_of(output, "noise")
    steps = (shown.int() - clean.int()).abs().amax((1, 2, 3))
    assert set(steps.tolist()) == {0, *LEVELS}
    assert 25 <= int((steps > 0).sum()) <= 55
    assert (among(shown, [own[level] for level in LEVELS]) < 0).all()
    result = run(output, *OPTIONS, "--epochs", 20, "--seeds", 1, "--no-report")
    assert result.exit_code == 0, result.output
    assert "training on stored images of one source leaves" in result.stdout
    assert len(re.findall("Attack other is left out", result.stderr)) == 1
    assert {(one.against, one.level) for one in read(output).trainings[0].tests if one.images == "stored"} == {
        ("flat", level) for level in LEVELS
    }
    with pytest.raises(ConfigError, match="attacks: none"):
        study_of(make_noise(tmp_path / "noise"))


def make_noise(folder: Path) -> Path:
    folder.mkdir()
    return make(folder, {"signs": {"kind": "noise"}})


def defence(
    errors: dict[str, list[tuple[int, int, int]]], histories: dict[str, tuple[float, ...]], **more: Any
) -> Defence:
    """Arms by their ids, and of each seed how many of 100 are wrong: clean, under held-out FGSM, under its own."""
    trainings, arms = [], []
    for arm, by_seed in errors.items():
        title = "stored, all sources: FGSM" if arm.startswith("all") else arm
        arms.append(Arm(id=arm, title=title, kind=arm.partition(":")[0]))
        for seed, (clean, unseen, own) in enumerate(by_seed):
            wrong = {
                ("clean", None, 0): clean,
                ("fgsm", "elu", 8): unseen,
                ("pgd", "elu", 8): unseen,
                ("fgsm", ITSELF, 8): own,
            }
            tests = [
                Outcome(images=images, against=against, level=level, rows=100, wrong=count, wrong_confidence=None)
                for (images, against, level), count in wrong.items()
            ]
            seconds = (2.5 if seed else 2) if arm == "fly" else 1
            trainings.append(
                Training(
                    arm=arm, seed=seed, images=100, seconds=seconds, history=histories.get(arm, (1.0,)), tests=tests
                )
            )
    return Defence(
        run_id="0" * 16,
        command="",
        machine="",
        versions={},
        seconds=1,
        recipe={"epochs": 3},
        target="conv",
        sources=("conv", "flat"),
        held_out=("elu",),
        levels=(8,),
        arms=arms,
        trainings=trainings,
        **more,
    )


def test_findings_are_told_from_what_is_within_the_spread() -> None:
    made = defence(
        {
            "clean": [(2, 60, 90), (4, 70, 90)],
            "noise": [(2, 30, 90), (4, 20, 90)],
            "one:conv": [(3, 40, 90), (3, 40, 90)],
            "one:flat": [(3, 30, 90), (3, 34, 90)],
            "all:plain": [(3, 20, 99), (5, 24, 97)],
            "fly": [(5, 30, 10), (5, 30, 10)],
        },
        {"all:plain": (0.5, 0.3049, 0.25), "fly": (0.6, 0.306, 0.3)},
    )
    said = defence_table.findings(made)
    assert len(said) == 6
    assert said[3] == exposes(made)
    assert said[3].startswith("Stored images do not protect")
    assert "leaves 22.0 ± 2.8% wrong, 43.0 ± 4.2 points below clean training (65.0 ± 7.1%)." in said[0]
    assert "22.0 ± 2.8% wrong, 3.0 ± 9.9 points below the control (25.0 ± 7.1%), a difference that does not" in said[1]
    assert "10.0 ± 0.0 points below the best single source, flat (32.0 ± 2.8%)." in said[2]
    assert "4.0 ± 1.4% wrong, 1.0 ± 0.0 points above clean training (3.0 ± 1.4%)." in said[4]
    # Of 100 images in 2 and in 2.5 seconds.
    assert "100 ± 0 stored images/s, and 45 ± 7 " in said[5]
    assert "2.25 ± 0.35 times as many" in said[5]
    assert "ends at 30.0%" in said[5]
    assert re.search(r"after epoch 3\b.*after epoch 2\b", said[5])


def test_a_held_out_model_that_has_learnt_little_is_warned_of() -> None:
    clean = {"clean": [(1, 60, 90), (1, 70, 90)], "all:plain": [(3, 20, 99)] * 2}
    for errors, warned in (([0.05, 0.05], False), ([0.05, 0.08], True)):
        made = defence(clean, {}, held_out_errors={"elu": dict(enumerate(errors))})
        assert any("elu" in said and "--held-out" in said for said in defence_table.weak_models(made)) is warned
    # Above 5% and yet no more than twice what clean images alone leave wrong.
    made = defence({"clean": [(6, 60, 90)] * 2}, {}, held_out_errors={"elu": {0: 0.11, 1: 0.12}})
    assert defence_table.weak_models(made) == []
    assert defence_table.weak_models(defence(clean, {})) == []


def measured_tables(name: str) -> list[str]:
    """The tables that follow from results that were measured: the main one, and that of each held-out model apart."""
    results = REPOSITORY / f"scripts/benchmarks/train-robust-{name}.json"
    made = defence_table.tables(Defence.model_validate_json(results.read_text()))
    return [part for part in made.split("\n\n") if part.startswith("|")][:2]


def test_the_docs_have_the_tables_of_the_benchmarks() -> None:
    page = (REPOSITORY / "docs/training.md").read_text()
    digits, cifar, longer = map(measured_tables, ("digits", "cifar10", "cifar10-20-epochs"))
    # Images/s count on an idle machine alone.
    for tables in (cifar, longer):
        tables[0] = "\n".join(line[: line.rindex("|", 0, -1) + 1] for line in tables[0].splitlines())
    assert [table for table in (*digits, *cifar, longer[0]) if table not in page] == []


def test_the_readme_has_cells_of_the_benchmark() -> None:
    main, _ = measured_tables("digits")

    def cells(text: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]

    head, _, *lines = cells(main)
    found = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    readme = {line[0]: line[1:] for line in cells((REPOSITORY / "README.md").read_text())}
    for name, arm in {
        "clean images only": "clean only",
        "and random signs, the control": "noise (control)",
        "and stored images of all three sources": "stored, all sources: FGSM",
        "and its own FGSM, made in each step": "own FGSM on the fly",
    }.items():
        assert readme[name] == [found[arm][column] for column in ("clean", "FGSM 16", "FGSM 32", "own FGSM 16")]


def test_of_models_that_have_learnt_little_one_sentence_is_said() -> None:
    made = defence({"clean": [(46, 60, 90)], "all:plain": [(46, 20, 99)], "fly": [(46, 20, 99)]}, {})
    assert defence_table.findings(made) == [TOO_FEW_STEPS]


def test_findings_of_one_seed_claim_no_spread_and_need_no_other_arm() -> None:
    (said,) = defence_table.findings(defence({"noise": [(2, 30, 90)], "all:plain": [(3, 20, 99)]}, {}))
    assert "20.0% wrong, 10.0 points below the control (30.0%), of one seed, which allows no verdict." in said
    assert defence_table.findings(defence({"clean": [(2, 30, 90)]}, {})) == []


def test_an_error_that_is_never_reached_is_said_to_be() -> None:
    made = defence({"all:plain": [(3, 20, 99)], "fly": [(3, 20, 99)]}, {"all:plain": (0.5, 0.4), "fly": (0.6, 0.3)})
    assert "in none of 3 epochs" in defence_table.findings(made)[-1]
