"""The main job in this process: what it writes, what it skips, how it resumes and what it refuses."""

import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import resource
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from pipeline.config.load import load_config
from pipeline.core.errors import PipelineError
from pipeline.core.images import ImageFormat
from pipeline.engine.progress import Progress
from pipeline.engine.run import open_run
from pipeline.layouts.base import encode_column
from pipeline.output.manifest import FORMAT_VERSION
from pipeline.output.shards import ShardWriter
from tests.conftest import (
    CLASSES,
    FACTORY,
    LAYOUTS,
    WriteConfig,
    digests,
    fgsm,
    generate,
    generate_once,
    manifest,
    pixels,
    png_bytes,
    random_pixels,
    rows,
    shard_path,
    subset_of,
    write_parquet,
    write_sealed,
)


def load(folder: Path, subset: str | None = None) -> Any:
    return datasets.load_dataset(str(folder), subset, split="test")


def test_every_stored_value_follows_from_the_stored_pixels(
    write_config: WriteConfig, factory_file: Path, tmp_path: Path
) -> None:
    generate_once(write_config())
    out = tmp_path / "out"
    source = random_pixels(40).transpose(0, 3, 1, 2).astype(np.int16)
    namespace: dict[str, Any] = {}
    exec(factory_file.read_text(), namespace)
    torch.manual_seed(0)  # runtime.seed
    model = namespace["make"]().eval()
    images = torch.from_numpy(source).float().div(255).requires_grad_()
    labels = torch.arange(40) % 3
    loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
    sign = torch.autograd.grad(loss, images)[0].sign().numpy().astype(np.int16)
    clean = rows(out, "clean")
    for level in (0, 2, 8):
        frame = rows(out, f"eps-{level}" if level else "clean")
        order = frame["source_index"].to_numpy()
        stored = pixels(frame)
        assert sorted(order) == list(range(40))
        np.testing.assert_array_equal(stored, np.clip(source + level * sign, 0, 255)[order])
        with torch.inference_mode():
            chances = model(torch.from_numpy(stored).float() / 255).softmax(1).numpy()
        np.testing.assert_array_equal(frame["prediction"], chances.argmax(1))
        np.testing.assert_allclose(frame["confidence"], chances.max(1), atol=1e-5)
        np.testing.assert_allclose(frame["label_confidence"], chances[range(40), order % 3], atol=1e-5)
        np.testing.assert_array_equal(frame["label"], order % 3)
        np.testing.assert_array_equal(frame["correct"], chances.argmax(1) == order % 3)
        np.testing.assert_array_equal(frame["epsilon"], np.full(40, level / 255))
        np.testing.assert_array_equal(frame["clean_prediction"], clean["prediction"])
        if level:
            np.testing.assert_array_equal(frame["fooled"], clean["correct"].to_numpy() & ~frame["correct"].to_numpy())
        else:
            assert frame["fooled"].isna().all()


