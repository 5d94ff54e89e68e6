"""What users get wrong: one clear sentence, the right exit code, and nothing written."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import FACTORY, WriteConfig, fgsm, png_bytes, random_pixels, write_parquet

PNGS = [png_bytes(pixels) for pixels in random_pixels(12)]


def refused(config: Path, *arguments: str | Path, code: int = 2) -> str:
    """The sentence of a run that was refused before anything was written."""
    result = fgsm("generate", config, *arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    # Before it, log lines with their times say what is being opened.
    lines = [line for line in result.stderr.splitlines() if not re.match(r"[\d-]+ [\d:,]+ ", line)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert not (config.parent / "out").exists()
    return lines[0].removeprefix("Error: ")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("attak.epsilons=[1/255]", "attak "),
        ("attack.epsilons=[0.5/255]", "attack.epsilons"),
        ("attack.epsilons=[8/255,0.0315]", "attack.epsilons"),
        ("attack.target=ox", "attack.target"),
        ("output.layout=rows", "output.layout"),
        ("source.keep_columns=[caption]", "source.keep_columns"),
        ("source.keep_columns=[label]", "source.keep_columns"),
        ("model.kwargs={colour: red}", "model"),
        ("model.kwargs={channels: 1}", "model"),
        ("model.name=nowhere.py:make", "model.name"),
        ("model.label_map={cat: 0, dog: 1, eel: 9}", "model.label_map"),
        ("model.label_map={cat: 0, dog: 1}", "model.label_map"),
        ("runtime.device=cuda", "runtime.device"),
        ("preprocess.mode=CMYK", "preprocess.mode"),
    ],
)
def test_a_config_that_cannot_be_used(write_config: WriteConfig, override: str, key: str) -> None:
    if "cuda" in override and torch.cuda.is_available():
        override = "runtime.device=mps"
    assert refused(write_config(), "--set", override).startswith(key)


def no_image(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(folder / "test.parquet"))


def two_images(folder: Path) -> None:
    write_parquet(folder, PNGS, [0] * 12, second=(datasets.Image(), PNGS))


def two_labels(folder: Path) -> None:
    write_parquet(folder, PNGS, [0] * 12, coarse=(datasets.ClassLabel(names=["x", "y"]), [0] * 12))


def empty(folder: Path) -> None:
    write_parquet(folder, [], [])


def several_splits(folder: Path) -> None:
    for split in ("train", "test"):
        write_parquet(folder, PNGS, [0] * 12, split=split)


def classes_in_another_order(folder: Path) -> None:
    digits = [png_bytes(pixels) for pixels in random_pixels(12, side=64)]
    names = datasets.ClassLabel(names=["1", "0", *map(str, range(2, 10))])
    write_parquet(folder, digits, None, label=(names, [0] * 12))


def labels_too_high(folder: Path) -> None:
    write_parquet(folder, PNGS, None, label=(datasets.Value("int64"), [0, 1, 2, 3] * 3))


def nothing_decodable(folder: Path) -> None:
    write_parquet(folder, [b"", PNGS[0][:50]], [0, 1])


DIGITS = {"model": {"kind": "digits", "name": None}, "preprocess": {"mode": "L"}}


@pytest.mark.parametrize(
    ("make", "sections", "key", "code"),
    [
        (no_image, {}, "source.image_column", 2),
        (two_images, {}, "source.image_column", 2),
        (two_labels, {}, "source.label_column", 2),
        (empty, {}, "source", 2),
        (several_splits, {}, "source.split", 2),
        (classes_in_another_order, DIGITS, "model.label_map", 2),
        (labels_too_high, {"source": {"label_column": "label"}}, "source", 2),
        (nothing_decodable, {}, "source", 1),
    ],
)
def test_a_dataset_that_cannot_be_used(
    write_config: WriteConfig,
    tmp_path: Path,
    make: Callable[[Path], None],
    sections: dict[str, dict[str, Any]],
    key: str,
    code: int,
) -> None:
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad")
    sections = {**sections, "source": {"path": str(tmp_path / "bad"), "shuffle": False, **sections.get("source", {})}}
    assert key in refused(write_config(**sections), code=code)


def test_an_imagefolder_without_images(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "photos/cat").mkdir(parents=True)
    config = write_config(source={"kind": "imagefolder", "path": str(tmp_path / "photos"), "split": "test"})
    assert refused(config).startswith(f"source.path: {tmp_path}/photos ")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/cat/1.png")
    assert re.match(r"model\.label_map: .* 1 class.* 3;", refused(config))


class Dangerous:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_does_not_fit_lists_its_keys(write_config: WriteConfig, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(6, 3, 5, 5), "conv.bias": torch.zeros(6), "fc.weight": torch.zeros(3)}, path)
    sentence = refused(write_config(model={"weights": str(path)}))
    assert re.search(r"^model\.weights: .*linear\.weight, linear\.bias.*fc\.weight.*conv\.weight", sentence)


def test_a_pickle_that_is_not_plain_weights_is_not_executed(write_config: WriteConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"x": Dangerous(tmp_path / "owned")}}, path)
    assert refused(write_config(model={"weights": str(path)})).startswith(f"model.weights: {path} ")
    path.write_bytes(pickle.dumps(Dangerous(tmp_path / "owned")))
    assert refused(write_config(model={"weights": str(path)})).startswith(f"model.weights: {path} ")
    assert not (tmp_path / "owned").exists()


def test_debug_shows_the_traceback_and_keeps_the_exit_code(write_config: WriteConfig) -> None:
    result = fgsm("generate", write_config(), "--debug", "--set", "source.path=/no/such/folder")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "Error: source.path: " in result.stderr


def test_a_wrong_option_is_bad_usage() -> None:
    assert fgsm("generate", "digits", "--overwrit").exit_code == 2
    assert fgsm("nonsense").exit_code == 2


def test_a_bug_of_ours_keeps_its_traceback(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("pipeline.flow.check_disk", broken)
    with pytest.raises(KeyError, match="a bug"):
        fgsm("generate", write_config())


FROZEN = """

class Frozen(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)
"""


def test_a_victim_that_lets_no_gradient_through(write_config: WriteConfig, factory_file: Path) -> None:
    factory_file.write_text(FACTORY + FROZEN)
    assert re.search("^model: .*gradient", refused(write_config(model={"name": f"{factory_file}:Frozen"})))


def test_splits_whose_files_would_be_named_alike(write_config: WriteConfig, tmp_path: Path) -> None:
    for split in ("a-b", "a_b"):
        path = tmp_path / "photos" / split / "cat" / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    photos = {"kind": "imagefolder", "path": str(tmp_path / "photos"), "split": ["a-b", "a_b"]}
    assert re.search(r"^source\.split: .*a-b.*a_b", refused(write_config(source=photos)))
