"""Sources: what is read of each kind of dataset before the run, and how its images open."""

import errno
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.images import UndecodableError
from pipeline.core.plan import Plan, Shard
from pipeline.engine.decode import read_image
from pipeline.sources.base import Source
from pipeline.sources.digits import digits_split
from pipeline.sources.registry import open_source
from pipeline.sources.torchvision import TorchvisionConfig, TorchvisionSource
from tests.conftest import CLASSES, png_bytes, random_pixels, write_parquet
from tests.support.configs import section
from tests.support.sources import first_values, openers_of, tables_of

INT, TEXT = datasets.Value("int64"), datasets.Value("string")


def shade(value: int, side: int = 4) -> bytes:
    """A PNG whose pixels all have this value."""
    return png_bytes(np.full((side, side, 3), value, np.uint8))


SHADES = [shade(10 * row) for row in range(6)]
LABELS = [0, 1, 2, 2, 1, 0]


def open_kind(kind: Any, path: str | Path | None = None, *, need_labels: bool = True, **keys: Any) -> Source:
    config = section("source", kind=kind, **({} if path is None else {"path": str(path)}), **keys)
    return open_source(config, need_labels=need_labels)


hub = partial(open_kind, "huggingface")
folders = partial(open_kind, "imagefolder")
vision = partial(open_kind, "torchvision")


def refuse(opening: Callable[[], Source], sentence: str) -> None:
    """Opening fails with one sentence that matches."""
    with pytest.raises(ConfigError, match=sentence) as error:
        opening()
    assert "\n" not in str(error.value)


def labels(source: Source) -> dict[str, list[int]]:
    return {split: own.tolist() for split, own in source.labels.items()}


# ---------------------------------------------------------------------------------------------- digits


def test_digits_are_a_fixed_stratified_split() -> None:
    source = open_kind("digits")
    assert source.classes == tuple("0123456789")
    assert source.splits == {"train": 1352, "test": 445}
    train, test = source.labels.values()
    # A quarter of every class is held out.
    held_out = np.bincount(test) / np.bincount(np.concatenate([train, test]))
    assert np.abs(held_out - 0.25).max() < 0.005
    again = open_kind("digits")
    assert again.digest == source.digest
    assert labels(source) == labels(again)
    assert train.dtype == test.dtype == np.int64


def test_digits_of_the_two_splits_are_disjoint_and_repeat() -> None:
    train, test = digits_split("train")[0], digits_split("test")[0]
    assert train.shape == (1352, 64, 64)
    assert train.dtype == test.dtype == np.uint8
    # scikit-learn's 1,797 digits are all different.
    assert len({image.tobytes() for image in (*train, *test)}) == 1797
    assert digits_split("test")[0].tobytes() == test.tobytes()
    assert (test.min(), test.max()) == (0, 255)
    opener = openers_of(open_kind("digits", split="test"), "test")[7]
    assert np.asarray(opener()).tobytes() == test[7].tobytes()


def test_digits_splits_come_as_asked() -> None:
    assert list(open_kind("digits", split=["test", "train"]).splits) == ["test", "train"]
    assert open_kind("digits", split="test").digest != open_kind("digits", split="train").digest
    refuse(lambda: open_kind("digits", split="validation"), r"^source\.split: there is no split validation; .*train, t")


# ----------------------------------------------------------------------------------------- imagefolder


def write_folders(root: Path, images: dict[str, Sequence[int]], suffix: str = ".png") -> Path:
    """A class folder for each name, with an image of each shade."""
    for name, values in images.items():
        (root / name).mkdir(parents=True)
        for index, value in enumerate(values):
            Image.new("RGB", (4, 4), (value, 0, 0)).save(root / name / f"{index}{suffix}")
    return root


def test_imagefolder(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"dog": [10, 20], "cat": [30], "eel": [40]})
    source = folders(root)
    assert source.classes == CLASSES
    assert labels(source) == {"train": [0, 1, 1, 2]}
    assert next(iter(source.labels.values())).dtype == np.int64
    assert first_values(source, next(iter(source.splits))) == [30, 10, 20, 40]
    assert labels(folders(root, split="test")) == {"test": [0, 1, 1, 2]}


def test_imagefolder_with_a_folder_for_each_split(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_folders(root / "train", {"cat": [10], "dog": [20, 30]})
    write_folders(root / "test", {"cat": [40], "dog": [50]})
    source = folders(root, split=["test", "train"])
    assert source.classes == ("cat", "dog")
    assert labels(source) == {"test": [0, 1], "train": [0, 1, 1]}
    assert [first_values(source, split) for split in source.splits] == [[40, 50], [10, 20, 30]]
    assert labels(folders(root)) == {"train": [0, 1, 1]}
    assert first_values(folders(root, split="test"), next(iter(folders(root, split="test").splits))) == [40, 50]


@pytest.mark.parametrize(
    ("images", "split", "sentence"),
    [
        ({}, None, r"is not a folder of class folders"),
        ({"cat": [1], "dog": []}, None, r"is not a folder of class folders: .*dog"),
        ({"cat": [1], "dog": [2]}, ["train", "test"], r"source\.split: there is no folder .*train"),
        ({"train/cat": [1], "test/cat": [2]}, ["train", "val"], r"source\.split: there is no folder .*val"),
        # The split folders are no classes.
        ({"train/cat": [1], "test/cat": [2]}, "validation", r"source\.split: .*validation"),
        ({"val/cat": [1], "test/cat": [2]}, None, r"source\.split: "),
        (
            {"train/cat": [1], "train/dog": [1], "test/cat": [2]},
            ["train", "test"],
            r"the class folders of split test differ from those of the first split",
        ),
    ],
)
def test_imagefolder_that_cannot_be_used(
    tmp_path: Path, images: dict[str, Sequence[int]], split: Any, sentence: str
) -> None:
    root = tmp_path / "pets"
    root.mkdir()
    write_folders(root, images)
    refuse(lambda: folders(root, split=split), sentence)


def test_imagefolder_that_is_not_there(tmp_path: Path) -> None:
    refuse(lambda: folders(tmp_path / "gone"), r"^source\.path: there is no folder .*gone\.$")
    (tmp_path / "file").touch()
    refuse(lambda: folders(tmp_path / "file"), r"^source\.path: there is no folder .*file\.$")


def test_a_file_of_an_imagefolder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"cat": [10], "dog": [20]})
    (root / "cat/1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(
        PipelineError, match=r"^source: an image or a folder cannot be read: .*No such file.*/pets/cat/1\.png'; fix"
    ):
        folders(root)


