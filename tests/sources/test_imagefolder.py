"""Folders of class folders, and all that lies in them beside images."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import PipelineError
from pipeline.engine.decode import read_image
from pipeline.sources.base import Source
from tests.conftest import CLASSES
from tests.support.sources import (
    first_values,
    folders,
    hub,
    labels,
    left_out,
    names,
    openers_of,
    put_image,
    refuse,
    write_folders,
)


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
    ("images", "split", "said"),
    [({"cat": [1]}, None, 1), ({"cat": [1]}, "test", 0), ({"train/cat": [1]}, None, 0), ({"test/cat": [1]}, "test", 0)],
)
def test_what_the_images_of_an_unsplit_folder_are_called_is_said_unless_the_config_says_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, images: dict[str, Sequence[int]], split: Any, said: int
) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        source = folders(write_folders(tmp_path / "pets", images), split=split)
    assert [*source.splits] == [split or "train"]
    assert sum("source.split" in record.getMessage() for record in caplog.records) == said


@pytest.mark.parametrize(
    ("images", "split", "sentence"),
    [
        ({}, None, r"^source\.path: .*/pets "),
        ({"cat": [1], "dog": []}, None, r"^source\.path: .*\bdog\b"),
        ({"cat": [1], "dog": [2]}, ["train", "test"], r"^source\.split: .*train\b"),
        ({"train/cat": [1], "test/cat": [2]}, ["train", "val"], r"^source\.split: .*val\b"),
        # The split folders are no classes.
        ({"train/cat": [1], "test/cat": [2]}, "validation", r"^source\.split: .*validation"),
        ({"val/cat": [1], "test/cat": [2]}, None, r"^source\.split: "),
        (
            {"train/cat": [1], "train/dog": [1], "test/cat": [2]},
            ["train", "test"],
            r"^source\.path: .*\bsplit test\b",
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
    refuse(lambda: folders(tmp_path / "gone"), r"^source\.path: .*/gone\.$")
    (tmp_path / "file").touch()
    refuse(lambda: folders(tmp_path / "file"), r"^source\.path: .*/file\.$")


def test_a_file_of_an_imagefolder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"cat": [10], "dog": [20]})
    (root / "cat/1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(PipelineError, match=rf"^source: .*{os.strerror(errno.ENOENT)}.*/pets/cat/1\.png'"):
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
    refuse(lambda: folders(tmp_path), rf"^source\.path: {link}.* (cat|dog)\b")


def test_a_link_to_an_image_of_another_class_is_refused_of_datasets_too(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/0.png"):
        put_image(tmp_path / name)
    (tmp_path / "dog/1.png").symlink_to("0.png")
    assert names(hub(tmp_path)) == {"train": ["cat/0.png", "dog/0.png"]}
    (tmp_path / "dog/2.png").symlink_to("../cat/0.png")
    refuse(lambda: hub(tmp_path), r"^source\.path: .*dog/2\.png .*cat/0\.png")


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
    with pytest.raises(PipelineError, match=r"^source: .*/folders/eel\b"):
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
    refuse(lambda: folders(tmp_path), rf"^source\.path: {re.escape(str(tmp_path))} ")
    refuse(lambda: hub(tmp_path), r"^source\.path: .*xe.*UTF-8")
