"""Verify: every kind of damage is named, repaired, and written again byte for byte."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.images import decode_image, encode_images
from tests.conftest import (
    FACTORY,
    WriteConfig,
    digests,
    generate,
    generate_once,
    png_bytes,
    random_pixels,
    shard_path,
    without_run,
    write_parquet,
    write_sealed,
)
from tests.conftest import fgsm_without_run as fgsm
from tests.support.forgery import (
    FILE,
    SHARD,
    agree,
    alter_a_byte_of,
    another_mistake,
    assert_found,
    cut_short_of,
    forge,
    rewrite,
)


def cut_short(out: Path) -> None:
    cut_short_of(shard_path(out, FILE))


def alter_a_byte(out: Path) -> None:
    alter_a_byte_of(shard_path(out, FILE))


def delete_a_file(out: Path) -> None:
    shard_path(out, FILE).unlink()


def break_a_receipt(out: Path) -> None:
    path = shard_path(out, f".run/receipts/{SHARD}.json")
    path.write_text(path.read_text()[:40])


def swap_a_receipt(out: Path) -> None:
    path = shard_path(out, f".run/receipts/{SHARD}.json")
    write_sealed(path, {**json.loads(path.read_text()), "run_id": "ff"})


def alter_a_receipt(out: Path) -> None:
    path = shard_path(out, f".run/receipts/{SHARD}.json")
    path.write_text(path.read_text().replace('"zero_signs": 0', '"zero_signs": 1'))


def copy_a_receipt(out: Path) -> None:
    shutil.copy(
        shard_path(out, ".run/receipts/test-00000-of-00003.json"), shard_path(out, f".run/receipts/{SHARD}.json")
    )


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_short, f"{FILE} has "),
        (alter_a_byte, f"{FILE} has sha256 "),
        (delete_a_file, f"{FILE} is missing"),
        (break_a_receipt, rf"{SHARD}\S*\.json .*altered"),
        (alter_a_receipt, rf"{SHARD}\S*\.json .*altered"),
        (copy_a_receipt, rf"{SHARD}\S*\.json .* shard\b"),
        (swap_a_receipt, rf"{SHARD}\S*\.json .* run\b"),
    ],
)
def test_damage_is_named_repaired_and_written_again(
    write_config: WriteConfig, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    config, out = write_config(), tmp_path / "out"
    generate_once(config)
    before, receipt = digests(out), shard_path(out, f".run/receipts/{SHARD}.json").read_bytes()
    damage(out)
    result = fgsm("verify", out)
    assert result.exit_code == 1
    assert re.search(named, result.stderr)
    assert "--repair" in result.stderr
    result = fgsm("verify", out, "--repair")
    assert result.exit_code == 1
    assert not shard_path(out, f".run/receipts/{SHARD}.json").exists()
    assert not list(out.glob(f"*/{SHARD}-*.parquet"))
    assert "2 of 3 shards" in generate(config)
    assert digests(out) == before
    assert shard_path(out, f".run/receipts/{SHARD}.json").read_bytes() == receipt
    assert fgsm("verify", out, "--recompute").exit_code == 0


def test_a_sound_dataset_is_verified_in_full(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 0
    assert re.search(r"\b3 shards .*\b120 rows\b", result.stdout)
    assert re.search(r"\b0 images .*epsilon ball", result.stdout)
    assert re.search(r"\b120 predictions .* 0 differ.*\bexactly\b", result.stdout)


def test_repair_leaves_sound_shards_alone(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    before = digests(tmp_path / "out")
    assert fgsm("verify", tmp_path / "out", "--repair").exit_code == 0
    assert digests(tmp_path / "out") == before


def test_missing_shards_and_foreign_files_are_named(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    out = tmp_path / "out"
    shard_path(out, f".run/receipts/{SHARD}.json").unlink()
    extra = shard_path(out, "clean/test-00009-of-00003.parquet")
    extra.write_bytes(b"would be loaded along")
    (out / "clean/mine.parquet").write_bytes(b"would not")
    result = fgsm("verify", out)
    assert result.exit_code == 1
    assert re.search(rf"\b1 of 3 shards .*\.run/receipts, {SHARD} ", result.stderr)
    assert "are missing" not in result.stderr
    assert "clean/test-00009-of-00003.parquet belongs" in result.stderr
    assert ": clean/mine.parquet" in result.stdout


def test_a_folder_without_a_dataset_is_one_sentence(tmp_path: Path) -> None:
    for command in ("verify", "inspect"):
        result = fgsm(command, tmp_path / "nowhere")
        assert result.exit_code == 2
        assert re.search(rf"Error: {tmp_path}/nowhere\b", result.stderr)


def test_a_downloaded_dataset_runs_no_code_of_its_own(write_config: WriteConfig, tmp_path: Path) -> None:
    """Receipts do not travel; what a manifest from elsewhere names as its victim is not imported."""
    generate_once(write_config())
    shutil.rmtree(tmp_path / "out/.run")
    path = tmp_path / "out/manifest.json"
    ran = tmp_path / "ran"
    (tmp_path / "victim.py").write_text(f"open({str(ran)!r}, 'w').close()")
    assert "victim.py:make" in path.read_text()
    assert_found("3 of 3 shards", tmp_path / "out", "--recompute")
    assert not ran.exists()


def leave_the_ball(columns: dict[str, list[Any]]) -> None:
    pixels = decode_image(columns["image"][4]["bytes"])
    pixels[0, 3, 3] = pixels[0, 3, 3] + 100 if pixels[0, 3, 3] < 128 else pixels[0, 3, 3] - 100
    columns["image"][4]["bytes"] = encode_images(pixels[None], "webp")[0]


def break_the_image(columns: dict[str, list[Any]]) -> None:
    columns["image"][4]["bytes"] = b"no image"


def another_size(columns: dict[str, list[Any]]) -> None:
    columns["image"][4]["bytes"] = png_bytes(random_pixels(1, side=8)[0])


def another_label(columns: dict[str, list[Any]]) -> None:
    columns["label"][0] = (columns["label"][0] + 1) % 3


def exchange_rows(columns: dict[str, list[Any]]) -> None:
    columns["source_index"][:2] = columns["source_index"][1::-1]


def another_epsilon(columns: dict[str, list[Any]]) -> None:
    columns["epsilon"][0] = 4 / 255


def another_attack(columns: dict[str, list[Any]]) -> None:
    columns["attack"][0] = "pgd"


def no_model(columns: dict[str, list[Any]]) -> None:
    columns["model"][0] = None


def another_clean_prediction(columns: dict[str, list[Any]]) -> None:
    columns["clean_prediction"][0] = (columns["clean_prediction"][0] + 1) % 3


def exchange_correct(columns: dict[str, list[Any]]) -> None:
    right, wrong = columns["correct"].index(True), columns["correct"].index(False)
    columns["correct"][right], columns["correct"][wrong] = False, True


def another_fooled(columns: dict[str, list[Any]]) -> None:
    columns["fooled"][3] = not columns["fooled"][3]


def no_confidence(columns: dict[str, list[Any]]) -> None:
    columns["confidence"][3] = None


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (leave_the_ball, r"1 images .* ball of 8/255"),
        (break_the_image, "broken"),
        (another_size, "size"),
        (exchange_rows, r"values in source_index\b"),
        (another_label, r"values in label\b"),
        (another_epsilon, r"values in epsilon\b"),
        (another_attack, r"values in attack\b"),
        (no_model, r"values in model\b"),
        (another_clean_prediction, r"values in clean_prediction\b"),
        (exchange_correct, r"values in correct\b"),
        (another_fooled, r"values in fooled\b"),
        (no_confidence, r"values in confidence\b"),
    ],
)
def test_forged_rows_are_found_without_the_victim(
    write_config: WriteConfig, tmp_path: Path, edit: Callable[[dict[str, list[Any]]], None], named: str
) -> None:
    generate_once(write_config())
    forge(tmp_path / "out", edit)
    assert_found(f"{FILE} .*{named}", tmp_path / "out")


def test_rows_that_the_plan_does_not_have_are_found(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    clean = f"clean/{SHARD}.parquet"
    forge(tmp_path / "out", exchange_rows, clean)
    assert re.search(f"{clean} .*source_index", fgsm("verify", tmp_path / "out").stderr)


def test_a_receipt_that_lists_other_files_is_found(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    path = shard_path(tmp_path, f"out/.run/receipts/{SHARD}.json")
    receipt = json.loads(path.read_text())
    receipt["files"].pop()
    write_sealed(path, receipt)
    assert re.search(rf"{SHARD}\.json .*\bfiles\b", fgsm("verify", tmp_path / "out").stderr)


def test_wrong_counts_in_a_receipt_are_found(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    forge(tmp_path / "out", lambda _: None, correct=16, fooled=16)
    result = fgsm("verify", tmp_path / "out")
    assert re.search(rf"{SHARD}\.json .*\bcounts\b.*{FILE}", result.stderr)


def lose_a_row(columns: dict[str, list[Any]]) -> None:
    for values in columns.values():
        values.pop()


def test_lost_rows_and_other_columns_are_found(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    forge(tmp_path / "out", lose_a_row)
    assert re.search(rf"{FILE} .*\b15\b.*\b16\b", fgsm("verify", tmp_path / "out").stderr)
    path = shard_path(tmp_path / "out", FILE)
    rewrite(path, pq.read_table(path).drop_columns(["fooled"]))
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    receipt_path = shard_path(tmp_path, f"out/.run/receipts/{SHARD}.json")
    receipt = json.loads(receipt_path.read_text())
    next(entry for entry in receipt["files"] if without_run(entry["path"]) == FILE).update(bytes=size, sha256=digest)
    write_sealed(receipt_path, receipt)
    assert re.search(rf"{FILE} .*\bcolumns\b", fgsm("verify", tmp_path / "out").stderr)


def another_prediction(columns: dict[str, list[Any]]) -> None:
    another_mistake(columns["prediction"], columns["label"])


def another_confidence(columns: dict[str, list[Any]]) -> None:
    columns["confidence"][5] -= 0.01


def another_label_confidence(columns: dict[str, list[Any]]) -> None:
    columns["label_confidence"][5] += 0.01


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (another_prediction, "1 predictions"),
        (another_confidence, r"a confidence\b"),
        (another_label_confidence, r"a label_confidence\b"),
    ],
)
def test_recompute_finds_what_the_pixels_do_not_give(
    write_config: WriteConfig, tmp_path: Path, edit: Callable[[dict[str, list[Any]]], None], named: str
) -> None:
    generate_once(write_config())
    forge(tmp_path / "out", edit)
    assert fgsm("verify", tmp_path / "out").exit_code == 0
    assert_found(f"{FILE} .*{named}", tmp_path / "out", "--recompute")


def test_a_victim_that_changed_cannot_be_asked_again(write_config: WriteConfig, tmp_path: Path) -> None:
    moved = tmp_path / "other"
    moved.mkdir()
    (moved / "victim.py").write_text(FACTORY)
    generate_once(write_config(model={"name": f"{moved / 'victim.py'}:make"}))
    (moved / "victim.py").write_text(FACTORY + "\n# edited")
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 2
    assert "Error: model: " in result.stderr
    (moved / "victim.py").unlink()
    assert f" {moved}/victim.py." in fgsm("verify", tmp_path / "out", "--recompute").stderr


def test_elsewhere_only_near_ties_are_forgiven(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_once(write_config())
    forge(tmp_path / "out", another_prediction)
    path = shard_path(tmp_path, f"out/.run/receipts/{SHARD}.json")
    receipt = json.loads(path.read_text())
    receipt["versions"]["torch"] = "1.0"
    write_sealed(path, receipt)
    agree(tmp_path / "out")
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 1
    assert re.search(r"another environment .*\btorch 1\.0\b", result.stdout)
    # With every margin counted as a tie, the forged prediction is one.
    monkeypatch.setattr("pipeline.check.recompute.TOLERANCE", {"fp32": 1e9})
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 0
    assert re.search(r"\b1 .*\bties\b", result.stdout)


@pytest.mark.parametrize(("key", "value"), [("rows", 41), ("complete", False), ("versions", {"torch": "1.0"})])
def test_a_manifest_that_claims_otherwise_is_found_and_written_again(
    write_config: WriteConfig, tmp_path: Path, key: str, value: Any
) -> None:
    config, path = write_config(), tmp_path / "out/manifest.json"
    generate_once(config)
    text = path.read_text()
    write_sealed(path, {**json.loads(text), key: value})
    assert_found(rf"manifest\.json .* {key};", tmp_path / "out")
    generate(config)
    assert path.read_text() == text


@pytest.mark.parametrize("card", [None, "", "no front matter", "---\nconfigs: []\n---\n"])
def test_a_card_without_the_subsets_is_found_and_written_again(
    write_config: WriteConfig, tmp_path: Path, card: str | None
) -> None:
    config, path = write_config(), tmp_path / "out/README.md"
    generate_once(config)
    text = path.read_text()
    path.unlink()
    if card is not None:
        path.write_text(card)
    assert "README.md does" in fgsm("verify", tmp_path / "out").stderr
    if card:  # somebody else's text is not replaced
        with pytest.raises(PipelineError, match=f"^{path} "):
            generate(config)
        assert path.read_text() == card
        path.unlink()
    generate(config)
    assert path.read_text() == text


def test_a_card_keeps_what_its_owner_adds(write_config: WriteConfig, tmp_path: Path) -> None:
    config, path = write_config(), tmp_path / "out/README.md"
    generate_once(config)
    path.write_text(path.read_text().replace("configs:", "license: mit\nconfigs:") + "\nThank you, Ian.\n")
    text = path.read_text()
    assert fgsm("verify", tmp_path / "out").exit_code == 0
    generate(config)
    assert path.read_text() == text


def test_after_a_repair_manifest_and_card_speak_of_what_is_left(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    card = (tmp_path / "out/README.md").read_text()
    cut_short(tmp_path / "out")
    fgsm("verify", tmp_path / "out", "--repair")
    assert "INCOMPLETE" in fgsm("inspect", tmp_path / "out").stdout
    assert (tmp_path / "out/README.md").read_text() != card
    result = fgsm("verify", tmp_path / "out")
    assert "1 of 3 shards" in result.stderr
    assert "manifest.json" not in result.stderr


def test_inspect_counts_receipts_where_the_manifest_is_behind(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    shard_path(tmp_path, f"out/.run/receipts/{SHARD}.json").unlink()
    assert "INCOMPLETE" in fgsm("inspect", tmp_path / "out").stdout
    assert "24 of 40 " in fgsm("inspect", tmp_path / "out").stdout


def test_a_foreign_receipt_is_named_and_does_not_count(write_config: WriteConfig, tmp_path: Path) -> None:
    config, receipts = write_config(), tmp_path / "out/.run/receipts"
    generate_once(config)
    shard_path(receipts, "test-00007-of-00003.json").write_bytes(shard_path(receipts, f"{SHARD}.json").read_bytes())
    assert "test-00007-of-00003.json belongs" in fgsm("verify", tmp_path / "out").stderr
    assert "All 3 shards" in generate(config)


def test_lists_and_structs_that_are_kept_verify(write_config: WriteConfig, tmp_path: Path) -> None:
    boxes = datasets.List({"x": datasets.Value("int32"), "names": datasets.List(datasets.Value("string"))})
    source = write_parquet(
        tmp_path / "boxes",
        [png_bytes(pixels) for pixels in random_pixels(8)],
        [0] * 8,
        boxes=(boxes, [[{"x": i, "names": ["a", "b"][: i % 3]}] * (i % 2) for i in range(8)]),
    )
    generate_once(write_config(source={"path": str(source), "keep_columns": ["boxes"]}))
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 0, result.output


def test_numbers_that_are_kept_may_be_nan_or_null(write_config: WriteConfig, tmp_path: Path) -> None:
    weights = (datasets.Value("float32"), [float("nan"), None, 0.5, 1.0] * 2)
    images = [png_bytes(pixels) for pixels in random_pixels(8)]
    source = write_parquet(tmp_path / "weights", images, [0] * 8, weight=weights)
    generate_once(write_config(source={"path": str(source), "keep_columns": ["weight"]}))
    result = fgsm("verify", tmp_path / "out", "--source")
    assert result.exit_code == 0, result.output


def test_attention_gives_the_same_digits_again(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Attention has one kernel with and another without a gradient; the clean logits of a run had one.
    path = tmp_path / "vit.py"
    path.write_text(
        "import torchvision\n\n\ndef make():\n"
        "    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 16, num_classes=3)\n"
        "    model.heads.head.weight.data.normal_()  # it begins as zeros, and no gradient passes\n"
        "    return model\n"
    )
    generate_once(write_config(model={"name": f"{path}:make"}))
    monkeypatch.setattr("pipeline.check.recompute.TOLERANCE", {"fp32": 0.0})
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 0, result.output


def test_features_that_cannot_be_read_are_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    path = tmp_path / "out/manifest.json"
    write_sealed(path, json.loads(path.read_text().replace('"_type": "Image"', '"_type": "Picture"')))
    assert_found(r"manifest\.json: .*features", tmp_path / "out")