def test_imagefolder_digest(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"cat": [10], "dog": [20]}, suffix=".bmp")
    digest = folders(root).digest
    moved = root.rename(tmp_path / "moved")
    assert folders(moved).digest == digest
    # All BMP files of one size are equally long: the content has to be looked at.
    Image.new("RGB", (4, 4), (99, 0, 0)).save(moved / "cat" / "0.bmp")
    changed = folders(moved).digest
    assert changed != digest
    shutil.copy(moved / "cat" / "0.bmp", moved / "dog" / "1.bmp")
    assert folders(moved).digest not in (digest, changed)


def names(source: Source) -> dict[str, list[str | None]]:
    """The file of every row."""
    return {
        split: [source.name_of(cell) for cell in table["image"].to_pylist()]
        for split, table in tables_of(source).items()
    }


def left_out(source: Source) -> list[tuple[int, tuple[str, ...]]]:
    return [(kind.count, kind.first) for kind in source.left_out]


def put_image(path: Path, kind: str | None = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, kind)


ENDINGS = (
    "a.png",
    "b.gif",
    "c.avif",
    "d.jfif",
    "e.jp2",
    "f.JPE",
    "g.TIF",
    "h.pnm",
    "i.bmp",
    "j.webp",
    "k.mpo",
    "l.apng",
)
KINDS = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "MPO", ".pnm": "PPM", ".apng": "PNG"}


@pytest.mark.parametrize("opening", [folders, hub])
def test_what_pillow_opens_is_an_image_whatever_its_ending(tmp_path: Path, opening: Callable[..., Source]) -> None:
    for name in ("cat", "dog"):
        for file in ENDINGS:
            put_image(tmp_path / name / file, KINDS.get(Path(file).suffix.lower()))
    put_image(tmp_path / "dog/m.tga", "TGA")
    put_image(tmp_path / "dog/no ending")
    source = opening(tmp_path)
    assert labels(source) == {"train": [0] * len(ENDINGS) + [1] * len(ENDINGS)}
    assert names(source)["train"][: len(ENDINGS)] == [f"cat/{file}" for file in ENDINGS]
    for opener in openers_of(source, "train"):
        assert read_image(opener, PreprocessConfig(), 100).shape == (3, 4, 4)
    assert left_out(source) == [(2, ("dog/m.tga", "dog/no ending"))]


def test_a_folder_of_one_kind_that_datasets_does_not_know(tmp_path: Path) -> None:
    for name in ("train/cat/0", "train/dog/0", "test/cat/1"):
        put_image(tmp_path / f"{name}.avif", "AVIF")
    put_image(tmp_path / "test/dog/1.png")
    source = hub(tmp_path, split=["train", "test"])
    assert labels(source) == {"train": [0, 1], "test": [0, 1]}
    for name in ("cat", "dog"):
        put_image(tmp_path / f"only/{name}/0.avif", "AVIF")
    assert names(hub(tmp_path / "only")) == {"train": ["cat/0.avif", "dog/0.avif"]}


LITTER = (
    ".ipynb_checkpoints/x.png",
    "__MACOSX/y.png",
    ".git/z.png",
    "lost+found/0.png",
    "cat/._0.png",
    "cat/@eaDir/0.png",
    "@Recycle/0.png",
)


@pytest.mark.parametrize("opening", [folders, hub])
def test_litter_of_systems_and_tools_is_left_out_and_counted(tmp_path: Path, opening: Callable[..., Source]) -> None:
    for name in ("cat/0.png", "dog/0.png"):
        put_image(tmp_path / name)
    clean = opening(tmp_path)
    for name in LITTER:
        put_image(tmp_path / name)
    for name in ("cat/Thumbs.db", "dog/desktop.ini", "dog/.DS_Store"):
        (tmp_path / name).touch()
    source = opening(tmp_path)
    assert source.classes == ("cat", "dog")
    assert labels(source) == {"train": [0, 1]}
    assert source.digest == clean.digest
    assert sorted(left_out(source)) == [
        (2, ("cat/Thumbs.db", "dog/desktop.ini")),
        (8, (".git", ".ipynb_checkpoints", "@Recycle", "__MACOSX", "lost+found")),
    ]


def test_metadata_may_name_images_that_datasets_does_not_know_by_their_names(tmp_path: Path) -> None:
    for name in ("0.avif", "1.avif"):
        put_image(tmp_path / "images" / name)
    rows = [{"file_name": "images/0.avif", "kind": 1}, {"file_name": "images/1.avif", "kind": 0}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels(hub(tmp_path, label_column="kind")) == {"train": [1, 0]}


def test_what_lies_in_no_class_folder_is_counted(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"cat": [10], "dog": [20]})
    put_image(root / "stray.png")
    (root / "classes.txt").touch()
    os.mkfifo(root / "cat/pipe.png")  # opening it would wait for ever
    source = folders(root)
    assert labels(source) == {"train": [0, 1]}
    assert sorted(left_out(source)) == [(1, ("cat/pipe.png",)), (1, ("classes.txt",)), (1, ("stray.png",))]


