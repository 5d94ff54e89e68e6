"""The downstream job: both trainings on one budget, and accuracies that are those of the images they name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from torch.utils.data import DataLoader
from typer.testing import CliRunner, Result

import pipeline
from pipeline.attacks.base import direction_sign
from pipeline.core.lattice import step
from pipeline.models.attacked import AttackedModel
from pipeline.models.digits_net import DigitsNet
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import require_manifest
from tests.conftest import FACTORY, REPOSITORY, generate_once

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import train_robust
from train_robust import CLEAN_ONLY, MIXED, Recipe

LEVELS = (16, 64)
RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=3e-3, workers=0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 digits to learn from and 90 to test on, at 16/255 and 64/255."""
    folder = tmp_path_factory.mktemp("digits")
    config = {
        "source": {"kind": "digits", "split": ["train", "test"], "limit": 90},
        "preprocess": {"mode": "L"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": [f"{level}/255" for level in LEVELS]},
        "output": {"path": str(folder / "out")},
        "runtime": {"device": "cpu", "workers": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    generate_once(folder / "config.yaml")
    return folder / "out"


def untrained(output: Path, seed: int = 0) -> Any:
    manifest = require_manifest(OutputFolder(output))
    return train_robust.new_model(
        next(iter(manifest.resolved.all_models.values())), manifest, seed, torch.device("cpu")
    )


def run(*arguments: str | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train_robust.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_new_model_is_the_victim_s_architecture_untrained(digits: Path) -> None:
    one, same, other = untrained(digits), untrained(digits), untrained(digits, seed=1)
    assert isinstance(one.module, DigitsNet)
    weights = [model.module.state_dict()["classify.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_both_trainings_take_the_same_steps_over_the_same_images_in_the_same_order(digits: Path) -> None:
    labels = []
    for clean in (1.0, 0.5):
        data = pipeline.training_dataset(digits, clean=clean, seed=3)
        labels.append([label for epoch in range(2) for label in _epoch(data, epoch)])
        model = untrained(digits)
        before = {name: value.clone() for name, value in model.module.state_dict().items()}
        assert train_robust.train(model, data, RECIPE, seed=0) == (10, 160)
        assert not all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
        assert not model.module.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert labels[0] == labels[1]


def _epoch(data: Any, epoch: int) -> list[int]:
    data.set_epoch(epoch)
    return [label for _, label in data]


def test_a_training_repeats_itself(digits: Path) -> None:
    weights = []
    for seed in (0, 0, 1):
        model = untrained(digits)
        train_robust.train(model, pipeline.training_dataset(digits), RECIPE, seed)
        weights.append(model.module.state_dict()["classify.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [16, 45, 46])
def test_the_schedule_knows_how_many_steps_there_are(digits: Path, workers: int, batch_size: int) -> None:
    recipe = Recipe(1, batch_size, 1e-3, workers)
    loader = DataLoader(pipeline.training_dataset(digits), batch_size, num_workers=workers, drop_last=True)
    assert train_robust.whole_batches(90, recipe) == sum(1 for _ in loader)


def test_a_shift_moves_and_keeps_the_size() -> None:
    images = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 32, 32] = 9
    places = set()
    for _ in range(50):
        moved = train_robust.shifted(images)
        assert moved.shape == images.shape
        ((down, right),) = (moved[0, 0] == 9).nonzero().tolist()
        assert abs(down - 32) <= 4
        assert abs(right - 32) <= 4
        places.add((down, right))
    assert len(places) > 10


def test_accuracies_are_those_of_the_images_they_name(digits: Path) -> None:
    model = untrained(digits)
    train_robust.train(model, pipeline.training_dataset(digits), RECIPE, seed=0)
    levels = (16, 40)  # 40/255 was not recorded
    measured = train_robust.evaluate(model, digits, "test", levels, workers=0)
    assert list(measured) == ["clean", "stored 16/255", "stored 40/255", "fresh 16/255", "fresh 40/255"]

    def accuracy(images: torch.Tensor) -> float:
        return float((model.predict(images).argmax(1) == labels).float().mean())

    rows = pipeline.load(digits, [0], "test").with_format("torch")
    images, labels = rows["image"][:], rows["label"][:]
    assert measured["clean"] == pytest.approx(accuracy(images))
    gradient = AttackedModel(model, images, targeted=False).gradient(images, labels)
    for level in levels:
        stored = pipeline.load(digits, [f"{level}/255"], "test").with_format("torch")["image"][:]
        assert measured[f"stored {level}/255"] == pytest.approx(accuracy(stored))
        assert measured[f"fresh {level}/255"] == pytest.approx(accuracy(step(images, direction_sign(gradient), level)))


def results(gains: list[float], stored: float = 2.0) -> list[train_robust.Result]:
    """A seed for each gain under fresh attacks; on stored ones it is so many times as much, and never a loss."""
    made = []
    for seed, gain in enumerate(gains):
        for training, more in ((CLEAN_ONLY, 0.0), (MIXED, gain)):
            accuracy = {"clean": 0.9, "stored 8/255": 0.5 + stored * abs(more), "fresh 8/255": 0.5 + more}
            made.append(train_robust.Result(training, seed, 10, 160, accuracy))
    return made


def test_the_table_has_means_spreads_and_paired_gains() -> None:
    rows = train_robust.compare(results([0.1, 0.3]))
    assert [row["images"] for row in rows] == ["clean", "stored 8/255", "fresh 8/255"]
    assert rows[2]["gain"] == {
        "mean": pytest.approx(0.2),
        "stdev": pytest.approx(0.02**0.5),
        "values": pytest.approx([0.1, 0.3]),
    }
    lines = train_robust.markdown(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "fresh 8/255",
        "50.0% ± 0.0%",
        "70.0% ± 14.1%",
        "+20.0% ± 14.1%",
    ]


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        ([0.2, 0.3], "Some of what was gained on stored attacks holds there."),
        ([-0.2, -0.3], "does not hold there: the model is easier to attack than before."),
        ([-0.2, 0.3], "does not hold there: the difference is within the spread."),
        ([0.2], "Some of what was gained on stored attacks holds there."),
    ],
)
def test_the_note_says_what_fresh_attacks_leave_of_a_gain(gains: list[float], sentence: str) -> None:
    made = results(gains)
    note = train_robust.closing_note(train_robust.compare(made), made)
    assert sentence in note
    assert "160 images in 10 steps" in note
    assert ("One seed" in note) == (len(gains) == 1)


def test_the_note_claims_no_gain_where_there_was_none() -> None:
    made = results([0.2, 0.3], stored=0.0)
    note = train_robust.closing_note(train_robust.compare(made), made)
    assert "On stored attacks nothing was gained that could hold there." in note


def test_the_script_prints_one_table_and_writes_it(digits: Path, tmp_path: Path) -> None:
    written, table = tmp_path / "table.json", tmp_path / "table.md"
    options = ["--epochs", 2, "--seeds", 2, "--test-epsilon", "64/255", "--json", written, "--markdown", table]
    result = run(digits, *map(str, options))
    assert result.exit_code == 0, result.output
    assert table.read_text() == result.stdout
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:5]] == [
        "clean",
        "stored 64/255",
        "fresh 64/255",
    ]
    report = json.loads(written.read_text())
    assert [(one["training"], one["seed"], one["images"]) for one in report["results"]] == [
        (training, seed, 128) for seed in range(2) for training in (CLEAN_ONLY, MIXED)
    ]
    assert report["table"][0]["images"] == "clean"
    # With one epsilon the average over all is that of the one.
    assert report["averaged_gains"] == {
        kind: row["gain"] for kind, row in zip(("clean", "stored", "fresh"), report["table"], strict=True)
    }


def test_another_architecture_may_be_trained(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY + "\n\ndef gray():\n    return Net(channels=1, classes=10)\n")
    result = run(digits, "--model", f"{tmp_path}/net.py:gray", "--epochs", "1", "--seeds", "1")
    assert result.exit_code == 0, result.output
    (tmp_path / "few.py").write_text(FACTORY + "\n\ndef few():\n    return Net(channels=1, classes=3)\n")
    result = run(digits, "--model", f"{tmp_path}/few.py:few")
    assert result.exit_code == 2
    assert result.stderr == "Error: --model: it tells 3 classes apart, and the dataset has 10.\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch-size", "91"], "--batch-size: 91 images are more than a worker gets of 90."),
        (["--clean", "2"], "clean: got 2.0; it is the share of clean images, from 0 to 1."),
        (["--clean", "nan"], "clean: got nan; it is the share of clean images, from 0 to 1."),
        (["--test-epsilon", "0"], "epsilons: 0 is the clean image, whose share is `clean`; leave it out."),
        (["--json", "OUTPUT"], "--json: OUTPUT cannot be written (Is a directory); name another file."),
        (
            ["--markdown", "OUTPUT/none/table.md"],
            "--markdown: OUTPUT/none/table.md cannot be written (No such file or directory); name another file.",
        ),
        (["--epsilon", "8"], "epsilons: 8 is above 1, and pixels run from 0 to 1; write 8/255."),
        (["--test-split", "validation"], "split: OUTPUT has no split 'validation'; it has train, test."),
    ],
)
def test_what_cannot_be_is_one_sentence(
    digits: Path, options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "AdamW")  # nothing is trained before
    result = run(digits, *(option.replace("OUTPUT", str(digits)) for option in options), "--epochs", "1")
    assert result.exit_code == 2
    assert result.stderr == f"Error: {sentence.replace('OUTPUT', str(digits))}\n"


def test_a_run_that_is_refused_leaves_files_as_they_were(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "old.md").write_text("kept")
    result = run(digits, "--clean", "2", "--json", tmp_path / "new.json", "--markdown", tmp_path / "old.md")
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["old.md"]
    assert (tmp_path / "old.md").read_text() == "kept"


def test_a_folder_that_is_no_output_is_one_sentence(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"Error: {tmp_path} holds no dataset of ours: there is no manifest.json.\n"
