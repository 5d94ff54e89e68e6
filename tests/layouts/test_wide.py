"""Layout wide: one row per source image has the image at every epsilon side by side, and none goes unchecked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.core.images import decode_image, encode_images
from tests.conftest import WriteConfig, fgsm, generate_once, pixels, rows, shard_path
from tests.support.forgery import SHARD, another_mistake, assert_found, forge

FILE = f"wide/{SHARD}.parquet"
Columns = dict[str, list[Any]]


@pytest.fixture
def out(write_config: WriteConfig, tmp_path: Path) -> Path:
    generate_once(write_config(output={"layout": "wide"}))
    return tmp_path / "out"


def test_it_loads_with_nothing_of_ours(out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == [".run", "README.md", "manifest.json", "wide"]
    (front, body) = (out / "README.md").read_text().split("---\n", 2)[1:]
    (only,) = yaml.safe_load(front)["configs"]
    assert (only["config_name"], only["default"]) == ("wide", True)
    assert 'clean, attacked = row["image"], row["eps_8"]' in body
    row = datasets.load_dataset(str(out), split="test", streaming=True).take(1)
    assert [cell["image"].size for cell in row] == [(16, 16)]


def test_images_at_all_epsilons_lie_side_by_side(out: Path) -> None:
    frame = rows(out, "wide")
    clean = pixels(frame)
    for level in (2, 8):
        attacked = np.stack([decode_image(cell["bytes"]).numpy() for cell in frame[f"eps_{level}"]]).astype(np.int16)
        assert set(np.unique(abs(attacked - clean))) <= set(range(level + 1))
        assert abs(attacked - clean).max() == level


def test_pictures_are_stored_plain_and_the_rest_compressed(out: Path) -> None:
    group = pq.ParquetFile(shard_path(out, FILE)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for name in ("image.bytes", "eps_2.bytes", "eps_8.bytes"):
        assert columns[name].compression == "UNCOMPRESSED"
        assert not columns[name].has_dictionary_page
    assert columns["attacks.list.element.prediction"].compression == "SNAPPY"


def exchange_images(columns: Columns) -> None:
    columns["eps_2"][3], columns["eps_2"][4] = columns["eps_2"][4], columns["eps_2"][3]


def turn_a_value(columns: Columns) -> None:
    picture, clean = (decode_image(columns[name][4]["bytes"]).int() for name in ("eps_2", "image"))
    place = ((picture - clean).abs() == 2) & (clean > 2) & (clean < 253)
    picture[place] = (2 * clean - picture)[place]
    columns["eps_2"][4]["bytes"] = encode_images(picture.byte()[None], "webp")[0]


def break_an_image(columns: Columns) -> None:
    columns["eps_2"][4]["bytes"] = b"no image"


def lose_an_attack(columns: Columns) -> None:
    columns["attacks"][4].pop()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (exchange_images, f"{FILE} at 2/255 .*2 images .* ball of 2/255"),
        (turn_a_value, f"{FILE} .*1 images .*clean"),
        (break_an_image, f"{FILE} .*broken"),
        (lose_an_attack, rf"{FILE}: .*attacks .* 2\b"),
    ],
)
def test_forged_rows_are_found_without_the_victim(out: Path, edit: Callable[[Columns], None], named: str) -> None:
    forge(out, edit, FILE)
    assert_found(named, out)


def test_recompute_finds_a_prediction_that_the_pixels_do_not_give(out: Path) -> None:
    def another(columns: Columns) -> None:
        predictions = [entries[1]["prediction"] for entries in columns["attacks"]]
        another_mistake(predictions, columns["label"])
        for entries, prediction in zip(columns["attacks"], predictions, strict=True):
            entries[1]["prediction"] = prediction

    forge(out, another, FILE)
    assert fgsm("verify", out).exit_code == 0
    assert_found(f"{FILE} at 8/255 .*1 predictions", out, "--recompute")