def test_folders_beside_train_are_named_where_no_split_was_asked_for(tmp_path: Path) -> None:
    # A class may be called train, and its folder hold others: the other classes are not left out without a word.
    for name in ("car/0.png", "bus/0.png", "train/steam/0.png"):
        put_image(tmp_path / name)
    assert left_out(folders(tmp_path)) == [(2, ("bus", "car"))]
    assert left_out(folders(tmp_path, split=["train"])) == []


def test_splits_are_found_beside_litter(tmp_path: Path) -> None:
    for split in ("val", "test"):
        write_folders(tmp_path / split, {"cat": [1], "dog": [2]})
        for name in (".ipynb_checkpoints/0.png", "._0.png"):
            put_image(tmp_path / split / name)
        for name in (".DS_Store", "labels.txt"):
            (tmp_path / split / name).touch()
    assert labels(folders(tmp_path, split=["val", "test"])) == {"val": [0, 1], "test": [0, 1]}
    # They are no classes, whatever lies beside those.
    refuse(lambda: folders(tmp_path), r"^source\.split: ")
    # A folder of nothing but litter is no split.
    put_image(tmp_path / "train/.ipynb_checkpoints/0.png")
    refuse(lambda: folders(tmp_path), r"^source\.split: ")


def test_a_class_without_images_in_one_split_keeps_its_index(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"cat": [1], "dog": [2], "eel": [3]})
    write_folders(tmp_path / "test", {"cat": [1], "dog": [], "eel": [3]})
    source = folders(tmp_path, split=["train", "test"])
    assert labels(source) == {"train": [0, 1, 2], "test": [0, 2]}
    assert left_out(source) == [(1, ("test/dog",))]


def test_images_come_in_the_order_of_torchvision(tmp_path: Path) -> None:
    for name in ("b/9.png", "b/10.png", "b/s/0.png", "b/s-t/0.png", "b/s/r/0.png", "a/Z.png", "a/a.png", "B/0.png"):
        put_image(tmp_path / name)
    torchvisions = torchvision.datasets.ImageFolder(str(tmp_path))
    source = folders(tmp_path)
    assert source.classes == tuple(torchvisions.classes)
    assert labels(source) == {"train": torchvisions.targets}
    assert names(source)["train"] == [str(Path(path).relative_to(tmp_path)) for path, _ in torchvisions.samples]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/again", "../cat"),
        ("again", "."),
        ("cat/up", "../.."),
        ("cat/a link of earlier name", "s"),
        ("cat/s/t", ".."),
        ("cat/1.png", "0.png"),
        ("cat/s/1.png", "../0.png"),
        ("cat/s/1.png", "../s/../0.png"),
    ],
)
def test_each_file_is_read_once_whatever_links_lead_to_it(tmp_path: Path, link: str, target: str) -> None:
    for name in ("cat/0.png", "cat/s/0.png", "dog/0.png"):
        put_image(tmp_path / name)
    (tmp_path / link).symlink_to(target)
    source = folders(tmp_path)
    assert names(source) == {"train": ["cat/0.png", "cat/s/0.png", "dog/0.png"]}
    assert source.classes == ("cat", "dog")
    assert left_out(source) == [(1, (link,))]


@pytest.mark.parametrize(
    ("link", "target"),
    [("dog/1.png", "../cat/0.png"), ("cat/more", "../dog"), ("eel", "cat"), ("eel/x/y", "../../cat")],
)
def test_a_link_that_makes_an_image_one_of_two_classes_is_refused(tmp_path: Path, link: str, target: str) -> None:
    for name in ("cat/0.png", "dog/0.png"):
        put_image(tmp_path / name)
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(target)
    refuse(lambda: folders(tmp_path), rf"^source\.path: {link}.* leads to (cat|dog)")


def test_a_link_to_an_image_of_another_class_is_refused_of_datasets_too(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/0.png"):
        put_image(tmp_path / name)
    (tmp_path / "dog/1.png").symlink_to("0.png")
    assert names(hub(tmp_path)) == {"train": ["cat/0.png", "dog/0.png"]}
    (tmp_path / "dog/2.png").symlink_to("../cat/0.png")
    refuse(lambda: hub(tmp_path), r"^source\.path: .*dog/2\.png leads to ")


def test_a_dataset_may_be_of_links_alone(tmp_path: Path) -> None:
    for index in range(4):
        put_image(tmp_path / f"pool/{index // 2}/{index}.png")
    files, root = tmp_path / "files", tmp_path / "folders"
    for name, target in (("cat/a.png", "0/0"), ("cat/b.png", "0/1"), ("dog/a.png", "1/2"), ("dog/b.png", "1/2")):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).symlink_to(tmp_path / f"pool/{target}.png")
    # Stores that keep equal files once have two links to one.
    assert labels(folders(files)) == labels(hub(files)) == {"train": [0, 0, 1, 1]}
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "pool/0")
    (root / "dog").symlink_to(tmp_path / "pool/1")
    source = folders(root)
    assert names(source) == {"train": ["cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png"]}
    assert source.left_out == ()
    (root / "eel").symlink_to(tmp_path / "gone")
    with pytest.raises(PipelineError, match="folders/eel"):
        folders(root)


