"""`fgsm init`: what it writes is read, and runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError
from pipeline.init import write_config
from tests.conftest import FACTORY, fgsm, generate, manifest, png_bytes, random_pixels, write_parquet
from tests.support.files import write_tar

IMAGES = [png_bytes(pixels) for pixels in random_pixels(6)]
NAMES = ("cat", "dog", "two\nlines: 1")


def put(folder: Path, images: list[bytes] = IMAGES) -> Path:
    for index, image in enumerate(images):
        path = folder / NAMES[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return folder


def split_folder(path: Path) -> None:
    put(path / "train")
    put(path / "val")


def parquet(path: Path) -> None:
    write_parquet(path, IMAGES, [index % 3 for index in range(6)])


def tar(path: Path) -> None:
    write_tar(path / "a.tar", [{"png": image, "cls": b"%d" % (index % 3)} for index, image in enumerate(IMAGES)])


def mixed(path: Path) -> None:
    put(path, [png_bytes(random_pixels(1, side=12 + index)[0]) for index in range(6)])


def gray(path: Path) -> None:
    put(path, [png_bytes(pixels) for pixels in random_pixels(6, channels=1)])


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("make", "flags", "splits"),
    [
        (put, ["--split", "test", "--layout", "signs"], {"test": 6}),
        (put, [], {"train": 6}),
        (split_folder, [], {"train": 6, "val": 6}),
        (split_folder, ["--split", "val"], {"val": 6}),
        (parquet, ["--epsilons", "4/255", "--set", "model.mean=[0.5]"], {"test": 6}),
        (tar, [], {"train": None}),
        (mixed, ["--set", "preprocess.crop=8"], {"train": 6}),
        (mixed, [], {"train": 6}),
        (gray, ["--set", "model.kwargs={channels: 1}"], {"train": 6}),
    ],
)
def test_what_is_written_runs(tmp_path: Path, make: Callable[[Path], Any], flags: list[str], splits: Any) -> None:
    make(tmp_path / "photos")
    result = fgsm("init", "--data", "photos", "--model", "victim.py:make", *flags)
    assert result.exit_code == 0, result.output
    assert "fgsm plan photos.yaml" in result.stderr
    config = load_config("photos.yaml")
    assert config.output.layout == ("signs" if "signs" in flags else "images")
    text = Path("photos.yaml").read_text()
    assert text.count("#") > 15
    generate(Path("photos.yaml"), "--set", "runtime.workers=0", "--set", "runtime.batch_size=6")
    made = manifest(tmp_path / "out/photos")
    assert made["complete"]
    assert made["split_rows"] == splits
    assert len(made["dataset_classes"]) == 3


def test_digits_need_nothing_else(tmp_path: Path) -> None:
    assert fgsm("init", "own.yaml", "--data", "digits", "--output", "out #1", "--set", "source.limit=6").exit_code == 0
    generate(Path("own.yaml"), "--set", "runtime.workers=0")
    assert manifest(tmp_path / "out #1")["rows"] == 12


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("mine")
    result = fgsm("init", "own.yaml", "--data", "digits")
    assert result.exit_code == 2
    assert "own.yaml" in result.stderr
    assert (tmp_path / "own.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--data"),
        (["--data", "empty"], "--data"),
        (["--data", "./gone"], "--data"),
        (["--data", "two"], "source.split"),
        (["--data", "photos"], "--model"),
        (["--data", "photos", "--model", "nosuchnet"], "--model"),
        (["--data", "photos", "--model", "gone.py:make"], "model.name"),
        (["--data", "photos", "--model", "victim.py:make", "--weights", "gone.pt"], "model.weights"),
        (["--data", "photos", "--model", "resnet18", "--weights", "GONE"], "model.weights"),
        (["--data", "photos", "--model", "victim.py:make", "--epsilons", "many"], "attack.epsilons"),
        (["--data", "photos", "--model", "victim.py:make", "--set", "model.nam=x"], "model.nam"),
        (["--data", "photos", "--split", "a:b", "--model", "victim.py:make"], "source.split"),
    ],
)
def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    (tmp_path / "empty/cat").mkdir(parents=True)
    put(tmp_path / "photos")
    for split in ("train", "test"):
        write_parquet(tmp_path / "two", IMAGES, [0] * 6, split)
    result = fgsm("init", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"Error: {named}")
    assert not list(tmp_path.glob("*.yaml"))


def test_paths_hold_from_a_config_in_another_folder(tmp_path: Path) -> None:
    put(tmp_path / "photos")
    (tmp_path / "configs").mkdir()
    assert fgsm("init", "configs/a.yaml", "--data", "photos", "--model", "victim.py:make").exit_code == 0
    config = load_config("configs/a.yaml")
    assert config.source.folder == tmp_path / "photos"
    assert config.all_models["make"].own_code == f"{tmp_path}/victim.py:make"


def test_a_person_is_asked_for_what_is_not_said_and_for_what_the_data_do_not_tell(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "two", IMAGES, [index % 3 for index in range(6)], split)
    answers = iter(["two", "train, test", "victim.py:make", "", "0.5", "0.25", "4/255, 8/255", "here", "wide"])
    asked: list[str] = []

    def ask(question: str, default: str | None) -> str:
        asked.append(question)
        return next(answers) or default or ""

    path, found = write_config(None, ask=ask)
    assert next(answers, None) is None
    assert "source.split" in asked[1]
    assert path.name == "two.yaml"
    assert "6" in found
    assert yaml.safe_load(path.read_text()) == {
        "source": {"kind": "huggingface", "path": "two", "split": ["train", "test"]},
        "model": {"kind": "factory", "name": "victim.py:make", "mean": [0.5], "std": [0.25]},
        "attack": {"epsilons": ["4/255", "8/255"]},
        "output": {"path": "here", "layout": "wide"},
    }


def test_published_weights_bring_their_sizes_and_a_checkpoint_has_the_classes_of_the_images(tmp_path: Path) -> None:
    mixed(tmp_path / "photos")
    (tmp_path / "own.safetensors").touch()
    _, found = write_config(Path("a.yaml"), data="photos", model="resnet18")
    assert "model.label_map" in found
    first = yaml.safe_load(Path("a.yaml").read_text())
    assert first["model"] == {"kind": "torchvision", "name": "resnet18", "weights": "IMAGENET1K_V1"}
    assert "preprocess" not in first
    write_config(Path("b.yaml"), data="photos", model="resnet18", keys={"model.weights": "own.safetensors"})
    second = yaml.safe_load(Path("b.yaml").read_text())
    assert second["model"]["kwargs"] == {"num_classes": 3}
    assert second["preprocess"] == {"resize": 224, "crop": 224}


def test_classes_that_have_the_names_of_the_model_s_are_mapped_to_them(tmp_path: Path) -> None:
    for name in ("goldfish", "Great_White_Shark"):
        (tmp_path / "fish" / name).mkdir(parents=True)
        (tmp_path / "fish" / name / "0.png").write_bytes(IMAGES[0])
    write_config(None, data="fish", model="resnet18")
    said = yaml.safe_load(Path("fish.yaml").read_text())["model"]["label_map"]
    assert said == {"Great_White_Shark": "great white shark", "goldfish": "goldfish"}


@pytest.mark.parametrize("assignment", ["source=3", "models.a={kind: digits}"])
def test_what_it_would_not_write_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match=f"^--set {assignment.partition('=')[0].partition('.')[0]}: "):
        write_config(None, data="digits", overrides=[assignment])
