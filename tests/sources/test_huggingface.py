"""Datasets as `datasets` opens them: columns, splits, paths, digests."""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import PipelineError
from pipeline.core.images import UndecodableError
from pipeline.engine.decode import read_image
from pipeline.sources.torchvision import TorchvisionSource
from tests.conftest import CLASSES, png_bytes, random_pixels, write_parquet
from tests.support.sources import (
    CELLS,
    INT,
    LABELS,
    SHADES,
    TEXT,
    first_values,
    hub,
    labels,
    left_out,
    names,
    openers_of,
    pets,
    put_image,
    refuse,
    shade,
    tables_of,
    vision,
    write_columns,
    write_folders,
    write_rows,
)


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
    refuse(lambda: hub(folder), r"^source\.split: .*: (train, test|test, train)")
    refuse(lambda: hub(folder, split=["train", "validation"]), r"^source\.split: .* validation; .*train")


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
        (["label", "number"], None, r"^source\.image_column: .*label, number\b"),
        (["cell", "label"], None, r"^source\.image_column: .*cell, label\b"),
        (["image", "depth", "label"], None, r"^source\.image_column: .*\(image, depth\)"),
        (["image", "label"], "img", r"^source\.image_column: .* img; .*image, label\b"),
        (["image", "label"], "label", r"^source\.image_column: label "),
        (["image", "label", "score"], "score", r"^source\.image_column: score "),
        (["image", "label", "flag"], "flag", r"^source\.image_column: flag "),
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
        (["number", "name"], {}, r"^source\.label_column: .*ClassLabel; .*image, number, name\b"),
        (["label", "coarse"], {}, r"^source\.label_column: .*\(label, coarse\)"),
        (["label"], {"label_column": "labels"}, r"^source\.label_column: .* labels; .*image, label\b"),
        (["score"], {"label_column": "score"}, r"^source\.label_column: score .*float\b"),
        (["flag"], {"label_column": "flag"}, r"^source\.label_column: flag .*bool\b"),
        (["label"], {"label_column": "image"}, r"^source\.label_column: image .*struct\b"),
        (["below"], {"label_column": "below"}, r"^source: .*\btrain .* -2\b"),
        (["label"], {"classes": ["a", "b", "c"]}, r"^source\.classes: "),
        (
            ["name"],
            {"label_column": "name", "classes": ["cat", "dog"]},
            r"^source\.classes: .*'eel' .*\bname\b",
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
    refuse(lambda: hub(folder, **keys), r"^source: .*\btrain .* 2 .*attack\.label=prediction")


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
    refuse(lambda: hub(folder, keep_columns=["id"]), r"^source\.keep_columns: .* id; .*image, label\b")


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
    with pytest.raises(UndecodableError, match="no image"):
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
    with pytest.raises(UndecodableError, match="folder" if path else "no image"):
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
    with pytest.raises(PipelineError, match=os.strerror(errno.EIO)):
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
    refuse(lambda: hub(folder), r"^source\.path: .*[Cc]onfig")


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_empty_dataset(tmp_path: Path, form: str) -> None:
    empty = pets().select([])
    if form == "parquet":
        empty.to_parquet(str(tmp_path / "pets" / "train-00000-of-00001.parquet"))
    else:
        empty.save_to_disk(str(tmp_path / "pets"))
    refuse(lambda: hub(tmp_path / "pets"), r"^source\b.*(empty|no data|no rows)")


def test_one_empty_split_among_others(tmp_path: Path) -> None:
    # A table with no rows still has its file.
    datasets.DatasetDict(train=pets(), test=pets().filter(lambda row: row["label"] > 9)).save_to_disk(
        str(tmp_path / "pets")
    )
    assert labels(hub(tmp_path / "pets", split="train")) == {"train": LABELS}
    refuse(lambda: hub(tmp_path / "pets", split=["train", "test"]), r"^source\b.*(test\b.*empty|no data|no rows)")


@pytest.mark.parametrize("path", ["{folder}/gone", "./gone", "~/not/there/at/all", "a/b/c"])
def test_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(lambda: hub(path.format(folder=tmp_path)), r"^source\.path: .*(gone|/at/all|a/b/c)\.$")


def test_folder_without_data(tmp_path: Path) -> None:
    refuse(lambda: hub(tmp_path), rf"^source\.path: {tmp_path} ")


def test_broken_parquet_file_is_said_to_be_broken(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "pets", SHADES, LABELS)
    whole = next(folder.glob("*.parquet"))
    cut_short = folder / "test-00001-of-00002.parquet"
    cut_short.write_bytes(whole.read_bytes()[:-20])
    whole.rename(folder / "test-00000-of-00002.parquet")
    refuse(lambda: hub(folder), r"^source\.path: .*/pets .*([Pp]arquet|corrupt)")
