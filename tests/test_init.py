"""`fgsm init`: what it writes is read, and runs."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import datasets
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

import pipeline
from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError, TemporaryError
from pipeline.core.own_code import import_own
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


# A model of images of 8 px alone.
SIZED = """
from torch import nn


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
"""


def save_weights(name: str, call: str = "victim.py:make", **kwargs: Any) -> dict[str, torch.Tensor]:
    """Save what a model begins with as a checkpoint."""
    weights: dict[str, torch.Tensor] = import_own(call, "model.name")(**kwargs).state_dict()
    torch.save(weights, name)
    return weights


class Person:
    """Answers questions in turn, those with an empty answer by their default, and remembers them."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked, self.defaults = [*answers], list[str](), list[str | None]()

    def __call__(self, question: str, default: str | None) -> str:
        self.asked.append(question)
        self.defaults.append(default)
        return self.answers.pop(0) or default or ""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim.py").write_text(FACTORY)
    (tmp_path / "sized.py").write_text(SIZED)
    monkeypatch.chdir(tmp_path)


def cut_off(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Let no weights of torchvision be there or be downloaded."""

    def fail(*_: Any) -> None:
        raise error or URLError("no network") from ConnectionRefusedError("no network")

    monkeypatch.setenv("TORCH_HOME", "torch-home")
    monkeypatch.setattr("torch.hub.urlopen", fail)


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
        (["--data", "photos", "--model", "victim.py:make", "--weights", "part.pt"], "model.weights"),
        (["--data", "photos", "--model", "victim.py:make", "--set", "model.kwargs={classes: 7}"], "model.label_map"),
        (["--data", "photos", "--model", "sized.py:make"], "model"),
        (["--data", "photos", "--model", "resnet18"], "model.label_map"),
        (["--data", "photos", "--model", "victim.py:make", "--set", "attack.epsilons=[2]"], "attack.epsilons"),
        (["--data", "photos", "--model", "victim.py:make", "--output", "photos/out"], "output.path"),
    ],
)
def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    (tmp_path / "empty/cat").mkdir(parents=True)
    put(tmp_path / "photos")
    for split in ("train", "test"):
        write_parquet(tmp_path / "two", IMAGES, [0] * 6, split)
    weights = save_weights("whole.pt")
    torch.save({name: value for name, value in weights.items() if name != "conv.bias"}, "part.pt")
    result = fgsm("init", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith(f"Error: {named}")
    assert not list(tmp_path.glob("*.yaml"))


def test_a_folder_that_the_config_cannot_go_to_is_found_before_anything_is_asked(tmp_path: Path) -> None:
    put(tmp_path / "photos")
    person = Person()
    with pytest.raises(ConfigError, match=r"^no/own.yaml "):
        write_config(Path("no/own.yaml"), data="photos", ask=person)
    assert person.asked == []


@pytest.mark.parametrize("model", ["victim.py", "whole.pt"])
def test_a_file_alone_is_no_model(tmp_path: Path, model: str) -> None:
    put(tmp_path / "photos")
    with pytest.raises(ConfigError, match=r"^--model: .*--weights"):
        write_config(None, data="photos", model=model)


def test_what_was_assumed_is_said_before_an_error_that_may_come_from_it(tmp_path: Path) -> None:
    gray(tmp_path / "photos")
    result = fgsm("init", "--data", "photos", "--model", "victim.py:make")  # which takes three channels
    assert result.exit_code == 2
    before, _, error = result.stderr.partition("Error: model: ")
    assert error
    assert "preprocess.mode" in before


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
    person = Person("two", "train, test", "victim.py:make", "", "0.5", "0.25", "4, 8/255, 0.1", "here", "wide")
    path, _ = write_config(None, ask=person)
    assert not person.answers
    assert "train, test" in person.asked[1]
    assert path.name == "two.yaml"
    assert yaml.safe_load(path.read_text()) == {
        "source": {"kind": "huggingface", "path": "two", "split": ["train", "test"]},
        "model": {"kind": "factory", "name": "victim.py:make", "mean": [0.5], "std": [0.25]},
        "attack": {"kind": "fgsm", "epsilons": ["4/255", "8/255", 0.1]},
        "output": {"path": "here", "layout": "wide"},
    }


# What a person has said, which is right, so that no question is left.
SAID = {
    "--data": "photos",
    "--model": "victim.py:make",
    "source.split": "test",
    "model.weights": "whole.pt",
    "model.mean": "0",
    "model.std": "1",
    "attack.epsilons": "4",
    "output.path": "out",
    "output.layout": "wide",
}


# That without what the model is.
OTHERS = {key: text for key, text in SAID.items() if key not in ("--data", "--model", "model.weights")}
# Images of one channel, and a model that takes them.
ONE_CHANNEL = {"--data": "gray", "model.weights": "one.pt", "model.kwargs": "channels: 1"}


@pytest.mark.parametrize(
    ("wrong", "named", "answers", "key", "value"),
    [
        ({"--data": "./gone"}, "--data", ["photos"], "source.path", "photos"),
        ({"--data": "hollow"}, "source.path", ["photos"], "source.path", "photos"),
        ({"--data": "junk.parquet"}, "source", ["photos"], "source.path", "photos"),
        ({"--data": "junk.tar"}, "source", ["photos"], "source.path", "photos"),
        ({"--data": "broken"}, "source", ["photos"], "source.path", "photos"),
        ({"--model": "nosuchnet"}, "--model", ["victim.py:make"], "model.name", "victim.py:make"),
        ({"--model": "victim.py:none"}, "model.name", ["victim.py:make", "", ""], "model.name", "victim.py:make"),
        ({"model.weights": "gone.pt"}, "model.weights", ["", "whole.pt", ""], "model.weights", "whole.pt"),
        ({"model.weights": "part.pt"}, "model.weights", ["", "whole.pt", ""], "model.weights", "whole.pt"),
        (
            {"model.weights": "seven.pt", "model.kwargs": "classes: 7"},
            "model.label_map",
            ["", "whole.pt", "classes=3", ""],
            "model.kwargs",
            {"classes": 3},
        ),
        (
            {"model.weights": "seven.pt", "model.kwargs": "classes: 7"},
            "model.label_map",
            ["", "", "", "identity"],
            "model.label_map",
            "identity",
        ),
        ({"model.kwargs": "colours=3"}, "model", ["", "", "none", "", ""], "model.kwargs", None),
        ({"--model": "sized.py:make", "model.weights": ""}, "model", ["", "", "", "", "8"], "preprocess.crop", 8),
        ({"--data": "gray"}, "model", ["", "", "", "RGB", ""], "preprocess.mode", "RGB"),
        # The mode that the model takes is the default then.
        ({"--data": "gray"}, "model", ["", "", "", "", ""], "preprocess.mode", "RGB"),
        ({"--data": "gray"}, "preprocess.mode", ["", "", "", "8", "", "RGB"], "preprocess.mode", "RGB"),
        (
            {"model.kwargs": "colours=3"},
            "model.kwargs",
            ["", "", "{a", "", "", "classes=3", "", ""],
            "model.kwargs",
            {"classes": 3},
        ),
        ({**ONE_CHANNEL, "model.mean": "0.5, 0.5, 0.5"}, "model.mean", ["0.5"], "model.mean", [0.5]),
        ({**ONE_CHANNEL, "model.std": "0.5, 0.5, 0.5"}, "model.std", ["0.5"], "model.std", [0.5]),
        ({"model.mean": "7"}, "model.mean", ["0.5"], "model.mean", [0.5]),
        ({"attack.epsilons": "many"}, "attack.epsilons", ["2, 4"], "attack.epsilons", ["2/255", "4/255"]),
        ({"attack.epsilons": "300"}, "attack.epsilons", ["255"], "attack.epsilons", ["255/255"]),
        ({"output.layout": "rows"}, "output.layout", [""], "output.layout", "images"),
        ({"output.path": "photos/out"}, "output.path", ["out"], "output.path", "out"),
        ({"output.path": "victim.py"}, "output.path", ["out"], "output.path", "out"),
    ],
)
def test_what_cannot_be_used_is_said_and_asked_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wrong: dict[str, str],
    named: str,
    answers: Sequence[str],
    key: str,
    value: Any,
) -> None:
    put(tmp_path / "photos")
    gray(tmp_path / "gray")
    (put(tmp_path / "hollow") / "no images").mkdir()
    weights = save_weights("whole.pt")
    torch.save({name: value for name, value in weights.items() if name != "conv.bias"}, "part.pt")
    save_weights("seven.pt", classes=7)
    save_weights("one.pt", channels=1)
    put(tmp_path / "broken", [b"no image"] * 6)
    for name in ("junk.parquet", "junk.tar"):
        (tmp_path / name).write_bytes(b"junk" * 1000)
    said, person = {name: text for name, text in {**SAID, **wrong}.items() if text}, Person(*answers)
    data, model = said.pop("--data"), said.pop("--model")
    if "model.weights" in wrong and not wrong["model.weights"]:
        person.answers.insert(0, "none")
    path, _ = write_config(Path("own.yaml"), data=data, model=model, keys=said, ask=person)
    assert not person.answers
    assert [message for message in caplog.messages if message.startswith(named) and "\n" not in message]
    section, _, name = key.partition(".")
    assert yaml.safe_load(path.read_text())[section].get(name) == value


@pytest.mark.parametrize(
    ("wrong", "answers", "asked", "default"),
    [
        ({"--data": "hollow"}, ["photos"], "Where are the images", None),
        ({"--data": "broken"}, ["photos"], "Where are the images", None),
        ({"--model": "victim.py:none"}, ["victim.py:make", "", ""], "Which model", None),
        ({"--data": "mixed"}, ["none", "", "8"], "side in pixels", "224"),
    ],
)
def test_what_was_refused_is_no_default(
    tmp_path: Path, wrong: dict[str, str], answers: Sequence[str], asked: str, default: str | None
) -> None:
    put(tmp_path / "photos")
    mixed(tmp_path / "mixed")
    (put(tmp_path / "hollow") / "no images").mkdir()
    put(tmp_path / "broken", [b"no image"] * 6)
    save_weights("whole.pt")
    said, person = {**SAID, **wrong}, Person(*answers)
    data, model = said.pop("--data"), said.pop("--model")
    write_config(Path("own.yaml"), data=data, model=model, keys=said, ask=person)
    defaults = [offered for question, offered in zip(person.asked, person.defaults, strict=True) if asked in question]
    assert defaults[-1] == default
    assert not set(defaults) & {*wrong.values(), *answers}


def test_a_library_that_is_not_there_makes_the_model_the_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "photos")
    monkeypatch.setitem(sys.modules, "transformers", None)
    person = Person("victim.py:make", "none")
    write_config(None, data="photos", model="some/net", keys=OTHERS, ask=person)
    assert "Which model" in person.asked[0]
    assert person.defaults[0] is None


def test_where_the_network_failed_the_data_are_asked_for_again_and_the_answer_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "photos")

    def fail(*_: Any, **__: Any) -> None:
        raise TemporaryError("source.path: pqx/y cannot be opened: no network")

    monkeypatch.setattr("pipeline.sources.huggingface.open_huggingface", fail)
    person = Person("photos", "none")
    path, _ = write_config(None, data="pqx/y", model="victim.py:make", keys=OTHERS, ask=person)
    assert person.defaults[0] == "pqx/y"
    assert yaml.safe_load(path.read_text())["source"]["path"] == "photos"
    with pytest.raises(TemporaryError):
        write_config(None, data="pqx/y", model="victim.py:make", keys=OTHERS)


def test_images_of_which_none_can_be_opened_are_refused_before_anything_else_is_asked(tmp_path: Path) -> None:
    put(tmp_path / "photos", [b"no image"] * 6)
    with pytest.raises(ConfigError, match=r"^source: .*\.png"):
        write_config(None, data="photos")


def test_tables_of_which_no_image_can_be_opened_are_not_copied(tmp_path: Path) -> None:
    write_parquet(tmp_path / "tables", [b"no image"] * 6, [index % 3 for index in range(6)])
    with pytest.raises(ConfigError, match=r"^source: "):
        write_config(None, data="tables")
    assert not [*Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")]


def test_what_is_no_value_is_named_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^model\.kwargs: "):
        write_config(None, data="digits", keys={"model.kwargs": "{a"})


@pytest.mark.parametrize("split", ["[a", "a:b"])
def test_a_name_for_a_split_that_cannot_be_is_asked_for_again(tmp_path: Path, split: str) -> None:
    put(tmp_path / "photos")
    keys = {key: text for key, text in OTHERS.items() if key != "source.split"}
    person = Person(split, *(["photos"] if split == "[a" else []), "fine", "none")
    path, _ = write_config(None, data="photos", model="victim.py:make", keys=keys, ask=person)
    assert not person.answers
    assert yaml.safe_load(path.read_text())["source"]["split"] == ["fine"]


def test_classes_are_asked_for_where_a_tar_has_labels_of_text(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", [{"png": image, "cls": NAMES[index % 2].encode()} for index, image in enumerate(IMAGES)]
    )
    keys = {key: text for key, text in OTHERS.items() if key != "source.split"}
    person = Person("test", "cat, dog, eel", "none")
    path, _ = write_config(None, data="a.tar", model="victim.py:make", keys=keys, ask=person)
    assert not person.answers
    assert yaml.safe_load(path.read_text())["source"]["classes"] == ["cat", "dog", "eel"]


def test_what_was_found_is_said_once_before_the_model_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "photos")
    caplog.set_level("INFO", "pipeline")
    person = Person("victim.py:make", "none")
    before: list[str] = []

    def ask(question: str, default: str | None) -> str:
        before.extend(caplog.messages if "Which model" in question else ())
        return person(question, default)

    path, said = write_config(None, data="photos", ask=ask, keys=OTHERS)
    (found,) = [message for message in before if "images in test 6" in message]
    assert "cat, dog" in found
    assert caplog.messages.count(found) == 1
    assert not [line for line in said if "images in test 6" in line]
    assert "images in test 6" in path.read_text()


def test_code_that_was_changed_meanwhile_is_read_again(tmp_path: Path) -> None:
    put(tmp_path / "photos")
    (tmp_path / "victim.py").write_text(FACTORY.replace("classes: int = 3", "classes: int = 12"))
    person = Person("none", "", "", "", "")

    def ask(question: str, default: str | None) -> str:
        if "identity" in question:  # asked once it is known that the classes do not fit
            (tmp_path / "victim.py").write_text(FACTORY)
        return person(question, default)

    path, _ = write_config(None, data="photos", model="victim.py:make", keys=OTHERS, ask=ask)
    assert not person.answers
    assert path.exists()


def test_images_without_labels_are_attacked_by_what_the_model_predicts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "plain", IMAGES, None)
    person = Person("none", "none")
    path, _ = write_config(None, data="plain", model="victim.py:make", keys=OTHERS, ask=person)
    assert "attack.label" in person.asked[0]
    assert yaml.safe_load(path.read_text())["attack"]["label"] == "prediction"


def test_the_folder_that_is_offered_for_the_dataset_is_not_there_yet() -> None:
    first = ["--data", "digits", "--set", "source.limit=6"]
    assert fgsm("init", "first.yaml", *first).exit_code == 0
    generate(Path("first.yaml"), "--set", "runtime.workers=0")
    assert fgsm("init", "second.yaml", *first, "--epsilons", "3").exit_code == 0
    assert load_config("second.yaml").output.path == "out/digits-2"
    refused = fgsm("init", "third.yaml", *first, "--epsilons", "3", "--output", "out/digits")
    assert refused.exit_code == 2
    assert "Error: output.path: " in refused.stderr


def test_what_was_assumed_is_said_a_line_each(tmp_path: Path) -> None:
    put(tmp_path / "photos", [png_bytes(random_pixels(1, 12 + index, 1)[0]) for index in range(6)])
    result = fgsm("init", "--data", "photos", "--model", "victim.py:make", "--set", "model.kwargs={channels: 1}")
    said = [line for line in result.stderr.splitlines() if line.startswith("Assumed: ")]
    keys = ["source.split", "preprocess.resize", "preprocess.mode", "model.weights", "model.mean"]
    assert all(key in line for key, line in zip(keys, said, strict=True))
    assert "224" in said[1]
    assert all(key in Path("photos.yaml").read_text() for key in keys)


def test_where_all_is_said_nothing_is_assumed(tmp_path: Path) -> None:
    gray(tmp_path / "photos")
    save_weights("sized.pt", "sized.py:make")
    model = ["--model", "sized.py:make", "--weights", "sized.pt", "--set", "model.mean=[0]", "--set", "model.std=[1]"]
    sizes = ["--set", "preprocess.crop=8", "--set", "preprocess.mode=RGB"]
    result = fgsm("init", "--data", "photos", "--split", "test", *model, *sizes)
    assert result.exit_code == 0, result.output
    assert "Assumed" not in result.stderr


def test_it_says_that_it_looks_at_the_images_before_it_loads_what_takes_seconds(tmp_path: Path) -> None:
    put(tmp_path / "photos")
    code = """
import json, logging, sys
from pipeline.cli import app

class Handler(logging.Handler):
    def emit(self, record):
        print(json.dumps([record.getMessage(), sorted({"torch", "datasets", "torchvision"} & {*sys.modules})]))

import pipeline.cli
pipeline.cli.StderrHandler = lambda form: Handler()
app(["init", "--data", "photos"])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message, loaded = json.loads(process.stdout.splitlines()[0])
    assert "photos" in message
    assert loaded == []


def test_from_images_and_a_checkpoint_to_a_dataset_that_is_read(tmp_path: Path) -> None:
    put(tmp_path / "photos")
    save_weights("victim.pt")
    options = ["--data", "photos", "--split", "test", "--model", "victim.py:make", "--weights", "victim.pt"]
    assert fgsm("init", "my.yaml", *options, "--epsilons", "2,8").exit_code == 0
    planned = fgsm("plan", "my.yaml")
    assert planned.exit_code == 0, planned.output
    generate(Path("my.yaml"))
    rows = pipeline.load("out/photos", [0, "2/255", "8/255"], split="test")
    assert len(rows) == 18
    assert rows.features["label"].names == sorted(NAMES)
    stored = {row["image"].tobytes() for row in rows.select(range(6))}
    assert stored == {pixels.tobytes() for pixels in random_pixels(6)}


def save_transformer(folder: Path) -> None:
    """A model of images of 32 px in RGB, with the mean and std that it was published with."""
    import transformers

    names = dict(enumerate(("cat", "dog", "eel")))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16, id2label=names)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_a_mean_that_was_published_is_not_what_is_wrong(tmp_path: Path) -> None:
    save_transformer(tmp_path / "vit")
    gray(tmp_path / "gray")
    with pytest.raises(ConfigError, match=r"^model: "):
        write_config(None, data="gray", model="vit", overrides=["preprocess.mode=L", "preprocess.crop=8"])


