"""What users get wrong: one clear sentence, the right exit code, and nothing written."""

import os
import pickle
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
    lines = [line for line in result.stderr.splitlines() if not line.startswith("epsilon ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert not (config.parent / "out").exists()
    return lines[0].removeprefix("Error: ")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("attack.epsilon=[1/255]", "attack.epsilon is an unknown key; did you mean epsilons?"),
        ("attak.epsilons=[1/255]", "attak is an unknown key; did you mean attack?"),
        ("attack.epsilons=[0.5/255]", "is neither a number nor of the form k/255"),
        ("attack.epsilons=[0.002]", "0.002 is below 1/255"),
        ("attack.epsilons=[8]", "8.0 is above 1, and pixels run from 0 to 1; write 8/255"),
        ("attack.epsilons=[8/255,0.0315]", "8/255 and 0.0315 are both stored as 8/255"),
        ("attack.target=ox", "attack.target: 'ox' is no class of the model"),
        ("output.image_format=jpeg", "JPEG is lossy"),
        ("output.layout=rows", "output.layout: got 'rows'; allowed: 'images', 'signs' or 'wide'"),
        ("source.path=/no/such/folder", "source.path: there is no folder /no/such/folder"),
        ("source.split=train", "source.split: there is no split train; the source has test"),
        ("source.image_column=img", "source.image_column: there is no column img; the columns are image, label"),
        ("source.keep_columns=[caption]", "source.keep_columns: there is no column caption"),
        ("source.keep_columns=[label]", "source.keep_columns: label is a column of the output itself"),
        ("model.kwargs={classes: 7}", "The dataset has 3 classes and the model 7"),
        ("model.kwargs={colour: red}", "unexpected keyword argument 'colour'"),
        ("model.kwargs={channels: 1}", "model: it does not take images of shape (3, 16, 16)"),
        ("model.name=nowhere.py:make", "/nowhere.py."),
        ("model.weights=nowhere.pt", "/nowhere.pt."),
        ("model.label_map={cat: 0, dog: 1, eel: 9}", "model.label_map: 9 is no class of the model"),
        ("model.label_map={cat: 0, dog: 1}", "model.label_map: the dataset's 'eel' are not in it"),
        ("runtime.device=cuda", "runtime.device: this machine has no cuda device"),
        ("preprocess.mode=CMYK", "preprocess.mode: got 'CMYK'; allowed: 'RGB' or 'L'"),
    ],
)
def test_a_config_that_cannot_be_used(write_config: WriteConfig, override: str, sentence: str) -> None:
    if "cuda" in override and torch.cuda.is_available():
        override, sentence = "runtime.device=mps", "runtime.device: this machine has no mps device"
    assert sentence in refused(write_config(), "--set", override)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    sentence = refused(tmp_path / "missing.yaml")
    assert "shipped: cifar10, digits, imagefolder, imagenet-resnet50, mnist" in sentence


def no_image(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(folder / "test.parquet"))


def two_images(folder: Path) -> None:
    write_parquet(folder, PNGS, [0] * 12, second=(datasets.Image(), PNGS))


def no_label(folder: Path) -> None:
    write_parquet(folder, PNGS, None)


def two_labels(folder: Path) -> None:
    write_parquet(folder, PNGS, [0] * 12, coarse=(datasets.ClassLabel(names=["x", "y"]), [0] * 12))


def unlabelled(folder: Path) -> None:
    write_parquet(folder, PNGS, [0, 1, -1, None] * 3)


def empty(folder: Path) -> None:
    write_parquet(folder, [], [])


def mixed_sizes(folder: Path) -> None:
    odd = png_bytes(random_pixels(1, side=20)[0])
    write_parquet(folder, [*PNGS[:7], odd, *PNGS[8:]], [0] * 12)


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


@pytest.mark.parametrize(
    ("make", "sections", "sentence", "code"),
    [
        (no_image, {}, "source.image_column: no column holds images; the columns are text, label", 2),
        (two_images, {}, "source.image_column: there are several image columns (image, second)", 2),
        (no_label, {}, "source.label_column: no column is a ClassLabel", 2),
        (two_labels, {}, "source.label_column: there are several ClassLabel columns (label, coarse)", 2),
        (unlabelled, {}, "has 6 unlabelled rows, and attack.label: dataset needs every label", 2),
        (empty, {}, "is empty: it has no rows", 2),
        (mixed_sizes, {}, "16x16 and row 7 of split test is 20x20; set preprocess.resize and preprocess.crop", 2),
        (several_splits, {}, "source.split: name one or more of the source's splits", 2),
        (
            classes_in_another_order,
            {"model": {"kind": "digits", "name": None}, "preprocess": {"mode": "L"}},
            "name their classes in another order (class 0 is '1' in the dataset, '0' in the model)",
            2,
        ),
        (labels_too_high, {"source": {"label_column": "label"}}, "has label 3, outside the 3 classes (0 to 2)", 2),
        (nothing_decodable, {}, "source: none of its images can be decoded", 1),
    ],
)
def test_a_dataset_that_cannot_be_used(
    write_config: WriteConfig,
    tmp_path: Path,
    make: Callable[[Path], None],
    sections: dict[str, dict[str, Any]],
    sentence: str,
    code: int,
) -> None:
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad")
    sections = {**sections, "source": {"path": str(tmp_path / "bad"), "shuffle": False, **sections.get("source", {})}}
    assert sentence in refused(write_config(**sections), code=code)


def test_an_imagefolder_without_images(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "photos/cat").mkdir(parents=True)
    config = write_config(source={"kind": "imagefolder", "path": str(tmp_path / "photos")})
    assert "is not a folder of class folders" in refused(config)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/cat/1.png")
    assert "The dataset has 1 classes and the model 3" in refused(config)


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
    assert "missing linear.weight, linear.bias" in sentence
    assert "unexpected fc.weight" in sentence
    assert "of another shape conv.weight" in sentence


def test_a_pickle_that_is_not_plain_weights_is_not_executed(write_config: WriteConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"x": Dangerous(tmp_path / "owned")}}, path)
    assert "is not plain weights, and nothing in it was executed" in refused(write_config(model={"weights": str(path)}))
    path.write_bytes(pickle.dumps(Dangerous(tmp_path / "owned")))
    assert "is not plain weights" in refused(write_config(model={"weights": str(path)}))
    assert not (tmp_path / "owned").exists()


def test_debug_shows_the_traceback_and_keeps_the_exit_code(write_config: WriteConfig) -> None:
    result = fgsm("generate", write_config(), "--debug", "--set", "source.path=/no/such/folder")
    assert result.exit_code == 2
    assert "Error: source.path: there is no folder" in result.stderr


def test_a_wrong_option_is_bad_usage() -> None:
    assert fgsm("generate", "digits", "--overwrit").exit_code == 2
    assert fgsm("nonsense").exit_code == 2


def test_a_bug_of_ours_keeps_its_traceback(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("pipeline.generate.check_disk", broken)
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
    assert "no gradient reaches its input" in refused(write_config(model={"name": f"{factory_file}:Frozen"}))


def test_splits_whose_files_would_be_named_alike(write_config: WriteConfig, tmp_path: Path) -> None:
    for split in ("a-b", "a_b"):
        path = tmp_path / "photos" / split / "cat" / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    photos = {"kind": "imagefolder", "path": str(tmp_path / "photos"), "split": ["a-b", "a_b"]}
    assert "two splits would have the same name" in refused(write_config(source=photos))
