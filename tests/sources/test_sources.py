"""Sources: digits, torchvision's, and what all kinds have in common."""

import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torchvision

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import ConfigError
from pipeline.core.plan import Plan, Shard
from pipeline.engine.decode import read_image
from pipeline.sources.digits import digits_split
from pipeline.sources.registry import open_source
from pipeline.sources.torchvision import TorchvisionConfig
from tests.support.sources import (
    first_values,
    folders,
    hub,
    labels,
    open_kind,
    openers_of,
    refuse,
    tables_of,
    vision,
    write_columns,
    write_folders,
)


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
    refuse(lambda: open_kind("digits", split="validation"), r"^source\.split: .*validation; .*train, test")


# --------------------------------------------------------------------------------------------------------- torchvision


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
    ("name", "keys", "named"),
    [
        ("CIFAR", {}, r"^source\.path: .* CIFAR; "),
        ("utils", {}, r"^source\.path: .* utils; "),
        ("DataLoader", {}, r"^source\.path: .* DataLoader; "),
        ("wrap_dataset_for_transforms_v2", {}, r"^source\.path: .* wrap_dataset_for_transforms_v2; "),
        ("MNIST", {"kwargs": {"root": "{root}", "train": False}}, r"^source\.kwargs\.train: .*source\.split\b"),
        ("SVHN", {"kwargs": {"root": "{root}", "split": "test"}}, r"^source\.kwargs\.split: .*source\.split\b"),
        ("MNIST", {"split": "validation"}, r"^source\.split: .* validation; .* train, test\b"),
        ("FakeData", {"split": "test"}, r"^source\.split: .* test; .* train\b"),
        ("MNIST", {"kwargs": {"root": "{root}/gone"}}, r"^source: .*MNIST .*download=True"),
        ("MNIST", {}, r"^source: .*MNIST .*'root'"),
        ("FakeData", {"kwargs": {"sizes": 3}}, r"^source: .*FakeData .*'sizes'"),
        ("SVHN", {"split": "validation", "kwargs": {"root": "x"}}, r"^source: .*SVHN .*validation"),
        ("FakeData", {"kwargs": {"size": 0}}, r"^source: .*\btrain\b.*empty"),
        (
            "FakeData",
            {"kwargs": {"size": 3, "image_size": [3, 4, 4], "target_transform": lambda digit: digit / 2}},
            r"^source\.path: FakeData ",
        ),
        ("MNIST", {"kwargs": {"root": "{root}"}, "classes": list("0123456789")}, r"^source\.classes: "),
    ],
)
def test_torchvision_dataset_that_cannot_be_used(tmp_path: Path, name: str, keys: dict[str, Any], named: str) -> None:
    root = write_mnist(tmp_path / "data")
    kwargs = {
        key: value.format(root=root) if isinstance(value, str) else value
        for key, value in keys.get("kwargs", {}).items()
    }
    refuse(lambda: vision(name, **{**keys, "kwargs": kwargs}), named)


# ----------------------------------------------------------------------------------------------------------- all kinds


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
    with pytest.raises(ConfigError, match=r"^source: .*PCAM .*h5py"):
        open_source(config, need_labels=True)