def test_from_parquet_and_a_folder_of_transformers_to_a_dataset(tmp_path: Path) -> None:
    save_transformer(tmp_path / "vit")
    parquet(tmp_path / "tables")
    result = fgsm("init", "--data", "tables", "--model", "vit")
    assert result.exit_code == 0, result.output
    assert "Assumed" not in result.stderr
    assert not [*Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")]  # nothing is copied only to look at it
    generate(Path("tables.yaml"), "--set", "runtime.workers=0")
    assert manifest(tmp_path / "out/tables")["shape"] == [3, 32, 32]


@pytest.mark.parametrize(
    "error",
    [
        None,
        OfflineModeIsEnabled("offline mode is enabled"),
        LocalEntryNotFoundError("not in the disk cache and outgoing traffic has been disabled"),
    ],
    ids=["no network", "offline", "offline and not in the cache"],
)
def test_a_model_that_cannot_be_downloaded_now_is_said_and_the_config_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    put(tmp_path / "photos")
    cut_off(monkeypatch, error)
    result = fgsm("init", "--data", "photos", "--model", "resnet18", "--set", "model.label_map=identity")
    assert result.exit_code == 0, result.output
    (said,) = [line for line in result.stderr.splitlines() if "not tried" in line]
    assert "model" in said
    assert load_config("photos.yaml").all_models["resnet18"].weights == "IMAGENET1K_V1"


def test_published_weights_bring_their_sizes_and_need_to_know_which_classes_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.png").write_bytes(png_bytes(random_pixels(1, 12 + index)[0]))
    cut_off(monkeypatch)
    person = Person("", "", "", "cat=281, dog=nosuch", "", "", "", "cat=281, dog: 207")
    write_config(None, data="photos", model="resnet18", keys=OTHERS, ask=person)
    assert not person.answers
    said = yaml.safe_load(Path("photos.yaml").read_text())
    assert said["model"]["weights"] == "IMAGENET1K_V1"
    assert said["model"]["label_map"] == {"cat": 281, "dog": 207}
    assert "resize" not in said.get("preprocess", {})


def test_a_model_with_a_checkpoint_is_made_with_the_classes_of_the_images(tmp_path: Path) -> None:
    import torchvision

    put(tmp_path / "photos")
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=3).state_dict(), "own.pt")
    keys = {"model.weights": "own.pt"}
    _, said = write_config(
        None, data="photos", model="shufflenet_v2_x0_5", keys=keys, overrides=["preprocess.resize=32"]
    )
    assert any("model.kwargs" in line for line in said)
    written = yaml.safe_load(Path("photos.yaml").read_text())
    assert written["model"]["kwargs"] == {"num_classes": 3}


def test_classes_that_have_the_names_of_the_model_s_are_mapped_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch)
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
