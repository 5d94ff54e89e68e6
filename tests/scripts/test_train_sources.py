"""The script that trains the models of a config which have no weights yet."""

import errno
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

from pipeline.config.load import load_config
from pipeline.models.load import load_model
from tests.conftest import REPOSITORY, generate, png_bytes, random_pixels, rows, write_parquet

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import train_sources
import training

Write = Callable[..., Path]


def run(*arguments: str | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train_sources.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def write(tmp_path: Path, factory_file: Path) -> Write:
    """Write a config of two models for 300 digits of 8 px; keyword arguments replace its sections."""

    def model(**settings: Any) -> dict[str, Any]:
        made = {"kind": "factory", "name": f"{factory_file}:make", "kwargs": {"channels": 1, "classes": 10}}
        return {**made, **settings}

    def written(**sections: Any) -> Path:
        backwards = {str(digit): 9 - digit for digit in range(10)}
        config = {
            "source": {"kind": "digits", "split": ["train", "test"], "limit": 300},
            "preprocess": {"mode": "L", "resize": 8},
            "models": {
                "one": model(weights="weights/one.safetensors", mean=[0.3], std=[0.4]),
                # Its classes are in another order than those of the dataset.
                "two": model(weights="weights/two.safetensors", label_map=backwards),
            },
            "attack": {"epsilons": ["8/255"]},
            "output": {"path": str(tmp_path / "out")},
            "runtime": {"device": "cpu", "workers": 0},
            **sections,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return written


def accuracies(output: str) -> dict[tuple[str, str], float]:
    """What is printed: the accuracy of each model on each split."""
    return {
        (line.partition(":")[0], split): float(right)
        for line in output.splitlines()
        for split, right in re.findall(r"(train|test) ([01]\.\d{4})", line)
    }


def test_a_run_loads_the_weights_and_finds_the_accuracies_that_were_printed(write: Write, tmp_path: Path) -> None:
    config = write()
    result = run(config, "--epochs", "20")
    assert result.exit_code == 0, result.output
    generate(config)
    found = {
        (name, split): rows(tmp_path / "out", "clean", split)[f"correct_{name}"].mean()
        for name in ("one", "two")
        for split in ("train", "test")
    }
    assert accuracies(result.output) == pytest.approx(found, abs=1e-4)
    assert min(found.values()) > 0.5  # by chance it would be a tenth


def test_what_has_weights_is_left_alone(write: Write, tmp_path: Path) -> None:
    config, folder = write(), tmp_path / "weights"
    assert run(config, "--epochs", "1").exit_code == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {"one.safetensors", "two.safetensors"}
    assert first["one.safetensors"] != first["two.safetensors"]
    (folder / "two.safetensors").unlink()
    before = (folder / "one.safetensors").stat()
    result = run(config, "--epochs", "1")
    assert [*accuracies(result.output)] == [("two", "train"), ("two", "test")]
    # Its seed is its place in the config, whatever else is trained.
    assert (folder / "two.safetensors").read_bytes() == first["two.safetensors"]
    assert (folder / "one.safetensors").stat() == before
    result = run(config)
    assert result.exit_code == 0
    assert result.output.startswith("Nothing to train")


@pytest.mark.parametrize("name", ["a file/one.safetensors", f"{'a' * 240}.safetensors"])  # the name is too long
def test_weights_that_cannot_be_written_are_found_out_before_the_training(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(torch.optim, "AdamW")  # nothing is trained before
    (tmp_path / "a file").touch()
    result = run(write(), "--set", f"models.one.weights={tmp_path / name}")
    assert result.exit_code == 2
    assert "models.one.weights" in result.output


def test_weights_that_are_cut_short_are_none(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_sources, "save_file", cut_short)
    result = run(write(), "--epochs", "1")
    assert result.exit_code == 2
    assert "models.one.weights" in result.output
    assert list((tmp_path / "weights").iterdir()) == []


def test_weights_do_not_depend_on_the_test_split(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "weights/one.safetensors"
    weights = []
    for split in (["train", "test"], ["train"]):
        assert run(write(source={"kind": "digits", "split": split, "limit": 300}), "--epochs", "1").exit_code == 0
        weights.append(path.read_bytes())
        path.unlink()
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("split", "labels"), [("train", None), ("train", [0, 1, 2, None]), ("test", [0, 1, 2, 0])])
def test_without_labels_or_a_train_split_nothing_is_trained(
    write: Write, tmp_path: Path, factory_file: Path, split: str, labels: list[int | None] | None
) -> None:
    source = write_parquet(tmp_path / "source", [png_bytes(image) for image in random_pixels(4)], labels, split)
    model = {"kind": "factory", "name": f"{factory_file}:make", "weights": "weights/one.safetensors"}
    config = write(
        source={"kind": "huggingface", "path": str(source)},
        preprocess={},
        models={"one": model},
        attack={"epsilons": ["8/255"], "label": "prediction"},
    )
    result = run(config)
    assert result.exit_code == 2
    assert "Error: source" in result.output
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    ("name", "models"), [("cifar10", ["resnet20"]), ("cifar10-ensemble", ["cnn", "strided", "residual"])]
)
def test_the_models_of_a_shipped_config_take_its_images_and_have_no_weights_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, models: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # their code is found from anywhere
    config = load_config(name)
    assert train_sources.without_weights(config) == models
    for model in config.all_models.values():
        untrained = load_model(model.model_copy(update={"weights": None}), seed=0, device=torch.device("cpu"))
        assert untrained.count_classes((3, 32, 32)) == 10


def test_images_are_shifted_and_mirrored() -> None:
    images = torch.arange(4 * 32 * 32).remainder(255).add(1).to(torch.uint8).view(4, 1, 32, 32)
    moved = [training.shifted(images) for _ in range(200)]
    # Two pixels of 32 at most, each way; what leaves is lost, and zeros come in.
    corners = {tuple((batch[0, 0] == 0).all(dim).sum().item() for dim in (0, 1)) for batch in moved}
    assert corners == {(down, right) for down in range(3) for right in range(3)}
    assert torch.equal(training.shifted(images[..., :8, :8]), images[..., :8, :8])
    mirrored = training.flipped(images.repeat(50, 1, 1, 1)).view(50, 4, 1, 32, 32)
    kinds = [
        torch.equal(image, own) + 2 * torch.equal(image, own.flip(-1))
        for row in mirrored
        for image, own in zip(row, images, strict=True)
    ]
    assert set(kinds) == {1, 2}
