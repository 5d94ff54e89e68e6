"""The sentences that users meet most, word for word. Other tests look at the type of an error and the key it names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import WriteConfig, fgsm, png_bytes, random_pixels, write_parquet

PNGS = [png_bytes(pixels) for pixels in random_pixels(12)]
# What makes a command fail, given `write_config` and the folder where it writes: the command's arguments.
Cause = Callable[[WriteConfig, Path], list[str | Path]]


def setting(change: str) -> Cause:
    return lambda write_config, _: ["generate", write_config(), "--set", change]


def no_config(_: WriteConfig, folder: Path) -> list[str | Path]:
    return ["generate", folder / "missing.yaml"]


def no_dataset(_: WriteConfig, folder: Path) -> list[str | Path]:
    return ["verify", folder]


def no_class_folders(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    (folder / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "photos/1.png")
    return ["generate", write_config(source={"kind": "imagefolder", "path": str(folder / "photos")})]


def no_label_column(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    return ["generate", write_config(source={"path": str(write_parquet(folder / "plain", PNGS, None))})]


def unlabelled_rows(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    source = {"path": str(write_parquet(folder / "partly", PNGS, [0, 1, -1, None] * 3))}
    return ["generate", write_config(source=source)]


def several_splits(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    for split in ("train", "test"):
        write_parquet(folder / "two", PNGS, [0] * 12, split=split)
    return ["generate", write_config(source={"path": str(folder / "two")})]


def weights_of_another_model(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    save_file({"fc.weight": torch.zeros(3)}, folder / "other.safetensors")
    return ["generate", write_config(model={"weights": str(folder / "other.safetensors")})]


def no_gradient(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    with (folder / "victim.py").open("a") as file:
        file.write("\n\nclass Frozen(Net):\n    forward = torch.no_grad()(Net.forward)\n")
    return ["generate", write_config(model={"name": f"{folder}/victim.py:Frozen"})]


def a_key_twice(_: WriteConfig, folder: Path) -> list[str | Path]:
    (folder / "config.yaml").write_text("source: {kind: digits}\nsource: {kind: digits}\n")
    return ["generate", folder / "config.yaml"]


def mixed_sizes(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    odd = png_bytes(random_pixels(1, side=20)[0])
    source = {"path": str(write_parquet(folder / "mixed", [*PNGS[:7], odd], [0] * 8)), "shuffle": False}
    return ["generate", write_config(source=source)]


def undecodable_rows(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    source = {"path": str(write_parquet(folder / "broken", [*PNGS, b""], [0] * 13)), "shuffle": False}
    return ["generate", write_config(source=source)]


def a_file_in_its_place(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    (folder / "out").touch()
    return ["generate", write_config()]


def in_the_source(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    return ["generate", write_config(output={"path": str(folder / "source/out")})]


def no_such_part(write_config: WriteConfig, _: Path) -> list[str | Path]:
    return ["generate", write_config(), "--part", "2/2"]


def something_else(write_config: WriteConfig, folder: Path) -> list[str | Path]:
    (folder / "out").mkdir()
    (folder / "out/photo.png").touch()
    return ["generate", write_config()]


SENTENCES: list[tuple[Cause, str]] = [
    (setting("attack.epsilon=[1/255]"), "attack.epsilon is an unknown key; did you mean epsilons?"),
    (setting("attack.epsilons=[8]"), "attack.epsilons: 8.0 is above 1, and pixels run from 0 to 1; write 8/255."),
    (
        setting("attack.epsilons=[0.002]"),
        "attack.epsilons: 0.002 is below 1/255, the smallest step an 8-bit image can hold.",
    ),
    (
        setting("output.image_format=jpeg"),
        "output.image_format: JPEG is lossy: the stored pixels would differ from the attacked ones and leave the "
        "epsilon ball; use auto, webp or png, which are lossless.",
    ),
    (
        setting("attack.epsilons=[8/255, 0.0315]"),
        "attack.epsilons: 8/255 and 0.0315 are both stored as 8/255; keep one of them.",
    ),
    (
        setting("attack.kind=fgm"),
        "attack.kind: got 'fgm'; allowed: 'fgsm', 'noise', 'bim', 'pgd', 'mifgsm' or 'path/to/file.py:Attack'.",
    ),
    (
        setting("attack.target=ox"),
        "attack.target: 'ox' is no class of the dataset or of the model ('cat', 'dog', 'eel').",
    ),
    (setting("output.layout=rows"), "output.layout: got 'rows'; allowed: 'images', 'signs' or 'wide'."),
    (
        setting("output.path=hf://datasets/me/x"),
        "output.path: hf:// is no object store; fgsm publish uploads a dataset to the Hub.",
    ),
    (
        setting("source.kwargs={token: swordfish}"),
        "source.kwargs.token holds a credential, and a config is written into manifest.json, which is published; "
        "remove it, and log in with `hf auth login` or set HF_TOKEN or what the storage's client reads.",
    ),
    (
        setting("runtime.batch_size"),
        "--set runtime.batch_size: write it as key=value, for example --set runtime.batch_size=64.",
    ),
    (setting("source.path=/no/such/folder"), "source.path: there is no folder /no/such/folder."),
    (setting("source.split=train"), "source.split: there is no split train; the source has test."),
    (
        setting("source.image_column=img"),
        "source.image_column: there is no column img; the columns are image, label.",
    ),
    (setting("model.weights=/nowhere.pt"), "model.weights: there is no file /nowhere.pt."),
    (
        setting("model.kwargs={classes: 7}"),
        "model.label_map: the dataset has 3 classes and the model 7; say which belong together.",
    ),
    (
        no_config,
        "There is no config file {folder}/missing.yaml, and no shipped config of that name (shipped: cifar10, "
        "cifar10-ensemble, digits, digits-ensemble, imagefolder, imagenet-resnet50, mnist).",
    ),
    (no_dataset, "{folder} holds no dataset of fgsm-pipeline: there is no manifest.json."),
    (no_class_folders, "source.path: {folder}/photos is not a folder of class folders: there is no folder in it."),
    (
        no_label_column,
        "source.label_column: no column is a ClassLabel; name one of integers or strings (the columns are image), or "
        "set attack.label=prediction.",
    ),
    (
        unlabelled_rows,
        "source: split test has 6 unlabelled rows, and attack.label: dataset needs every label; drop those rows, or "
        "set attack.label=prediction.",
    ),
    (several_splits, "source.split: name one or more of the source's splits: train, test."),
    (
        weights_of_another_model,
        "model.weights: {folder}/other.safetensors does not fit the model: missing conv.weight, conv.bias, "
        "linear.weight, linear.bias; unexpected fc.weight.",
    ),
    (no_gradient, "model: no gradient reaches its input; does it run under torch.no_grad or detach?"),
    (a_key_twice, "{folder}/config.yaml is not valid YAML: the key source appears twice."),
    (
        a_file_in_its_place,
        "output.path: {folder}/out is a file, not a folder; remove it, or choose another folder.",
    ),
    (
        in_the_source,
        "output.path: {folder}/source/out lies in the source's own folder {folder}/source; choose another place.",
    ),
    (no_such_part, "--part: there is no part 2 of 2; parts count from 0, so the last of N is N-1."),
    (
        mixed_sizes,
        "source: images differ in size: one is 16x16 and row 7 of split test is 20x20; set preprocess.resize and "
        "preprocess.crop.",
    ),
    (
        undecodable_rows,
        "source: 1 of 13 rows could not be decoded, more than runtime.max_skipped = 0.01 allows; the last: row 12 of "
        "split test cannot be decoded (cannot identify image file).",
    ),
    (
        something_else,
        "output.path: {folder}/out is not empty and holds no dataset of fgsm-pipeline (there is photo.png); choose "
        "another folder.",
    ),
]


@pytest.mark.parametrize(("cause", "sentence"), SENTENCES, ids=[sentence[:40] for _, sentence in SENTENCES])
def test_a_sentence(cause: Cause, sentence: str, write_config: WriteConfig, tmp_path: Path) -> None:
    result = fgsm(*cause(write_config, tmp_path))
    assert result.exit_code == (1 if cause is undecodable_rows else 2), result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert told == [f"Error: {sentence.format(folder=tmp_path)}"]
    assert result.stderr.endswith(f"{told[0]}\n")
