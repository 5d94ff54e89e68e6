"""Layout signs: one row per source image says what layout images says in 1 + K, and nothing in it goes unchecked."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from pipeline.config.load import load_config
from pipeline.core.images import decode_image, encode_images
from pipeline.core.sign_bits import picture_to_bits
from pipeline.engine.estimate import estimate_bytes
from pipeline.engine.run import open_run
from pipeline.layouts.registry import LAYOUTS
from tests.conftest import (
    KINDS,
    WriteConfig,
    digests,
    generate,
    generate_once,
    manifest,
    pixels,
    png_bytes,
    random_pixels,
    rows,
    shard_path,
    write_parquet,
    write_sealed,
)
from tests.conftest import fgsm_without_run as fgsm
from tests.support.forgery import SHARD, alter_a_byte_of, another_mistake, assert_found, cut_short_of, forge
from tests.support.variants import fgsm_at

FILE = f"signs/{SHARD}.parquet"
SIGNS = {"layout": "signs"}
CLEAN = ["prediction", "confidence", "label_confidence", "correct"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_what_the_rows_of_layout_images_say(write_config: WriteConfig, tmp_path: Path, kind: str) -> None:
    sections = KINDS[kind](tmp_path)
    generate_once(write_config(**sections))
    config = write_config(**{**sections, "output": SIGNS})
    generate(config, "--output", str(tmp_path / "signs"))
    signs, clean = rows(tmp_path / "signs", "signs"), rows(tmp_path / "out", "clean")
    maps = np.stack([decode_image(cell["bytes"]).numpy() for cell in signs["sign"]]).astype(np.int16)
    assert {0, 254} <= set(np.unique(maps)) <= {0, 127, 254}
    np.testing.assert_array_equal(pixels(signs), pixels(clean))
    same = [
        "label",
        "clean_prediction",
        "source_index",
        *clean.columns[list(clean.columns).index("source_index") + 1 :],
    ]
    for name in same:
        assert signs[name].to_json() == clean[name].to_json()
    for name in CLEAN:
        assert signs[f"clean_{name}"].to_json() == clean[name].to_json()
    for index, level in enumerate((2, 8)):
        attacked = rows(tmp_path / "out", f"eps-{level}")
        np.testing.assert_array_equal(pixels(attacked), np.clip(pixels(clean) + level * (maps // 127 - 1), 0, 255))
        for row, attacks in enumerate(signs["attacks"]):
            assert len(attacks) == 2
            for name in ("epsilon", "attack", "model", *CLEAN, "fooled"):
                expected = attacked[name].iloc[row]
                assert attacks[index][name] == (None if expected is None or expected != expected else expected)
        if kind == "targeted":
            np.testing.assert_array_equal(signs["target"], attacked["target"])
    assert fgsm("verify", tmp_path / "signs", "--recompute").exit_code == 0


def test_it_loads_with_nothing_of_ours(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output=SIGNS))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [".run", "README.md", "manifest.json", "signs"]
    (front, body) = (out / "README.md").read_text().split("---\n", 2)[1:]
    (only,) = yaml.safe_load(front)["configs"]
    assert (only["config_name"], only["default"]) == ("signs", True)
    assert "clip(x + 8 * (s // 127 - 1), 0, 255)" in body
    default, named = datasets.load_dataset(str(out)), datasets.load_dataset(str(out), "signs", split="test")
    assert len(default["test"]) == len(named) == 40
    assert named[0]["sign"].format == "WEBP"
    streamed = datasets.load_dataset(str(out), split="test", streaming=True)
    assert [row["attacks"] for row in streamed] == named["attacks"][:]
    query = f"select unnest(attacks, recursive := true) from '{out}/signs/*.parquet'"
    counted = duckdb.sql(f"select epsilon, count(*), sum(fooled::int) from ({query}) group by 1 order by 1")
    assert counted is not None
    fooled = [subset["fooled"] for subset in manifest(out)["subsets"]]
    assert counted.fetchall() == [(2 / 255, 40, fooled[1]), (8 / 255, 40, fooled[2])]
    assert fooled[2] > 0


def test_pictures_are_stored_plain_and_the_rest_compressed(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output=SIGNS))
    group = pq.ParquetFile(shard_path(tmp_path / "out", FILE)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for name in ("image.bytes", "sign.bytes"):
        assert columns[name].compression == "UNCOMPRESSED"
        assert "PLAIN" in columns[name].encodings
        assert not columns[name].has_dictionary_page
    assert columns["attacks.list.element.prediction"].compression == "SNAPPY"


def test_inspect_counts_epsilons_and_sizes_splits(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    images = fgsm("inspect", tmp_path / "out").stdout.splitlines()
    generate(write_config(output=SIGNS), "--overwrite")
    signs = fgsm("inspect", tmp_path / "out").stdout.splitlines()
    assert [line.split()[:7] for line in signs[:4]] == [line.split()[:7] for line in images[:4]]
    assert images[0].split()[7] == "size"
    assert [len(line.split()) for line in signs[:4]] == [7] * 4
    size = sum(path.stat().st_size for path in (tmp_path / "out/signs").iterdir())
    assert f"files: test {size / 1000:.1f} KB" in signs
    assert not any(line.startswith("files:") for line in images)


@pytest.mark.slow
def test_plan_says_what_is_written_and_it_is_less(write_config: WriteConfig, tmp_path: Path) -> None:
    epsilons = {"epsilons": ["1/255", "2/255", "4/255", "8/255"]}
    source = write_parquet(tmp_path / "large", [png_bytes(image) for image in random_pixels(24, side=64)], [0] * 24)
    sections = {"source": {"path": str(source)}, "attack": epsilons}
    written, estimated = {}, {}
    for layout in ("images", "signs", "signs-bits"):
        config = write_config(**sections, output={"layout": layout, "path": str(tmp_path / layout)})
        generate(config)
        run = open_run(load_config(str(config)))
        estimated[layout] = estimate_bytes(run, run.plan.shards)
        written[layout] = sum(path.stat().st_size for path in (tmp_path / layout).rglob("*.parquet"))
        assert 0.8 < estimated[layout] / written[layout] < 1.2
    assert written["signs"] < 0.3 * written["images"]
    assert written["signs-bits"] < 0.3 * written["images"]
    lines = dict(line.split("  ", 1) for line in fgsm("plan", config).stdout.splitlines())
    assert lines["rows"].strip() == "24"
    assert re.findall(r"\d+", lines["files"])[:2] == ["2", "2"]


def test_the_layouts_do_not_share_a_folder(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    result = fgsm("generate", write_config(output=SIGNS))
    assert result.exit_code == 2
    assert re.search('output.layout .*"images".*"signs"', result.stderr)
    generate(write_config(output=SIGNS), "--overwrite")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".run", "README.md", "manifest.json", "signs"]
    generate(write_config(), "--overwrite")
    assert not (tmp_path / "out/signs").exists()
    assert fgsm("verify", tmp_path / "out").exit_code == 0


def test_a_kept_column_may_be_called_sign_in_layout_images(write_config: WriteConfig, tmp_path: Path) -> None:
    signs = (datasets.Value("string"), ["stop", "yield"] * 2)
    source = write_parquet(tmp_path / "roads", [png_bytes(image) for image in random_pixels(4)], [0] * 4, sign=signs)
    generate_once(write_config(source={"path": str(source), "keep_columns": ["sign"]}))
    assert set(rows(tmp_path / "out", "eps-8")["sign"]) == {"stop", "yield"}


# --------------------------------------------------------------------------------------------------- verify


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_short_of, f"{FILE} has "),
        (alter_a_byte_of, f"{FILE} has sha256 "),
        (delete, f"{FILE} is missing"),
    ],
)
def test_damage_is_named_repaired_and_written_again(
    write_config: WriteConfig, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    config, out = write_config(output=SIGNS), tmp_path / "out"
    generate_once(config)
    before = digests(out)
    damage(shard_path(out, FILE))
    assert_found(named, out)
    fgsm("verify", out, "--repair")
    assert not shard_path(out, f".run/receipts/{SHARD}.json").exists()
    assert not shard_path(out, FILE).exists()
    assert "2 of 3 shards" in generate(config)
    assert digests(out) == before
    result = fgsm("verify", out, "--recompute")
    assert result.exit_code == 0
    assert re.search(r"\b3 shards .*\b40 rows\b", result.stdout)
    assert re.search(r"\b120 predictions .* 0 differ", result.stdout)


def test_foreign_files_are_named(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output=SIGNS))
    shard_path(tmp_path, "out/signs/test-00009-of-00003.parquet").write_bytes(b"would be loaded along")
    assert_found("signs/test-00009-of-00003.parquet ", tmp_path / "out")


Columns = dict[str, list[Any]]


def another_sign_value(columns: Columns) -> None:
    picture = decode_image(columns["sign"][4]["bytes"])
    picture[0, 3, 3] = 128
    columns["sign"][4]["bytes"] = encode_images(picture[None], "webp")[0]


def break_the_sign(columns: Columns) -> None:
    columns["sign"][4]["bytes"] = b"no image"


def a_sign_of_another_size(columns: Columns) -> None:
    columns["sign"][4]["bytes"] = png_bytes(random_pixels(1, side=8)[0])


def lose_an_attack(columns: Columns) -> None:
    columns["attacks"][4].pop()


def lose_all_attacks(columns: Columns) -> None:
    columns["attacks"][4] = None


def exchange_attacks(columns: Columns) -> None:
    columns["attacks"][4].reverse()


def lose_an_entry(columns: Columns) -> None:
    columns["attacks"][4][1] = None


def another_attack(columns: Columns) -> None:
    columns["attacks"][4][1]["attack"] = "pgd"


def another_model(columns: Columns) -> None:
    columns["attacks"][4][0]["model"] = "other"


def lose_the_clean_prediction(columns: Columns) -> None:
    columns["clean_prediction"][4] = None


def lose_a_flag(columns: Columns) -> None:
    columns["attacks"][4][1]["fooled"] = None


def another_flag(columns: Columns) -> None:
    entry = columns["attacks"][4][1]
    entry["fooled"] = not entry["fooled"]


def another_clean_flag(columns: Columns) -> None:
    columns["clean_correct"][4] = not columns["clean_correct"][4]


def exchange_rows(columns: Columns) -> None:
    columns["source_index"][:2] = columns["source_index"][1::-1]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (another_sign_value, f"{FILE}: .* 0, 127 and 254"),
        (break_the_sign, f"{FILE} .*broken"),
        (a_sign_of_another_size, f"{FILE} .*size"),
        (lose_an_attack, f"{FILE}: .*attacks .* 2\\b"),
        (lose_all_attacks, f"{FILE}: .*attacks .* 2\\b"),
        (exchange_attacks, rf"{FILE} at 2/255 .* epsilon\b"),
        (lose_an_entry, rf"{FILE} at 8/255 .* epsilon\b"),
        (another_attack, rf"{FILE} at 8/255 .* attack\b"),
        (another_model, rf"{FILE} at 2/255 .* model\b"),
        (lose_the_clean_prediction, rf"{FILE} at 0/255 .* prediction\b"),
        (lose_a_flag, rf"{FILE} at 8/255 .* fooled\b"),
        (another_flag, rf"{FILE} at 8/255 .* fooled\b"),
        (another_clean_flag, rf"{FILE} at 0/255 .* correct\b"),
        (exchange_rows, rf"{FILE} at 0/255 .* source_index\b"),
    ],
)
def test_forged_rows_are_found_without_the_victim(
    write_config: WriteConfig, tmp_path: Path, edit: Callable[[Columns], None], named: str
) -> None:
    generate_once(write_config(output=SIGNS))
    forge(tmp_path / "out", edit, FILE)
    assert_found(named, tmp_path / "out")


def another_prediction(columns: Columns) -> None:
    predictions = [entries[1]["prediction"] for entries in columns["attacks"]]
    another_mistake(predictions, columns["label"])
    for entries, prediction in zip(columns["attacks"], predictions, strict=True):
        entries[1]["prediction"] = prediction


def another_clean_prediction(columns: Columns) -> None:
    another_mistake(columns["clean_prediction"], columns["label"])


def another_confidence(columns: Columns) -> None:
    columns["attacks"][5][0]["confidence"] -= 0.01


def another_clean_label_confidence(columns: Columns) -> None:
    columns["clean_label_confidence"][5] += 0.01


def turn_the_signs(columns: Columns) -> None:
    for cell in columns["sign"]:
        cell["bytes"] = encode_images(254 - decode_image(cell["bytes"])[None], "webp")[0]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (another_prediction, f"{FILE} at 8/255 .*1 predictions"),
        (another_clean_prediction, f"{FILE} at 0/255 .*1 predictions"),
        (another_confidence, f"{FILE} at 2/255 .* confidence "),
        (another_clean_label_confidence, f"{FILE} at 0/255 .* label_confidence "),
        (turn_the_signs, f"{FILE} at "),
    ],
)
def test_recompute_finds_what_the_pixels_do_not_give(
    write_config: WriteConfig, tmp_path: Path, edit: Callable[[Columns], None], named: str
) -> None:
    generate_once(write_config(output=SIGNS))
    forge(tmp_path / "out", edit, FILE)
    assert fgsm("verify", tmp_path / "out").exit_code == 0
    assert_found(named, tmp_path / "out", "--recompute")


def test_a_receipt_that_lists_other_files_is_found(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output=SIGNS))
    path = shard_path(tmp_path, f"out/.run/receipts/{SHARD}.json")
    receipt = json.loads(path.read_text())
    receipt["files"][0]["path"] = f"clean/{SHARD}.parquet"
    write_sealed(path, receipt)
    assert_found(rf"{SHARD}\.json .*\bfiles\b", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- bits

BITS = {"layout": "signs", "sign_format": "bits"}


def test_bits_are_stored_plain_and_zeros_compressed(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output=BITS))
    group = pq.ParquetFile(shard_path(tmp_path / "out", FILE)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for name, compression in (
        ("image.bytes", "UNCOMPRESSED"),
        ("sign.positive", "UNCOMPRESSED"),
        ("sign.zero", "ZSTD"),
    ):
        assert columns[name].compression == compression
        assert "PLAIN" in columns[name].encodings
        assert not columns[name].has_dictionary_page
    # One bit for each value.
    assert 0 < columns["sign.positive"].total_compressed_size - 16 * 96 < 16 * 4 + 100
    assert columns["sign.zero"].total_compressed_size < 0.6 * columns["sign.positive"].total_compressed_size


@pytest.mark.parametrize("channels", [1, 3])
def test_the_code_of_the_card_makes_every_sign(channels: int) -> None:
    (clean,) = random_pixels(1, side=9, channels=channels).squeeze(-1 if channels == 1 else ())
    signs = np.random.RandomState(1).randint(-1, 2, clean.shape)
    (sign,) = picture_to_bits(((signs + 1) * 127).astype(np.uint8)[None]).to_pylist()
    names: dict[str, Any] = {"rows": [{"image": Image.fromarray(clean), "sign": sign}]}
    exec(LAYOUTS["signs-bits"].example(fgsm_at(0, 8)).split("```")[1].removeprefix("python"), names)
    np.testing.assert_array_equal(np.asarray(names["attacked"]), np.clip(clean + 8 * signs, 0, 255))


def test_the_format_is_part_of_the_run_id_but_where_it_is_the_default(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    ids: list[str] = []
    for output in (SIGNS, {**SIGNS, "sign_format": "picture"}, BITS):
        generate(write_config(output=output), "--output", str(tmp_path / str(len(ids))))
        ids.append(manifest(tmp_path / str(len(ids)))["run_id"])
    assert ids[0] == ids[1] != ids[2]
    result = fgsm("generate", write_config(output=BITS), "--output", tmp_path / "0")
    assert result.exit_code == 2
    assert "output.sign_format" in result.stderr
    assert "sign_format" not in manifest(tmp_path / "1")["config"]["output"]


@pytest.mark.parametrize("layout", ["images", "wide"])
@pytest.mark.parametrize("sign_format", ["picture", "bits"])
def test_a_layout_without_sign_maps_has_no_format_of_theirs(
    write_config: WriteConfig, layout: str, sign_format: str
) -> None:
    result = fgsm("generate", write_config(output={"layout": layout, "sign_format": sign_format}))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: output.sign_format: ")


def altered(plane: str, edit: Callable[[bytes], bytes | None]) -> Callable[[Columns], None]:
    """Another plane of bits of one row."""

    def alter(columns: Columns) -> None:
        columns["sign"][4][plane] = edit(columns["sign"][4][plane])

    return alter


def all_zero(columns: Columns) -> None:
    columns["sign"][4] = {"positive": bytes(85), "zero": b"\xff" * 84 + b"\xe0"}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (altered("zero", lambda _: b"\xff" * 84 + b"\xe0"), f"{FILE}: .*both"),
        (altered("positive", lambda data: data[:-1]), f"{FILE}: .*85 bytes"),
        (altered("zero", lambda data: data + b"\0"), f"{FILE}: .*85 bytes"),
        (altered("positive", lambda _: None), f"{FILE}: .*85 bytes"),
        (altered("positive", lambda data: data[:-1] + b"\x01"), f"{FILE}: .*beyond"),
        (all_zero, "zero_signs"),
    ],
)
def test_forged_bits_are_found_without_the_victim(
    write_config: WriteConfig, tmp_path: Path, edit: Callable[[Columns], None], named: str
) -> None:
    # 675 values, which do not fill up whole bytes.
    generate_once(write_config(output=BITS, preprocess={"crop": 15}))
    forge(tmp_path / "out", edit, FILE)
    assert_found(named, tmp_path / "out")


def test_a_flipped_bit_is_found(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output=BITS))
    path = shard_path(tmp_path / "out", FILE)
    (plane, *_) = pq.read_table(path)["sign"].combine_chunks().field("positive").to_pylist()
    data = bytearray(path.read_bytes())
    data[data.index(plane) + 40] ^= 4
    path.write_bytes(data)
    assert_found(f"{FILE} has sha256 ", tmp_path / "out")


def test_recompute_finds_turned_bits(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output=BITS))

    def turn_one(columns: Columns) -> None:
        cell = columns["sign"][4]
        negative = [255 & ~(up | still) for up, still in zip(cell["positive"], cell["zero"], strict=True)]
        cell["positive"] = bytes(negative)

    forge(tmp_path / "out", turn_one, FILE)
    assert fgsm("verify", tmp_path / "out").exit_code == 0
    assert_found(f"{FILE} at ", tmp_path / "out", "--recompute")


@pytest.mark.parametrize("column", ["sign", "sign_fgsm_resnet"])
def test_sign_maps_are_stored_as_what_they_are(column: str) -> None:
    """As PNG in at most two bits a value, and the clean image as in any layout."""
    signs = 127 * torch.randint(0, 3, (1, 1, 128, 128), dtype=torch.uint8)
    layout = LAYOUTS["signs"]
    (stored,) = layout.encode(column, signs, "png").field("bytes").to_pylist()
    assert len(stored) < signs.numel() / 4
    assert layout.encode("image", signs, "png") == LAYOUTS["images"].encode("image", signs, "png")