def test_datasets_duckdb_polars_pandas_and_pillow_read_it(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    out = tmp_path / "out"
    attacked = load(out, "eps-8")
    assert attacked.features["label"].names == list(CLASSES)
    assert isinstance(attacked.features["image"], datasets.Image)
    assert attacked[0]["image"].size == (16, 16)
    assert set(load(out, "clean")["epsilon"]) == {0.0}
    assert len(load(out)) == 3 * 40
    streamed = datasets.load_dataset(str(out), "eps-2", split="test", streaming=True)
    assert [row["source_index"] for row in streamed] == load(out, "eps-2")["source_index"]
    glob = f"{out}/eps-8/*.parquet"
    counted = duckdb.sql(f"select count(*) from '{glob}' where epsilon = 8/255")
    assert counted is not None
    assert counted.fetchall() == [(40,)]
    assert polars.read_parquet(glob)["epsilon"].to_list() == [8 / 255] * 40
    assert len(pandas.read_parquet(out / "eps-8")) == 40


def test_the_parquet_is_what_the_hub_wants(write_config: WriteConfig, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    generate_once(write_config())
    file = pq.ParquetFile(shard_path(tmp_path, "out/eps-8/test-00000-of-00003.parquet"))
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["image.bytes"].compression == "UNCOMPRESSED"
    assert "PLAIN" in columns["image.bytes"].encodings
    assert not columns["image.bytes"].has_dictionary_page
    assert columns["prediction"].compression == "SNAPPY"
    assert all(column.has_offset_index and column.has_column_index for column in columns.values())
    footer = json.loads(file.metadata.metadata[b"fgsm"])
    assert footer == {
        "run_id": manifest(tmp_path / "out")["run_id"],
        "shard": "test-00000-of-00003",
        "rows": 16,
        "subset": "eps-8",
    }


def test_row_groups_are_bounded(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr("pipeline.output.shards.ROW_GROUP_ROWS", 12)
    generate(write_config())
    metadata = pq.ParquetFile(shard_path(tmp_path, "out/clean/test-00000-of-00003.parquet")).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [12, 4]


def test_the_same_command_again_does_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    generate_once(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert "All 3 shards" in generate(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_shards_are_written_again_byte_for_byte(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    config = write_config(output={"layout": layout})
    generate_once(config)
    out = tmp_path / "out"
    complete, summary = digests(out), manifest(out)
    assert len(complete) == (9 if layout == "images" else 3)
    shard_path(out, ".run/receipts/test-00001-of-00003.json").unlink()
    shard_path(out / subset_of(layout, 8), "test-00002-of-00003.parquet").write_bytes(b"cut short")
    generate(config)
    assert digests(out) == complete
    assert manifest(out) == summary


def test_every_session_that_wrote_something_says_how_fast_it_was(write_config: WriteConfig, tmp_path: Path) -> None:
    def sessions() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "out/.run/sessions.jsonl").read_text().splitlines()]

    output = generate(write_config())
    (first,) = sessions()
    assert first["images"] == 40
    assert f"{first['images_per_second']:,} images/s." in output
    assert set(first["busy"]) == {"load", "attack", "encode", "write"}
    shard_path(tmp_path, "out/.run/receipts/test-00001-of-00003.json").unlink()
    generate(write_config())
    generate(write_config())  # nothing is left to do
    assert [session["images"] for session in sessions()] == [40, 16]
    generate(write_config(), "--overwrite")
    assert [session["images"] for session in sessions()] == [40]


def test_bytes_depend_neither_on_workers_nor_on_the_folder(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    generate(write_config(), "--output", str(tmp_path / "elsewhere"), "--set", "runtime.workers=2")
    assert digests(tmp_path / "elsewhere") == digests(tmp_path / "out")
    assert manifest(tmp_path / "elsewhere")["run_id"] == manifest(tmp_path / "out")["run_id"]


def test_pictures_that_are_encoded_together_are_of_bounded_bytes(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set[int]()

    def encode(pictures: Tensor, image_format: ImageFormat) -> pa.StructArray:
        if threading.current_thread().name.startswith("encode"):  # not those of the estimate
            sizes.add(pictures.nbytes)
        return encode_column(pictures, image_format)

    generate_once(write_config())
    monkeypatch.setattr("pipeline.layouts.base.encode_column", encode)
    limit = 5 * 3 * 16 * 16
    monkeypatch.setattr("pipeline.engine.execute.BYTES_PER_TASK", limit)
    generate(write_config(), "--output", str(tmp_path / "elsewhere"))
    assert max(sizes) == limit
    assert digests(tmp_path / "elsewhere") == digests(tmp_path / "out")


def test_a_moved_source_and_model_are_the_same_run(
    write_config: WriteConfig, image_parquet: Path, factory_file: Path, tmp_path: Path
) -> None:
    generate_once(write_config())
    moved = image_parquet.rename(tmp_path / "moved")
    victim = factory_file.rename(tmp_path / "renamed.py")
    output = generate(write_config(source={"path": str(moved)}, model={"name": f"{victim}:make"}))
    assert "All 3 shards" in output


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("attack.epsilons=[2/255]", 'attacks.fgsm.epsilons (["2/255", "8/255"] there, ["2/255"] here)'),
        ("runtime.seed=1", "runtime.seed (0 there, 1 here)"),
        ("output.image_format=png", 'output.image_format ("webp" there, "png" here)'),
        ("runtime.batch_size=5", "runtime.batch_size (6 there, 5 here)"),
        ("source.limit=10", "source.limit (null there, 10 here)"),
        ("model.mean=[0.5]", "models.make.mean ([0.0] there, [0.5] here)"),
    ],
)
def test_another_run_in_the_folder_is_refused_and_what_differs_is_named(
    write_config: WriteConfig, tmp_path: Path, change: str, named: str
) -> None:
    generate_once(write_config())
    before = digests(tmp_path / "out")
    result = fgsm("generate", write_config(), "--set", change)
    assert result.exit_code == 2
    assert named in result.stderr
    assert digests(tmp_path / "out") == before


def test_other_weights_are_another_run(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> None:
    generate_once(write_config())
    factory_file.write_text(FACTORY.replace("4 * self.linear", "5 * self.linear"))
    (tmp_path / "second").mkdir()
    copy = shutil.copy(factory_file, tmp_path / "second/victim.py")
    result = fgsm("generate", write_config(model={"name": f"{copy}:make"}))
    assert result.exit_code == 2
    assert "models.make.content" in result.stderr


def test_every_auto_is_resolved_once_and_kept(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(runtime={"device": "auto"})
    generate_once(config)
    kept = manifest(tmp_path / "out")["config"]
    assert "auto" not in (kept["output"]["image_format"], kept["runtime"]["device"], kept["runtime"]["compile"])
    # Another machine, or another version, would decide otherwise; the run that is there has decided.
    monkeypatch.setattr("pipeline.engine.run.choose_format", lambda *_: "png")
    shard_path(tmp_path, "out/.run/receipts/test-00001-of-00003.json").unlink()
    generate(config)
    assert manifest(tmp_path / "out")["config"] == kept


def test_overwrite_and_folders_of_one_name_load_their_own_rows(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config()
    for folder, epsilon in (("a", "2/255"), ("b", "8/255")):
        generate(
            config,
            "--output",
            str(tmp_path / folder / "set"),
            "--set",
            "attack.epsilons=[4/255]",
            "--set",
            f"runtime.seed={len(epsilon) if folder == 'a' else 9}",
        )
    first, second = load(tmp_path / "a/set", "eps-4"), load(tmp_path / "b/set", "eps-4")
    assert first["source_index"] != second["source_index"]
    monkeypatch.chdir(tmp_path / "b")
    generate(config, "--output", "set", "--set", "attack.epsilons=[4/255]", "--set", "runtime.seed=3", "--overwrite")
    assert load(Path("set"), "eps-4")["source_index"] not in (first["source_index"], second["source_index"])


def test_overwrite_removes_subsets_of_the_former_run_only(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/clean/notes").mkdir()
    (tmp_path / "out/clean/notes/a.txt").write_text("mine")
    generate(write_config(attack={"epsilons": ["4/255"]}), "--overwrite")
    assert (tmp_path / "out/clean/notes/a.txt").read_text() == "mine"
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == [".run", "README.md", "clean", "eps-4", "manifest.json", "notes.txt"]


def test_overwrite_with_a_bad_config_destroys_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    before = digests(tmp_path / "out")
    assert fgsm("generate", write_config(model={"kwargs": {"classes": 7}}), "--overwrite").exit_code == 2
    assert digests(tmp_path / "out") == before


def test_undecodable_images_are_skipped_and_listed(write_config: WriteConfig, tmp_path: Path) -> None:
    images: list[bytes | None] = [png_bytes(image) for image in random_pixels(40)]
    images[3], images[20], images[21] = b"", images[20][:60] if images[20] else b"", None
    source = write_parquet(tmp_path / "broken", images, [i % 3 for i in range(40)])
    config = write_config(source={"path": str(source)}, runtime={"max_skipped": 0.1})
    output = generate(config)
    assert "37 of 40 source images, 3 skipped" in output
    skipped = manifest(tmp_path / "out")["skipped"]
    assert sorted(row["source_index"] for row in skipped) == [3, 20, 21]
    assert all(row["reason"] for row in skipped)
    for subset in ("clean", "eps-2", "eps-8"):
        assert sorted(rows(tmp_path / "out", subset)["source_index"]) == [i for i in range(40) if i not in (3, 20, 21)]
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_too_many_undecodable_images_fail_the_run(write_config: WriteConfig, tmp_path: Path) -> None:
    images: list[bytes | None] = [png_bytes(image) for image in random_pixels(40)]
    images[3] = b""
    source = write_parquet(tmp_path / "broken", images, [i % 3 for i in range(40)])
    result = fgsm("generate", write_config(source={"path": str(source)}))
    assert result.exit_code == 1
    assert re.search(r"Error: source: 1 of 40 .*runtime\.max_skipped = 0\.01", result.stderr)
    assert "row 3 of split test" in result.stderr
    assert not manifest(tmp_path / "out")["complete"]


def test_on_error_fail_stops_at_the_first_undecodable_image(write_config: WriteConfig, tmp_path: Path) -> None:
    images: list[bytes | None] = [png_bytes(image) for image in random_pixels(40)]
    images[3] = b""
    source = write_parquet(tmp_path / "broken", images, [i % 3 for i in range(40)])
    config = write_config(source={"path": str(source)}, runtime={"on_error": "fail", "max_skipped": 1.0})
    result = fgsm("generate", config)
    assert result.exit_code == 1
    assert "row 3 of split test" in result.stderr
    assert "runtime.on_error" in result.stderr


def test_unlabelled_rows_are_attacked_by_prediction_and_stored_as_null(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    labels = [None if i % 4 == 0 else -1 if i % 4 == 1 else i % 3 for i in range(40)]
    source = write_parquet(tmp_path / "partly", [png_bytes(image) for image in random_pixels(40)], labels)
    generate(write_config(source={"path": str(source)}, attack={"label": "prediction"}))
    frame = rows(tmp_path / "out", "eps-8")
    unlabelled = frame["source_index"].to_numpy() % 4 < 2
    for column in ("label", "label_confidence", "correct", "fooled"):
        np.testing.assert_array_equal(frame[column].isna().to_numpy(), unlabelled)
    assert frame["prediction"].notna().all()
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_of_which_nothing_could_be_decoded_loads(
    write_config: WriteConfig, tmp_path: Path, layout: str
) -> None:
    images = [b""] * 6 + [png_bytes(image) for image in random_pixels(10)]
    source = write_parquet(tmp_path / "broken", images, [0] * 16)
    generate(
        write_config(
            source={"path": str(source), "shuffle": False},
            runtime={"max_skipped": 0.5},
            output={"layout": layout, "images_per_shard": 6},
        )
    )
    assert load(tmp_path / "out", subset_of(layout, 0))["source_index"][:] == list(range(6, 16))
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_no_label_column_is_needed_for_predictions(write_config: WriteConfig, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "bare", [png_bytes(image) for image in random_pixels(8)], None)
    generate(write_config(source={"path": str(source)}, attack={"label": "prediction"}))
    assert rows(tmp_path / "out", "eps-8")["label"].isna().all()


@pytest.mark.parametrize("target", ["least_likely", "random", "dog", 2])
def test_targeted_runs_record_the_target_and_who_reached_it(
    write_config: WriteConfig, tmp_path: Path, target: str | int
) -> None:
    generate(write_config(attack={"epsilons": ["32/255"], "target": target}))
    frame, clean = rows(tmp_path / "out", "eps-32"), rows(tmp_path / "out", "clean")
    assert clean["target"].isna().all()
    assert clean["fooled"].isna().all()
    np.testing.assert_array_equal(frame["fooled"], frame["prediction"] == frame["target"])
    if target == "random":
        assert (frame["target"] != frame["label"]).all()
        assert frame["target"].nunique() > 1
    if target in ("dog", 2):
        assert set(frame["target"]) == {1 if target == "dog" else 2}
    reached = (frame["prediction"] == frame["target"]).sum()
    assert reached > (clean["prediction"].to_numpy() == frame["target"].to_numpy()).sum()
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_random_targets_do_not_depend_on_the_batch(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(attack={"target": "random"})
    generate_once(config)
    generate(config, "--output", str(tmp_path / "other"), "--set", "runtime.batch_size=16")
    first, second = rows(tmp_path / "out", "eps-8"), rows(tmp_path / "other", "eps-8")
    np.testing.assert_array_equal(first["target"], second["target"])


def test_a_label_map_joins_different_classes(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config(model={"kwargs": {"classes": 5}, "label_map": {"cat": 4, "dog": 0, "eel": 2}}))
    frame = rows(tmp_path / "out", "clean")
    expected = np.array([4, 0, 2])[frame["label"]]
    np.testing.assert_array_equal(frame["correct"], frame["prediction"] == expected)
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_kept_columns_are_carried_through_unchanged(write_config: WriteConfig, tmp_path: Path) -> None:
    source = write_parquet(
        tmp_path / "wide",
        [png_bytes(image) for image in random_pixels(20)],
        [0] * 20,
        caption=(datasets.Value("string"), [f"number {i}" if i else None for i in range(20)]),
        boxes=(datasets.List(datasets.Value("int32")), [[i, i + 1] for i in range(20)]),
    )
    generate(write_config(source={"path": str(source), "keep_columns": ["caption", "boxes"]}))
    loaded = load(tmp_path / "out", "eps-2")
    assert loaded.features["boxes"] == datasets.List(datasets.Value("int32"))
    for row in loaded:
        index = row["source_index"]
        assert row["caption"] == (f"number {index}" if index else None)
        assert row["boxes"] == [index, index + 1]


def test_splits_of_one_run_share_a_folder(write_config: WriteConfig, tmp_path: Path) -> None:
    images = [png_bytes(image) for image in random_pixels(12)]
    write_parquet(tmp_path / "two", images, [0, 1, 2] * 4, split="train")
    write_parquet(tmp_path / "two", images[:5], [0, 1, 2, 0, 1], split="test")
    generate(write_config(source={"path": str(tmp_path / "two"), "split": ["train", "test"]}))
    loaded = datasets.load_dataset(str(tmp_path / "out"), "eps-8")
    assert {name: len(split) for name, split in loaded.items()} == {"train": 12, "test": 5}


def test_limit_takes_the_head_of_the_shuffled_order(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    generate_once(config)
    generate(config, "--limit", "10", "--output", str(tmp_path / "few"))
    few = rows(tmp_path / "few", "clean")["source_index"].tolist()
    assert few == rows(tmp_path / "out", "clean")["source_index"].tolist()[:10]
    assert few != sorted(few)


def test_a_file_may_not_stand_where_the_folder_should(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for path in ("out", "out/deeper"):
        result = fgsm("generate", write_config(), "--output", str(tmp_path / path))
        assert result.exit_code == 2
        assert f"Error: output.path: {tmp_path}/out " in result.stderr


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_with_other_content_is_left_alone(
    write_config: WriteConfig, tmp_path: Path, overwrite: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    result = fgsm("generate", write_config(), *overwrite)
    assert result.exit_code == 2
    assert "thesis.tex" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_unwritable_place_is_one_sentence(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # CI runs as root, which permissions do not stop; nobody can make a folder in /proc.
    monkeypatch.setattr("pipeline.output.disk.free_bytes", lambda _: 10**9)
    result = fgsm("generate", write_config(output={"path": "/proc/fgsm-out"}))
    assert result.exit_code == 1
    assert f"/proc/fgsm-out: {os.strerror(errno.ENOENT)}" in result.stderr


def test_a_disk_that_refuses_in_the_middle_keeps_what_is_committed(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(output={"images_per_shard": 30})
    generate(config, "--output", str(tmp_path / "reference"))
    sizes = sorted(path.stat().st_size for path in (tmp_path / "reference").rglob("*.parquet"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The second shard's 10 images fit, the first one's 30 do not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[3] - 1000, hard))
    try:
        result = fgsm("generate", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert os.strerror(errno.EFBIG) in result.stderr
    assert list((tmp_path / "out").rglob("*.parquet")) == []
    generate(config)
    assert digests(tmp_path / "out") == digests(tmp_path / "reference")


@pytest.mark.parametrize("images_per_shard", [6, 12])
def test_batches_behind_one_that_fails_are_not_committed(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images_per_shard: int
) -> None:
    # The batch after it is already waiting by then, and ends the same shard or is a shard of its own.
    calls = []

    def fail_once(images_u8: Tensor, image_format: ImageFormat) -> pa.StructArray:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.3)
            raise PipelineError("the codec failed")
        return encode_column(images_u8, image_format)

    monkeypatch.setattr("pipeline.flow.check_disk", lambda *_, **__: None)
    monkeypatch.setattr("pipeline.layouts.base.encode_column", fail_once)
    config = write_config(output={"images_per_shard": images_per_shard})
    result = fgsm("generate", config)
    assert result.exit_code == 1
    assert "the codec failed" in result.stderr
    assert list((tmp_path / "out").rglob("*.parquet")) == []
    generate(config)
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_too_little_free_space_is_noticed_before_starting(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    result = fgsm("generate", write_config())
    assert result.exit_code == 1
    assert re.search(r"Error: output\.path: .*10\.0 KB", result.stderr)
    assert not (tmp_path / "out").exists()
    assert "10.0 KB" in fgsm("plan", write_config()).stderr


def test_the_estimate_of_bytes_is_close(write_config: WriteConfig, tmp_path: Path) -> None:
    from pipeline.engine.estimate import estimate_bytes

    config = write_config()
    generate_once(config)
    run = open_run(load_config(str(config)))
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.parquet"))
    # Small files are mostly footers: 9 files of some 6 KB.
    assert written * 0.3 < estimate_bytes(run, run.plan.shards) < written * 1.5


def test_non_finite_numbers_stop_the_run_and_name_the_batch(
    write_config: WriteConfig, factory_file: Path, tmp_path: Path
) -> None:
    result = fgsm("generate", write_config(model={"name": f"{factory_file}:Broken"}))
    assert result.exit_code == 1
    assert re.search(r"\bNaN\b.* test-00000-of-00003, rows 0 to 5", result.stderr)
    assert list((tmp_path / "out").rglob("*.parquet")) == []


def test_resuming_under_other_versions_warns_and_goes_on(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    path = tmp_path / "out/manifest.json"
    content = manifest(tmp_path / "out")
    content["versions"]["torch"] = "1.0"
    write_sealed(path, content)
    output = generate(write_config())
    assert re.search(rf"torch 1\.0\b.* {re.escape(importlib.metadata.version('torch'))} ", output)


def test_a_broken_manifest_is_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    (tmp_path / "out/manifest.json").write_text("{")
    result = fgsm("generate", write_config())
    assert result.exit_code == 1
    assert f"{tmp_path}/out/manifest.json " in result.stderr
    generate(write_config(), "--overwrite")


def test_of_a_broken_manifest_all_shards_are_kept(write_config: WriteConfig, tmp_path: Path) -> None:
    """What the message advises is done as it says, and nothing is written again but the manifest."""
    generate_once(write_config())
    path, before = tmp_path / "out/manifest.json", digests(tmp_path / "out")
    path.write_text("{")
    result = fgsm("generate", write_config())
    assert re.search(rf"{path} .*\bdelete\b", result.stderr)
    assert "--overwrite" not in result.stderr
    path.unlink()
    assert "3 of 3 shards" in generate(write_config())
    assert digests(tmp_path / "out") == before
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_an_altered_manifest_without_receipts_is_started_over(write_config: WriteConfig, tmp_path: Path) -> None:
    """Deleted, it would leave a folder of which nothing says that it is ours."""
    generate_once(write_config())
    path = tmp_path / "out/manifest.json"
    shutil.rmtree(tmp_path / "out/.run")
    path.write_text(json.dumps({**manifest(tmp_path / "out"), "rows": 1}))
    result = fgsm("generate", write_config())
    assert re.search(rf"Error: {path} .*--overwrite", result.stderr)
    generate(write_config(), "--overwrite")
    assert fgsm("verify", tmp_path / "out").exit_code == 0


def test_a_manifest_of_another_version_is_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    path = tmp_path / "out/manifest.json"
    # As version 0.1.0 wrote it at first: counts belonged to files.
    content = {**manifest(tmp_path / "out"), "format": 1}
    for file in content["files"]:
        file["level"] = 8
    path.write_text(json.dumps(content))
    for command, argument in (
        ("generate", write_config()),
        ("verify", tmp_path / "out"),
        ("inspect", tmp_path / "out"),
    ):
        result = fgsm(command, argument)
        assert result.exit_code == 1
        assert re.search(rf"Error: {path} .*\b1\b.*\b{FORMAT_VERSION}\b.*--overwrite", result.stderr.splitlines()[-1])
    generate(write_config(), "--overwrite")
    assert fgsm("verify", tmp_path / "out").exit_code == 0


def test_requested_and_stored_epsilons_are_printed_side_by_side(write_config: WriteConfig) -> None:
    result = fgsm("plan", write_config(attack={"epsilons": [0.031, "16/255"]}))
    assert re.search(r"^epsilon 0\.031 .* 7/255 = 0\.027451", result.stderr, re.M)
    assert re.search(r"^Warning: .*\b0\.031 .* 8/255", result.stderr, re.M)
    assert "17/255" not in result.stderr


def test_plan_says_what_generate_writes_and_writes_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    result = fgsm("plan", write_config())
    assert result.exit_code == 0
    assert not (tmp_path / "out").exists()
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert lines["rows"].strip() == "120"
    assert re.findall(r"\d+", lines["files"])[:2] == ["9", "3"]
    assert "40 (test 40), 16x16 RGB" in lines["source images"]
    generate(write_config())
    assert manifest(tmp_path / "out")["run_id"] in lines["output"]


def test_inspect_shows_what_the_rows_add_up_to(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    frame = rows(tmp_path / "out", "eps-8")
    line = next(line for line in fgsm("inspect", tmp_path / "out").stdout.splitlines() if " eps-8 " in line)
    cells = line.split()
    assert cells[2:7] == [
        "8/255",
        "40",
        f"{frame['correct'].mean():.2%}",
        f"{frame['confidence'].mean():.3f}",
        str(frame["fooled"].sum()),
    ]


def test_the_table_is_on_stdout_and_the_next_commands_are_not(write_config: WriteConfig, tmp_path: Path) -> None:
    result = fgsm("generate", write_config())
    assert result.stdout.startswith("split  subset")
    assert f"fgsm verify {tmp_path / 'out'} --recompute" in result.stderr
    assert "Next:" not in result.stdout


def test_grayscale_is_stored_as_png(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config(preprocess={"mode": "L"}, model={"kwargs": {"channels": 1}}))
    image = load(tmp_path / "out", "eps-8")[0]["image"]
    assert (image.mode, image.format) == ("L", "PNG")


def test_resize_and_crop_fix_mixed_sizes(write_config: WriteConfig, tmp_path: Path) -> None:
    images = [png_bytes(random_pixels(1, side=side)[0]) for side in (16, 20, 33, 17)]
    source = write_parquet(tmp_path / "mixed", images, [0, 1, 2, 0])
    generate(write_config(source={"path": str(source)}, preprocess={"resize": 18, "crop": 16}))
    assert {image.size for image in load(tmp_path / "out")["image"]} == {(16, 16)}


def test_an_imagefolder_goes_the_same_way(write_config: WriteConfig, tmp_path: Path) -> None:
    for index, pixels_u8 in enumerate(random_pixels(9)):
        path = tmp_path / "photos" / CLASSES[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_u8).save(path)
    generate(write_config(source={"kind": "imagefolder", "path": str(tmp_path / "photos")}))
    assert load_train(tmp_path / "out").features["label"].names == list(CLASSES)


# A victim that moves the source away while the run goes on: at its first batch, or once a shard is committed.
MOVING = f"""
from pathlib import Path
{FACTORY}
HERE = Path(__file__).parent

class Moving(Net):
    def forward(self, x):
        when, receipts = HERE / "when", HERE / "out/.run/receipts"
        if when.exists() and (when.read_text() == "at once" or any(receipts.glob("*.json"))):
            (HERE / "photos/dog").rename(HERE / "away")
            when.unlink()
        return super().forward(x)

def moving():
    return Moving()
"""


@pytest.mark.parametrize(
    ("when", "workers"),
    [("at once", 1), *(pytest.param(when, 0, marks=pytest.mark.slow) for when in ("at once", "a shard is there"))],
)
def test_a_source_that_vanishes_loses_no_row(
    write_config: WriteConfig, tmp_path: Path, when: str, workers: int
) -> None:
    for index, pixels_u8 in enumerate(random_pixels(60)):
        path = tmp_path / "photos" / CLASSES[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_u8).save(path)
    (tmp_path / "moving.py").write_text(MOVING)
    config = write_config(
        source={"kind": "imagefolder", "path": str(tmp_path / "photos")},
        model={"name": f"{tmp_path}/moving.py:moving"},
        output={"images_per_shard": 6},
        runtime={"batch_size": 1, "max_skipped": 0.9, "workers": workers},
    )
    (tmp_path / "when").write_text(when)
    result = fgsm("generate", config)
    assert result.exit_code == 1, result.output
    assert re.search(r"Error: source: \S+/photos/dog/\d+\.png ", result.stderr)
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "out/.run/receipts").glob("*.json")]
    assert len(receipts) < 10
    assert bool(receipts) == (when != "at once")
    assert not any(receipt["skipped"] for receipt in receipts)
    (tmp_path / "away").rename(tmp_path / "photos/dog")
    generate(config)
    generate(config, "--output", str(tmp_path / "undisturbed"))
    assert manifest(tmp_path / "out")["rows"] == 60
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def load_train(folder: Path) -> Any:
    return datasets.load_dataset(str(folder), "eps-2", split="train")


def test_a_shipped_config_runs_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = fgsm("generate", "digits", "--limit", "12", "--set", "runtime.workers=0", "--set", "runtime.device=cpu")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out/digits"
    assert {row["split"]: row["rows"] for row in manifest(out)["subsets"]} == {"train": 12, "test": 12}
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert [config["config_name"] for config in front["configs"]] == [
        "all",
        "clean",
        "eps-8",
        "eps-16",
        "eps-32",
        "eps-64",
    ]
    assert len({config["description"] for config in front["configs"]}) == 6
    assert all(manifest(out)["run_id"] in config["description"] for config in front["configs"])


def test_without_a_terminal_progress_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline"), Progress(100, 20, ["clean", "eps-8"], log_seconds=0) as progress:
        progress.update(30, 30, {"clean": 30, "eps-8": 3})
    assert re.search(r"\b50 of 100 .*50%.*images/s.*clean 100% eps-8 10%", caplog.text)


def test_progress_lines_are_30_seconds_apart(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.engine.progress.time.monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, "pipeline"), Progress(100, 0, ["clean"]) as progress:
        for second in range(0, 100, 5):
            clock[0] = float(second)
            progress.update(1, 1, {"clean": 1})
    assert len([line for line in caplog.messages if "images/s" in line]) == 3


def test_a_run_that_another_one_overtakes_is_refused(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config()

    def overtake(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        generate(config, "--set", "output.images_per_shard=20")

    monkeypatch.setattr("pipeline.flow.check_disk", overtake)
    result = fgsm("generate", config)
    assert result.exit_code == 1
    assert f"Error: {tmp_path}/out " in result.stderr
    assert len(list((tmp_path / "out/clean").iterdir())) == 2


def test_a_lost_manifest_does_not_lose_the_shards(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    generate_once(config)
    before = digests(tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    result = fgsm("generate", config, "--set", "runtime.seed=1")
    assert result.exit_code == 2
    assert f"Error: output.path: {tmp_path}/out " in result.stderr
    assert "3 of 3 shards" in generate(config)
    assert digests(tmp_path / "out") == before
    assert fgsm("verify", tmp_path / "out").exit_code == 0


def test_the_output_may_not_lie_in_the_source(write_config: WriteConfig, image_parquet: Path) -> None:
    result = fgsm("generate", write_config(output={"path": str(image_parquet / "out")}))
    assert result.exit_code == 2
    assert f"Error: output.path: {image_parquet}/out " in result.stderr
    assert not (image_parquet / "out").exists()


def test_overwriting_counts_the_space_that_it_frees(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(output={"images_per_shard": 40})
    generate_once(config)
    monkeypatch.setattr("pipeline.output.disk.free_bytes", lambda _: 60_000)
    assert fgsm("generate", config, "--output", str(tmp_path / "second")).exit_code == 1
    generate(config, "--overwrite")


def test_split_names_become_file_names_that_load(write_config: WriteConfig, tmp_path: Path) -> None:
    for split in ("train", "train-b"):
        for index, pixels_u8 in enumerate(random_pixels(6)):
            path = tmp_path / "photos" / split / CLASSES[index % 3] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_u8).save(path)
    photos = {"kind": "imagefolder", "path": str(tmp_path / "photos"), "split": ["train", "train-b"]}
    generate(write_config(source=photos))
    loaded = datasets.load_dataset(str(tmp_path / "out"), "eps-8")
    assert {name: len(split) for name, split in loaded.items()} == {"train": 6, "train_b": 6}


def test_the_printed_commands_survive_odd_paths(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = fgsm("generate", write_config(), "--output", "~/it's here")
    assert result.exit_code == 0
    out = tmp_path / "it's here"
    commands = [shlex.split(line.removeprefix("Next:")) for line in result.stderr.splitlines()[-3:]]
    assert commands[0] == ["fgsm", "verify", str(out), "--recompute"]
    assert commands[2][:2] == ["python", "-c"]
    exec(commands[2][2])
    assert fgsm("inspect", "~/it's here").exit_code == 0


def test_a_relative_model_is_found_again_from_another_folder(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generate(write_config(), "--set", "model.name=victim.py:make")
    monkeypatch.chdir("/")
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_a_module_in_the_working_folder_is_a_factory(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_victims.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    generate(write_config(model={"name": "my_own_victims:make"}))


def test_rounding_to_the_nearest_level_does_not_warn_of_the_next(write_config: WriteConfig) -> None:
    result = fgsm("plan", write_config(attack={"epsilons": [0.031], "rounding": "nearest"}))
    assert re.search(r"^epsilon 0\.031 .* 8/255", result.stderr, re.M)
    assert "lies just below" not in result.stderr


def test_large_batches_are_cut_into_row_groups(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr("pipeline.output.shards.ROW_GROUP_BYTES", 3000)
    generate(write_config(runtime={"batch_size": 16}))
    metadata = pq.ParquetFile(shard_path(tmp_path, "out/clean/test-00000-of-00003.parquet")).metadata
    rows_of = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(rows_of) == 16
    assert max(rows_of) <= 5
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_what_failed_first_is_what_the_user_reads(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # A full disk also refuses the manifest that is written on the way out.
    def fail(*_: Any) -> list[bytes]:
        monkeypatch.setattr("pipeline.flow.write_summaries", refuse)
        raise PipelineError("the shard could not be written")

    def refuse(*_: Any) -> None:
        raise PipelineError("the manifest could not be written")

    monkeypatch.setattr("pipeline.flow.check_disk", lambda *_, **__: None)
    monkeypatch.setattr("pipeline.layouts.base.encode_column", fail)
    result = fgsm("generate", write_config())
    assert result.exit_code == 1
    assert "the shard could not be written" in result.stderr
    assert "the manifest" not in result.stderr


def test_batches_that_wait_when_one_fails_are_not_written(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They must not complete its shard."""
    tried = []

    def refuse(self: ShardWriter, tables: Sequence[pa.Table]) -> None:
        tried.append((self.shard.name, len(tables)))
        raise PipelineError("the batch could not be written")

    monkeypatch.setattr(ShardWriter, "write", refuse)
    result = fgsm("generate", write_config(runtime={"batch_size": 4}))
    assert result.exit_code == 1
    assert "the batch could not be written" in result.stderr
    assert len(tried) == 1
    assert not list((tmp_path / "out/.run/receipts").glob("*.json"))


def test_a_file_system_without_locks_is_one_sentence(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    # Only there: `datasets` locks its cache.
    monkeypatch.setattr("pipeline.output.local.fcntl", SimpleNamespace(**{**vars(fcntl), "flock": no_locks}))
    result = fgsm("generate", write_config())
    assert result.exit_code == 2
    assert os.strerror(errno.ENOLCK) in result.stderr
    assert "--unlocked" in result.stderr
    assert "in use" not in result.stderr
    assert f"{tmp_path}/out " in generate(write_config(), "--unlocked")
