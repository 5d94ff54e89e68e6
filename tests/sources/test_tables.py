"""Tables as sources: files of one dataset that disagree, columns of odd types, and paths that look like patterns."""

import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import ConfigError
from pipeline.sources.base import Source
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.registry import open_source
from tests.conftest import CLASSES, WriteConfig, fgsm, generate, png_bytes, random_pixels, rows
from tests.support.sources import tables_of

IMAGES = [png_bytes(pixels) for pixels in random_pixels(3)]
CELLS = pa.array([{"bytes": image, "path": None} for image in IMAGES], datasets.Image().pa_type)
NAMED: dict[str, Any] = {"image_column": "image", "label_column": "label"}
BOTH = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` logs what it could not read, besides raising it."""
    monkeypatch.setattr(logging.getLogger("datasets"), "level", logging.CRITICAL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tables"
    path.mkdir()
    return path


def opened(path: Path, streaming: bool, *, need_labels: bool = True, **keys: Any) -> Source:
    config = HuggingFaceConfig(kind="huggingface", path=str(path), streaming=streaming, **keys)
    return open_source(config, need_labels=need_labels)


def table_of(source: Source) -> pa.Table:
    """All rows: the bytes of each image, its label, kept columns."""
    return pa.concat_tables(tables_of(source).values())


def assert_reads(path: Path, streaming: bool, labels: list[int], **keys: Any) -> pa.Table:
    table = table_of(opened(path, streaming, **keys))
    assert table["label"].to_pylist() == labels
    assert [cell["bytes"] for cell in table["image"].to_pylist()] == IMAGES * (len(labels) // 3)
    return table


Write = Callable[[Path], None]


def classes(names: list[str]) -> Write:
    """A file whose labels are cat, dog and eel, whatever their numbers are."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    numbers = [names.index(name) for name in CLASSES]

    def write(path: Path) -> None:
        pq.write_table(pa.table({"image": CELLS, "label": numbers}, schema=features.arrow_schema), path)

    return write


def columns(**more: Any) -> Write:
    """A file without metadata of `datasets`, of images and labels unless something else is given."""
    table = pa.table({"image": CELLS, "label": [0, 1, 2]} | more)
    return lambda path: pq.write_table(table, path)


SOUND, PLAIN = classes(list(CLASSES)), columns()
DISAGREE: dict[str, tuple[Write, Write]] = {
    "classes in another order": (SOUND, classes([*CLASSES[::-1]])),
    "more classes": (SOUND, classes([*CLASSES, "fox"])),
    "classes and integers": (SOUND, PLAIN),
    "integers and classes": (PLAIN, SOUND),
    "classes and strings": (SOUND, columns(label=list(CLASSES))),
    "integers and strings": (PLAIN, columns(label=list(CLASSES))),
    "integers and fractions": (PLAIN, columns(label=[0.0, 1.0, 2.0])),
    "no labels": (PLAIN, lambda path: pq.write_table(pa.table({"image": CELLS}), path)),
    "bytes and structs": (columns(image=pa.array(IMAGES)), PLAIN),
    "kept numbers of two types": (columns(more=[1, 2, 3]), columns(more=[0.5, 1.5, 2.5])),
    "kept classes in another order": (
        lambda path: classes([*CLASSES])(path),
        lambda path: classes([*CLASSES[::-1]])(path),
    ),
}


@BOTH
@pytest.mark.parametrize("splits", [("train-00000-of-00002", "train-00001-of-00002"), ("train", "test")])
@pytest.mark.parametrize("how", DISAGREE)
def test_files_that_disagree_are_both_named(folder: Path, streaming: bool, splits: tuple[str, str], how: str) -> None:
    for name, write in zip(splits, DISAGREE[how], strict=True):
        write(folder / f"{name}.parquet")
    keys: dict[str, Any] = {**NAMED, "split": ["train"] if "-" in splits[0] else ["train", "test"]}
    if "kept numbers" in how:
        keys["keep_columns"] = ["more"]
    if "kept classes" in how:
        keys |= {"keep_columns": ["label"], "label_column": None}
    with pytest.raises(ConfigError, match=rf"^source: column \w+ .*{splits[1]}.*{splits[0]}"):
        opened(folder, streaming, need_labels=False, **keys)


def test_arrow_files_that_disagree_are_both_named(folder: Path) -> None:
    for index, names in enumerate((CLASSES, CLASSES[::-1])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
        table = pa.table({"image": CELLS, "label": [0, 1, 2]}, schema=features.arrow_schema)
        new = (pa.ipc.new_stream, pa.ipc.new_file)[index]
        with new(folder / f"train-{index}.arrow", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ConfigError, match=r"^source: .*label .*train-1\.arrow .*train-0\.arrow"):
        opened(folder, False)


@BOTH
def test_what_nobody_asked_for_may_differ(folder: Path, streaming: bool) -> None:
    columns(more=[1, 2, 3], label=pa.array([0, 1, 2], pa.int8()))(folder / "train-0.parquet")
    columns(more=[0.5, 1.5, 2.5], another=[*"abc"])(folder / "train-1.parquet")
    PLAIN(folder / "train-2.parquet")
    assert_reads(folder, streaming, [0, 1, 2] * 3, **NAMED)


@BOTH
@pytest.mark.parametrize("write", [SOUND, PLAIN])
@pytest.mark.parametrize("empty", ["train-0.parquet", "train-2.parquet"])
def test_a_file_may_be_without_rows(folder: Path, streaming: bool, write: Write, empty: str) -> None:
    write(folder / "train-1.parquet")
    pq.write_table(pq.read_table(folder / "train-1.parquet").slice(0, 0), folder / empty)
    assert_reads(folder, streaming, [0, 1, 2], **NAMED)


@BOTH
def test_a_split_has_the_classes_of_its_own_files(folder: Path, streaming: bool) -> None:
    SOUND(folder / "train.parquet")
    classes([*CLASSES[::-1]])(folder / "test.parquet")
    source = opened(folder, streaming, split="test")
    assert source.classes == CLASSES[::-1]
    assert table_of(source)["label"].to_pylist() == [2, 1, 0]


CARD = {"features": [{"name": "image", "dtype": "image"}]}
CARD["features"].append(
    {"name": "label", "dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(CLASSES)}}}}  # type: ignore[dict-item]
)


@BOTH
def test_a_card_names_the_classes_of_files_that_name_none(folder: Path, streaming: bool) -> None:
    (folder / "README.md").write_text(f"---\ndataset_info: {json.dumps(CARD)}\n---\n")
    PLAIN(folder / "train-0.parquet")
    SOUND(folder / "train-1.parquet")
    assert opened(folder, streaming).classes == CLASSES
    assert_reads(folder, streaming, [0, 1, 2] * 2)
    classes([*CLASSES[::-1]])(folder / "train-1.parquet")
    with pytest.raises(ConfigError, match=r"^source: .*label .*train-1\.parquet .*card"):
        opened(folder, streaming)


def test_what_datasets_has_cached_is_no_card(folder: Path) -> None:
    SOUND(folder / "train-0.parquet")
    classes([*CLASSES[::-1]])(folder / "train-1.parquet")
    datasets.load_dataset(str(folder.resolve()))
    with pytest.raises(ConfigError, match=r"train-1\.parquet .*train-0\.parquet"):
        opened(folder, True)


# --------------------------------------------------------------------------------------------------- types


def struct(data: pa.Array, path: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([data, path], ["bytes", "path"])


TYPES: dict[str, dict[str, pa.Array]] = {
    "labels, dictionary of texts": {"label": pa.array(CLASSES).dictionary_encode()},
    "labels, dictionary of numbers": {"label": pa.array([0, 1, 2]).dictionary_encode()},
    "labels, view": {"label": pa.array(CLASSES, pa.string_view())},
    "labels, large": {"label": pa.array(CLASSES, pa.large_string())},
    "labels, dictionary of large texts": {"label": pa.array(CLASSES, pa.large_string()).dictionary_encode()},
    "images, view": {"image": pa.array(IMAGES, pa.binary_view())},
    "images, large": {"image": pa.array(IMAGES, pa.large_binary())},
    "images, dictionary": {"image": pa.array(IMAGES).dictionary_encode()},
    "images, struct of views": {"image": struct(pa.array(IMAGES, pa.binary_view()), pa.nulls(3, pa.string_view()))},
    "images, struct of large": {"image": struct(pa.array(IMAGES, pa.large_binary()), pa.nulls(3, pa.large_string()))},
    "images, other order": {"image": pa.StructArray.from_arrays([pa.nulls(3), pa.array(IMAGES)], ["path", "bytes"])},
}


@BOTH
@pytest.mark.parametrize("kind", TYPES)
def test_types_that_stand_for_others(folder: Path, streaming: bool, kind: str) -> None:
    columns(**TYPES[kind])(folder / "train.parquet")
    assert_reads(folder, streaming, [0, 1, 2], classes=list(CLASSES), **NAMED)


@BOTH
def test_kept_columns_of_types_that_stand_for_others(folder: Path, streaming: bool) -> None:
    kept: dict[str, pa.Array] = {
        "a": pa.array(["x", "y", "x"]).dictionary_encode(),
        "b": pa.array(["x", None, "z"], pa.string_view()),
        "c": pa.array([b"x", b"y", None], pa.binary_view()),
        "d": pa.array([7, 8, 7]).dictionary_encode(),
        "e": pa.array([["x"], [], None], pa.list_(pa.string_view())),
        "f": pa.array(["x", "y", "z"], pa.large_string()),
    }
    columns(**kept)(folder / "train.parquet")
    table = assert_reads(folder, streaming, [0, 1, 2], keep_columns=[*kept], **NAMED)
    assert table.select([*kept]).to_pydict() == {name: values.to_pylist() for name, values in kept.items()}


MAPS = pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int32()))


@BOTH
def test_columns_that_nobody_asked_for_may_be_of_any_type(folder: Path, streaming: bool) -> None:
    table = pa.table({"image": CELLS, "label": [0, 1, 2], "map": MAPS, "twice": [1, 2, 3]})
    pq.write_table(table.append_column("twice", pa.array([1, 2, 3])), folder / "train.parquet")
    assert_reads(folder, streaming, [0, 1, 2], **NAMED)
    with pytest.raises(ConfigError, match=r"^source: column map .*map<"):
        opened(folder, streaming, keep_columns=["map"], **NAMED)
    with pytest.raises(ConfigError, match=r"^source\.keep_columns: .*twice"):
        opened(folder, streaming, keep_columns=["twice"], **NAMED)


@BOTH
@pytest.mark.parametrize("metadata", ["{", "[]", '{"info": {"features": {"label": {"_type": "Hologram"}}}}'])
def test_metadata_that_cannot_be_read_says_nothing(folder: Path, streaming: bool, metadata: str) -> None:
    table = pa.table({"image": CELLS, "label": [0, 1, 2]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, folder / "train.parquet")
    assert_reads(folder, streaming, [0, 1, 2], **NAMED)


ENCODED = base64.b64encode(IMAGES[0]).decode()


@BOTH
@pytest.mark.parametrize(
    "text", [ENCODED, ENCODED * 9, f"data:image/png;base64,{ENCODED}", IMAGES[0].hex(), "https://example.org/a.png"]
)
def test_text_that_is_no_path_is_called_so_in_a_short_sentence(folder: Path, streaming: bool, text: str) -> None:
    columns(image=[text] * 3)(folder / "train.parquet")
    with pytest.raises(ConfigError, match=r"^source\.image_column: ") as error:
        opened(folder, streaming, **NAMED)
    assert len(str(error.value)) < 200


def test_a_long_path_in_a_stream_is_not_printed(write_config: WriteConfig, folder: Path) -> None:
    columns(image=struct(pa.nulls(3, pa.binary()), pa.array([f"a/{ENCODED}"] * 3)))(folder / "train.parquet")
    result = fgsm("generate", write_config(source={"path": str(folder), "streaming": True, **NAMED}))
    assert result.exit_code in (1, 2)
    assert ENCODED[:300] not in result.stderr


# --------------------------------------------------------------------------------------------------- paths


@BOTH
@pytest.mark.parametrize("name", ["a{b,c}", "a!b", "a]"])
def test_a_literal_path_is_no_pattern(tmp_path: Path, streaming: bool, name: str) -> None:
    for folder, write in ((tmp_path / "axb", classes([*CLASSES[::-1]])), (tmp_path / name, SOUND)):
        folder.mkdir()
        write(folder / "train-00000-of-00001.parquet")
    assert_reads(tmp_path / name, streaming, [0, 1, 2])
    # With a card, its patterns are those of the files within.
    (tmp_path / name / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: train-*.parquet\n---\n")
    assert_reads(tmp_path / name, streaming, [0, 1, 2])


@BOTH
@pytest.mark.parametrize("name", ["run[1]", "[x]", "a*b", "a?b", "**", "a]b[", "a::b"])
def test_a_path_that_is_a_pattern_or_an_address_to_datasets_is_refused(
    tmp_path: Path, streaming: bool, name: str
) -> None:
    for folder in ("axb", name):
        (tmp_path / folder).mkdir()
        SOUND(tmp_path / folder / "train.parquet")
    with pytest.raises(ConfigError, match=r"^source\.path: "):
        opened(tmp_path / name, streaming)


@pytest.mark.parametrize("name", ["run[1]", "a*b", "a?b", "a::b"])
def test_an_output_that_readers_take_for_a_pattern_is_refused(
    write_config: WriteConfig, tmp_path: Path, name: str
) -> None:
    result = fgsm("generate", write_config(output={"path": str(tmp_path / name / "out")}))
    assert result.exit_code == 2
    assert "output.path: " in result.stderr
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["a{b,c}", "a!b", "a]", "a b#c"])
def test_an_output_of_any_other_name_is_read(write_config: WriteConfig, tmp_path: Path, name: str) -> None:
    generate(write_config(source={"limit": 6}, output={"path": str(tmp_path / name)}))
    assert len(rows(tmp_path / name, "eps-8")) == len(
        datasets.load_dataset(str(tmp_path / name), "eps-8", split="test")
    )