def test_names_of_files_are_bytes(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    for name in (f"{latin}/0.png", f"dog/{latin}.png"):
        put_image(tmp_path / name)
    (tmp_path / "dog" / f"{latin}.txt").touch()
    source = folders(tmp_path)
    assert source.classes == (r"caf\xe9", "dog")
    assert names(source) == {"train": [r"caf\xe9/0.png", r"dog/caf\xe9.png"]}
    assert left_out(source) == [(1, (r"dog/caf\xe9.txt",))]
    (tmp_path / "dog" / f"{latin}.png").rename(tmp_path / "dog" / os.fsdecode(b"caf\xe8.png"))
    assert folders(tmp_path).digest != source.digest
    put_image(tmp_path / r"caf\xe9" / "0.png")
    refuse(lambda: folders(tmp_path), r"^source\.path: .* two class folders")
    refuse(lambda: hub(tmp_path), r"^source\.path: .*xe.*UTF-8")


# ----------------------------------------------------------------------------------------- huggingface


def write_rows(
    folder: Path, features: dict[str, Any], rows: dict[str, Sequence[Any]], name: str = "train-00000-of-00001.parquet"
) -> Path:
    """A Parquet file as the Hub holds it, cell by cell: `datasets` itself would embed files that a path names."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=datasets.Features(features).arrow_schema), folder / name)
    return folder


def pets(values: Sequence[int] = LABELS, names: Sequence[str] = CLASSES) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [{"bytes": SHADES[row], "path": None} for row in range(len(values))]
    return datasets.Dataset.from_dict({"image": images, "label": list(values)}, features=features)


def test_parquet_folder(tmp_path: Path) -> None:
    source = hub(write_parquet(tmp_path / "pets", SHADES, LABELS))
    assert source.classes == CLASSES
    assert labels(source) == {"test": LABELS}
    assert next(iter(source.labels.values())).dtype == np.int64
    assert first_values(source, next(iter(source.splits))) == [0, 10, 20, 30, 40, 50]
    assert source.kept == {}
    assert tables_of(source)["test"].column_names == ["image", "label"]


def test_several_parquet_files_make_one_split(tmp_path: Path) -> None:
    for part in range(2):
        pets([part, 2]).to_parquet(str(tmp_path / "pets" / f"train-0000{part}-of-00002.parquet"))
    assert labels(hub(tmp_path / "pets")) == {"train": [0, 2, 1, 2]}


def test_saved_dataset(tmp_path: Path) -> None:
    # Rows in another order than they are stored in.
    pets().select([5, 3, 0]).save_to_disk(str(tmp_path / "pets"))
    source = hub(tmp_path / "pets")
    assert source.classes == CLASSES
    assert labels(source) == {"train": [0, 2, 0]}
    assert first_values(source, next(iter(source.splits))) == [50, 30, 0]


def test_saved_slice_of_a_split_keeps_the_splits_name(tmp_path: Path) -> None:
    # `datasets` calls it `test[:50%]`, which can be neither a file's name nor a split's on the Hub.
    folder = write_parquet(tmp_path / "pets", SHADES, LABELS)
    datasets.load_dataset(str(folder), split="test[:50%]").save_to_disk(str(tmp_path / "half"))
    assert labels(hub(tmp_path / "half")) == {"test": LABELS[:3]}
    assert labels(hub(tmp_path / "half", split="test")) == {"test": LABELS[:3]}


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_several_splits_are_chosen_by_name(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "pets"
    if form == "parquet":
        write_parquet(folder, SHADES[:2], [0, 1], "train")
        write_parquet(folder, SHADES[2:3], [2], "test")
    else:
        datasets.DatasetDict(train=pets([0, 1]), test=pets([2])).save_to_disk(str(folder))
    assert labels(hub(folder, split=["test", "train"])) == {"test": [2], "train": [0, 1]}
    assert labels(hub(folder, split="test")) == {"test": [2]}
    refuse(lambda: hub(folder), r"^source\.split: name one or more of the source's splits: (train, test|test, train)")
    refuse(lambda: hub(folder, split=["train", "validation"]), r"^source\.split: there is no split validation; .*train")


def without_label(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.remove_columns("label")


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        (lambda: without_label(pets()), r"^source: column label .* in test "),
        (lambda: pets().remove_columns("image"), r"^source: column image .* in test "),
        # The same numbers would mean other classes.
        (lambda: pets(names=["eel", "dog", "cat"]), r"^source: column label .* in test "),
    ],
)
def test_splits_with_other_columns_or_classes(
    tmp_path: Path, test: Callable[[], datasets.Dataset], sentence: str
) -> None:
    datasets.DatasetDict(train=pets(), test=test()).save_to_disk(str(tmp_path / "pets"))
    refuse(lambda: hub(tmp_path / "pets", split=["train", "test"]), sentence)


CELLS = [{"bytes": data, "path": None} for data in SHADES]
MIXED: dict[str, tuple[Any, Sequence[Any]]] = {
    "image": (datasets.Image(), CELLS),
    "depth": (datasets.Image(), CELLS[::-1]),
    "cell": ({"bytes": datasets.Value("binary"), "path": TEXT}, CELLS),
    "data": (datasets.Value("binary"), SHADES),
    "large": (datasets.Value("large_binary"), SHADES),
    "label": (datasets.ClassLabel(names=list(CLASSES)), LABELS),
    "coarse": (datasets.ClassLabel(names=["fish", "mammal"]), [1, 1, 0, 0, 1, 1]),
    "number": (datasets.Value("uint8"), [3, 0, 1, 2, 4, 200]),
    "name": (TEXT, ["dog", "cat", "cat", "eel", "dog", "dog"]),
    "long_name": (datasets.Value("large_string"), ["dog", "cat", "cat", "eel", "dog", "dog"]),
    "score": (datasets.Value("float32"), [0.5, 1, 2, 3, 4, 5]),
    "flag": (datasets.Value("bool"), [True, False] * 3),
    "holes": (INT, [0, None, 2, -1, 1, 0]),
    "name_holes": (TEXT, ["dog", None, "cat", "cat", "dog", None]),
    "below": (INT, [0, 1, -2, 0, 0, 0]),
    "class_holes": (datasets.ClassLabel(names=list(CLASSES)), [0, -1, None, 2, 1, 0]),
}


def write_columns(folder: Path, *names: str) -> Path:
    """A dataset with these columns of the table above."""
    return write_rows(folder, {name: MIXED[name][0] for name in names}, {name: MIXED[name][1] for name in names})


@pytest.mark.parametrize(
    ("columns", "named", "values"),
    [
        (["image", "label"], None, [0, 10, 20, 30, 40, 50]),
        (["image", "depth", "label"], "depth", [50, 40, 30, 20, 10, 0]),
        # Columns without the Hub's metadata, which only a person can know to be images.
        (["cell", "label"], "cell", [0, 10, 20, 30, 40, 50]),
        (["data", "label"], "data", [0, 10, 20, 30, 40, 50]),
        (["large", "label"], "large", [0, 10, 20, 30, 40, 50]),
    ],
)
def test_image_column(tmp_path: Path, columns: Sequence[str], named: str | None, values: list[int]) -> None:
    folder = write_columns(tmp_path / "pets", *columns)
    assert first_values(hub(folder, image_column=named), next(iter(hub(folder, image_column=named).splits))) == values


@pytest.mark.parametrize(
    ("columns", "named", "sentence"),
    [
        (["label", "number"], None, r"^source\.image_column: no column holds images; the columns are label, number"),
        (["cell", "label"], None, r"^source\.image_column: no column holds images; the columns are cell, label"),
        (["image", "depth", "label"], None, r"^source\.image_column: there are several .*\(image, depth\); name one"),
        (["image", "label"], "img", r"^source\.image_column: there is no column img; the columns are image, label"),
        (["image", "label"], "label", r"^source\.image_column: label does not hold images"),
        (["image", "label", "score"], "score", r"^source\.image_column: score does not hold images"),
        (["image", "label", "flag"], "flag", r"^source\.image_column: flag does not hold images"),
    ],
)
def test_image_column_that_cannot_be_used(
    tmp_path: Path, columns: Sequence[str], named: str | None, sentence: str
) -> None:
    folder = write_columns(tmp_path / "pets", *columns)
    refuse(lambda: hub(folder, image_column=named), sentence)


@pytest.mark.parametrize(
    ("columns", "keys", "classes", "values"),
    [
        (["label"], {}, CLASSES, LABELS),
        (["label", "number"], {}, CLASSES, LABELS),
        (["label", "coarse"], {"label_column": "coarse"}, ("fish", "mammal"), [1, 1, 0, 0, 1, 1]),
        (["label", "number"], {"label_column": "number"}, None, [3, 0, 1, 2, 4, 200]),
        (["number"], {"label_column": "number", "classes": list("abcde")}, tuple("abcde"), [3, 0, 1, 2, 4, 200]),
        (["name"], {"label_column": "name"}, CLASSES, [1, 0, 0, 2, 1, 1]),
        (["long_name"], {"label_column": "long_name"}, CLASSES, [1, 0, 0, 2, 1, 1]),
        (
            ["name"],
            {"label_column": "name", "classes": ["eel", "fox", "dog", "cat"]},
            ("eel", "fox", "dog", "cat"),
            [2, 3, 3, 0, 2, 2],
        ),
    ],
)
def test_label_column(
    tmp_path: Path, columns: Sequence[str], keys: dict[str, Any], classes: Sequence[str] | None, values: list[int]
) -> None:
    source = hub(write_columns(tmp_path / "pets", "image", *columns), **keys)
    assert source.classes == classes
    assert labels(source) == {"train": values}


@pytest.mark.parametrize(
    ("columns", "keys", "sentence"),
    [
        (["number", "name"], {}, r"^source\.label_column: no column is a ClassLabel; .*\(the columns are image, numb"),
        (["label", "coarse"], {}, r"^source\.label_column: there are several .*\(label, coarse\); name one"),
        (["label"], {"label_column": "labels"}, r"^source\.label_column: there is no column labels; the columns are"),
        (["score"], {"label_column": "score"}, r"^source\.label_column: score holds float; labels are integers or st"),
        (["flag"], {"label_column": "flag"}, r"^source\.label_column: flag holds bool; labels are integers or strings"),
        (["label"], {"label_column": "image"}, r"^source\.label_column: image holds struct.*; labels are integers or"),
        (["below"], {"label_column": "below"}, r"split train has a label -2; labels are 0 or more"),
        (["label"], {"classes": ["a", "b", "c"]}, r"^source\.classes: the source names its classes itself"),
        (
            ["name"],
            {"label_column": "name", "classes": ["cat", "dog"]},
            r"^source\.classes: the label 'eel' in column name is not among them",
        ),
    ],
)
def test_label_column_that_cannot_be_used(
    tmp_path: Path, columns: Sequence[str], keys: dict[str, Any], sentence: str
) -> None:
    folder = write_columns(tmp_path / "pets", "image", *columns)
    refuse(lambda: hub(folder, **keys), sentence)


@pytest.mark.parametrize(
    ("column", "named", "values", "classes"),
    [
        ("holes", True, [0, -1, 2, -1, 1, 0], None),
        ("name_holes", True, [1, -1, 0, 0, 1, -1], ("cat", "dog")),
        ("class_holes", False, [0, -1, -1, 2, 1, 0], CLASSES),
    ],
)
def test_null_and_minus_one_are_unlabelled(
    tmp_path: Path, column: str, named: bool, values: list[int], classes: Sequence[str] | None
) -> None:
    folder = write_columns(tmp_path / "pets", "image", column)
    keys: dict[str, Any] = {"label_column": column} if named else {}
    source = hub(folder, need_labels=False, **keys)
    assert labels(source) == {"train": values}
    assert source.classes == classes
    refuse(lambda: hub(folder, **keys), r"split train has 2 unlabelled rows.*attack\.label=prediction")


def test_no_label_column_is_needed_to_attack_predictions(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "pets", "image", "number")
    source = hub(folder, need_labels=False)
    assert labels(source) == {"train": [-1] * 6}
    assert source.classes is None


def test_kept_columns_are_unchanged_and_typed(tmp_path: Path) -> None:
    kept: dict[str, Any] = {
        "id": datasets.Value("int16"),
        "score": datasets.Value("float32"),
        "tags": datasets.List(TEXT),
        "box": {"x": datasets.Value("uint8"), "note": TEXT},
        "size": datasets.ClassLabel(names=["big", "small"]),
        "thumb": datasets.Image(),
    }
    rows: dict[str, list[Any]] = {
        "id": [7, None, 9],
        "score": [0.1, 0.25, None],
        "tags": [["a", "b"], [], None],
        "box": [{"x": 1, "note": "left"}, None, {"x": 255, "note": None}],
        "size": [1, 0, None],
        # A broken image among the kept columns is carried like any other bytes.
        "thumb": [{"bytes": SHADES[0], "path": "a.png"}, {"bytes": b"broken", "path": None}, None],
    }
    folder = write_rows(
        tmp_path / "pets",
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES)), **kept},
        {"image": CELLS[:3], "label": [0, 1, 2], **rows},
    )
    names = list(reversed(kept))
    source = hub(folder, image_column="image", label_column="label", keep_columns=names)
    assert source.kept == {name: datasets.Features(kept)[name] for name in names}
    assert list(source.kept) == names
    table = tables_of(source)["train"].select(names).take([2, 0])
    assert table.column_names == names
    assert table.schema.equals(datasets.Features(source.kept).arrow_schema)
    written = pq.read_table(folder).select(names).take([2, 0])
    assert table.to_pydict() == written.to_pydict()


def test_kept_column_that_is_not_there(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "pets", "image", "label")
    refuse(lambda: hub(folder, keep_columns=["id"]), r"^source\.keep_columns: there is no column id; the columns are i")


def test_images_stay_undecoded_when_opened(tmp_path: Path) -> None:
    cut_short = png_bytes(random_pixels(1)[0])[:300]
    folder = write_parquet(tmp_path / "pets", [SHADES[1], b"broken", cut_short, b"", None], [0, 1, 2, 0, 1])
    source = hub(folder)
    assert labels(source) == {"test": [0, 1, 2, 0, 1]}
    openers = openers_of(source, "test")
    assert read_image(openers[0], PreprocessConfig(), 10**6).shape == (3, 4, 4)
    for opener in openers[1:]:
        with pytest.raises(UndecodableError):
            read_image(opener, PreprocessConfig(), 10**6)
    with pytest.raises(UndecodableError, match="the row has no image"):
        openers[4]()


IMAGE_ONLY = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}


def write_paths(folder: Path, paths: Sequence[str | None]) -> Path:
    """A dataset whose images are paths."""
    cells = [{"bytes": None, "path": path} for path in paths]
    return write_rows(folder, IMAGE_ONLY, {"image": cells, "label": [0] * len(paths)})


def test_paths_open_below_the_sources_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    (folder / "files").mkdir(parents=True)
    for name in ("files/a.png", "files/..b.png"):
        (folder / name).write_bytes(SHADES[3])
    paths = ["files/a.png", "./files/../files/a.png", str(folder / "files" / "a.png"), "files/..b.png"]
    write_paths(folder, paths)
    assert first_values(hub(folder), next(iter(hub(folder).splits))) == [30] * 4


@pytest.mark.parametrize(
    "path",
    ["/etc/hostname", "../outside.png", "files/../../outside.png", "{outside}", "link.png", "links/outside.png", None],
)
def test_paths_that_lead_out_of_the_folder_do_not_open(tmp_path: Path, path: str | None) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(SHADES[3])
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    (folder / "links").symlink_to(tmp_path)
    write_paths(folder, [path and path.format(outside=outside)])
    (opener,) = openers_of(hub(folder), "train")
    with pytest.raises(UndecodableError, match="out of the source's own folder" if path else "the row has no image"):
        opener()


def test_local_folder_of_images(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"cat": [10], "dog": [20, 30]})
    source = hub(root)
    assert source.classes == ("cat", "dog")
    assert labels(source) == {"train": [0, 1, 1]}
    assert first_values(source, next(iter(source.splits))) == [10, 20, 30]


def test_images_that_metadata_does_not_name_are_counted(tmp_path: Path) -> None:
    for name in ("0.png", "1.avif", "2.png"):
        put_image(tmp_path / "train" / name, None)
    rows = {"file_name": ["0.png", "1.avif"], "kind": ["cat", "dog"]}
    pq.write_table(pa.table(rows), tmp_path / "train/metadata.parquet")
    (tmp_path / "empty").mkdir()
    source = hub(tmp_path, label_column="kind")
    assert names(source) == {"train": ["train/0.png", "train/1.avif"]}
    assert left_out(source) == [(1, ("empty",)), (1, ("train/2.png",))]


def test_what_a_folder_holds_beside_its_data_is_counted(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "pets", SHADES, LABELS)
    (folder / "README.md").write_text("# Pets")
    for name in ("notes.txt", ".gitattributes"):
        (folder / name).touch()
    (folder / "other").symlink_to(tmp_path)
    source = hub(folder)
    assert labels(source) == {"test": LABELS}
    assert left_out(source) == [(1, (".gitattributes",)), (1, ("notes.txt",)), (1, ("other",))]


def test_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "pets", SHADES, LABELS)
    digest = hub(folder).digest
    moved = folder.rename(tmp_path / "moved")
    assert hub(moved).digest == digest
    copied = tmp_path / "copied"
    shutil.copytree(moved, copied)
    assert hub(copied).digest == digest
    pets().save_to_disk(str(tmp_path / "saved"))
    pets().save_to_disk(str(tmp_path / "saved again"))
    assert hub(tmp_path / "saved").digest == hub(tmp_path / "saved again").digest
    digests = {
        digest,
        hub(write_parquet(moved, [*SHADES[:5], shade(99)], LABELS)).digest,
        hub(write_parquet(moved, SHADES, [1, *LABELS[1:]])).digest,
        hub(write_parquet(moved, SHADES[:5], LABELS[:5])).digest,
        hub(write_parquet(moved, SHADES[::-1], LABELS)).digest,
    }
    assert len(digests) == 5


def test_a_digest_is_not_taken_of_a_disk_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would stand in the run id, and every later run would be refused as one of another source.
    def failing(*_: object) -> Image.Image:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(TorchvisionSource, "open", failing)
    with pytest.raises(PipelineError, match="Input/output error"):
        vision("FakeData", kwargs={"size": 3, "image_size": (3, 4, 4), "num_classes": 3})


def test_digest_follows_the_content_of_image_files(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"cat": [10], "dog": [20, 30]})
    digest = hub(root).digest
    moved = root.rename(tmp_path / "moved")
    assert hub(moved).digest == digest
    (moved / "dog" / "1.png").write_bytes(shade(200))
    assert hub(moved).digest != digest


def test_digest_follows_the_content_of_kept_columns(tmp_path: Path) -> None:
    digests = set()
    for number in (7, 8):
        folder = write_parquet(tmp_path / "pets", SHADES[:2], [0, 1], id=(INT, [3, number]))
        digests |= {hub(folder).digest, hub(folder, keep_columns=["id"]).digest}
    # Without keep_columns the column is none of the run's content.
    assert len(digests) == 3


CARD = """---
configs:
- config_name: default
  data_files:
  - split: test
    path: "*.parquet"
---
# Pets
"""


@pytest.mark.parametrize("card", [None, CARD])
def test_folder_rewritten_in_place_gives_its_new_rows(tmp_path: Path, card: str | None) -> None:
    # `datasets` may key its cache of a local folder by its path alone.
    folder = write_parquet(tmp_path / "pets", SHADES[:3], [0, 1, 2])
    if card is not None:
        (folder / "README.md").write_text(card)
    assert first_values(hub(folder), next(iter(hub(folder).splits))) == [0, 10, 20]
    write_parquet(folder, SHADES[3:], [2, 1, 0])
    source = hub(folder)
    assert labels(source) == {"test": [2, 1, 0]}
    assert first_values(source, next(iter(source.splits))) == [30, 40, 50]


def test_subsets_of_a_card_are_chosen_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    write_parquet(folder / "small", SHADES[:2], [0, 1])
    write_parquet(folder / "large", SHADES[2:], [2, 1, 0, 2])
    card = {name: f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large")}
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(card.values())}---\n")
    assert [*labels(hub(folder, name="large")).values()] == [[2, 1, 0, 2]]
    refuse(lambda: hub(folder), r"^source\.path: .* cannot be opened: .*[Cc]onfig")


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_empty_dataset(tmp_path: Path, form: str) -> None:
    empty = pets().select([])
    if form == "parquet":
        empty.to_parquet(str(tmp_path / "pets" / "train-00000-of-00001.parquet"))
    else:
        empty.save_to_disk(str(tmp_path / "pets"))
    refuse(lambda: hub(tmp_path / "pets"), r"^source.*(is empty|no data|no rows)")


def test_one_empty_split_among_others(tmp_path: Path) -> None:
    # A table with no rows still has its file.
    datasets.DatasetDict(train=pets(), test=pets().filter(lambda row: row["label"] > 9)).save_to_disk(
        str(tmp_path / "pets")
    )
    assert labels(hub(tmp_path / "pets", split="train")) == {"train": LABELS}
    refuse(lambda: hub(tmp_path / "pets", split=["train", "test"]), r"^source.*(test is empty|no data|no rows)")


@pytest.mark.parametrize("path", ["{folder}/gone", "./gone", "~/not/there/at/all", "a/b/c"])
def test_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(lambda: hub(path.format(folder=tmp_path)), r"^source\.path: there is no folder .*(gone|all|c)\.$")


def test_folder_without_data(tmp_path: Path) -> None:
    refuse(lambda: hub(tmp_path), r"^source\.path: .* cannot be opened: .*any data files")


def test_broken_parquet_file_is_said_to_be_broken(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "pets", SHADES, LABELS)
    whole = next(folder.glob("*.parquet"))
    cut_short = folder / "test-00001-of-00002.parquet"
    cut_short.write_bytes(whole.read_bytes()[:-20])
    whole.rename(folder / "test-00000-of-00002.parquet")
    refuse(lambda: hub(folder), r"^source\.path: .* cannot be opened: .*([Pp]arquet|corrupt)")


# ----------------------------------------------------------------------------------------- torchvision


def write_idx(path: Path, values: Any) -> None:
    """MNIST's own format: a magic number with the number of dimensions, their sizes, the bytes."""
    array = np.asarray(values, dtype=np.uint8)
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, train: Sequence[int] = (3, 1, 2), test: Sequence[int] = (9, 0)) -> Path:
    """MNIST as torchvision finds it; the shade of an image is ten times its class."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, digits in (("train", train), ("t10k", test)):
        write_idx(folder / f"{stem}-labels-idx1-ubyte", digits)
        write_idx(folder / f"{stem}-images-idx3-ubyte", [np.full((28, 28), 10 * digit) for digit in digits])
    return root


def test_torchvision_dataset(tmp_path: Path) -> None:
    root = write_mnist(tmp_path / "data")
    source = vision("MNIST", split=["train", "test"], kwargs={"root": str(root)})
    assert source.classes == tuple(torchvision.datasets.MNIST.classes)
    assert labels(source) == {"train": [3, 1, 2], "test": [9, 0]}
    assert next(iter(source.labels.values())).dtype == np.int64
    assert [first_values(source, split) for split in source.splits] == [[30, 10, 20], [90, 0]]
    assert labels(vision("MNIST", kwargs={"root": str(root)})) == {"train": [3, 1, 2]}


def test_torchvision_digest(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"split": "test"}
    first = vision("MNIST", kwargs={"root": str(write_mnist(tmp_path / "a"))}, **keys)
    moved = vision("MNIST", kwargs={"root": str(write_mnist(tmp_path / "b")), "download": False}, **keys)
    other = vision("MNIST", kwargs={"root": str(write_mnist(tmp_path / "c", test=(9, 1)))}, **keys)
    images = tmp_path / "c" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    write_idx(images, np.zeros((2, 28, 28)))
    repainted = vision("MNIST", kwargs={"root": str(tmp_path / "c")}, **keys)
    assert first.digest == moved.digest
    assert len({first.digest, other.digest, repainted.digest}) == 3


def test_torchvision_dataset_without_a_list_of_labels() -> None:
    kwargs = {"size": 8, "image_size": [3, 5, 7], "num_classes": 4}
    made = torchvision.datasets.FakeData(size=8, image_size=(3, 5, 7), num_classes=4)
    source = vision("FakeData", kwargs=kwargs)
    assert source.classes is None
    assert labels(source) == {"train": [made[row][1] for row in range(8)]}
    image = read_image(openers_of(source, "train")[3], PreprocessConfig(), 10**6)
    assert image.permute(1, 2, 0).numpy().tobytes() == np.asarray(made[3][0]).tobytes()
    assert vision("FakeData", kwargs=kwargs, classes=list("abcd")).classes == tuple("abcd")


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        ("CIFAR", {}, r"^source\.path: torchvision has no dataset class CIFAR"),
        ("utils", {}, r"^source\.path: torchvision has no dataset class utils"),
        ("DataLoader", {}, r"^source\.path: torchvision has no dataset class DataLoader"),
        ("wrap_dataset_for_transforms_v2", {}, r"^source\.path: torchvision has no dataset class wrap_dataset"),
        ("MNIST", {"kwargs": {"root": "{root}", "train": False}}, r"^source\.kwargs\.train: name the split with sour"),
        ("SVHN", {"kwargs": {"root": "{root}", "split": "test"}}, r"^source\.kwargs\.split: name the split with sour"),
        ("MNIST", {"split": "validation"}, r"^source\.split: there is no split validation; the source has train, t"),
        ("FakeData", {"split": "test"}, r"^source\.split: there is no split test; the source has train"),
        ("MNIST", {"kwargs": {"root": "{root}/gone"}}, r"torchvision's MNIST cannot be opened: .*download=True"),
        ("MNIST", {}, r"torchvision's MNIST cannot be opened: .*'root'"),
        ("FakeData", {"kwargs": {"sizes": 3}}, r"torchvision's FakeData cannot be opened: .*'sizes'"),
        (
            "SVHN",
            {"split": "validation", "kwargs": {"root": "x"}},
            r"torchvision's SVHN cannot be opened: .*validation",
        ),
        ("FakeData", {"kwargs": {"size": 0}}, r"split train is empty"),
        (
            "FakeData",
            {"kwargs": {"size": 3, "image_size": [3, 4, 4], "target_transform": lambda digit: digit / 2}},
            r"^source\.path: FakeData does not give one class for each image",
        ),
        ("MNIST", {"kwargs": {"root": "{root}"}, "classes": list("0123456789")}, r"^source\.classes: the source names"),
    ],
)
def test_torchvision_dataset_that_cannot_be_used(
    tmp_path: Path, name: str, keys: dict[str, Any], sentence: str
) -> None:
    root = write_mnist(tmp_path / "data")
    kwargs = {
        key: value.format(root=root) if isinstance(value, str) else value
        for key, value in keys.get("kwargs", {}).items()
    }
    refuse(lambda: vision(name, **{**keys, "kwargs": kwargs}), sentence)


# ------------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("kind", ["digits", "imagefolder", "huggingface", "torchvision"])
def test_any_rows_are_read_by_their_numbers(tmp_path: Path, kind: str) -> None:
    source = {
        "digits": lambda: open_kind("digits", split="test"),
        "imagefolder": lambda: folders(write_folders(tmp_path / "pets", {"cat": [10, 30], "dog": [20]})),
        "huggingface": lambda: hub(write_columns(tmp_path / "hub", "image", "label", "name"), keep_columns=["name"]),
        "torchvision": lambda: vision("MNIST", kwargs={"root": str(write_mnist(tmp_path / "data"))}),
    }[kind]()
    (split,) = source.splits
    plan = Plan({split: np.array([2, 0, 1])}, (Shard(split, 0, 2, 0, 1), Shard(split, 1, 2, 1, 3)), 2)
    found = [table for _, table, _ in source.tables(plan, plan.shards)]
    assert [table.num_rows for table in found] == [1, 2]
    whole = tables_of(source)[split].take([2, 0, 1])
    assert pa.concat_tables(found).rename_columns(whole.column_names).equals(whole)
    sampled = list(source.sample(plan, plan.shards, 2))
    assert [(row.shard.index, row.number) for row in sampled] == [(0, 2), (1, 1)]
    assert [row.cell for row in sampled] == whole["image"].take([0, 2]).to_pylist()
    assert [row.label for row in sampled] == whole["label"].take([0, 2]).to_pylist()


def test_a_torchvision_dataset_whose_library_is_missing_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    config = TorchvisionConfig(kind="torchvision", path="PCAM", kwargs={"root": str(tmp_path)}, split=("train",))
    with pytest.raises(ConfigError, match="torchvision's PCAM cannot be opened"):
        open_source(config, need_labels=True)
