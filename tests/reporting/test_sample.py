"""The rows that a report reads, those that it shows, and its plots."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
import pipeline.core.errors
from pipeline.reporting.findings import by_interest, focus_on, images_of, share_of_surer, source_name, sureness
from pipeline.reporting.gallery import choose_rows
from pipeline.reporting.page import write_report
from pipeline.reporting.plots import RIGHT, SOFT, Curve, draw_curves, model_curve, shortened
from pipeline.reporting.sample import Sample, read_sample
from tests.conftest import (
    LAYOUTS,
    WriteConfig,
    fgsm,
    generate,
    generate_once,
    shard_path,
)
from tests.support.page import NASTY, make, opened, opened_png, self_labelled
from tests.support.variants import fgsm_at


def damage(path: Path, groups: range) -> None:
    """Overwrite the pages of some row groups of a file; its footer stays."""
    file, data = pq.ParquetFile(path), bytearray(path.read_bytes())
    for group in groups:
        columns = [file.metadata.row_group(group).column(index) for index in range(file.metadata.num_columns)]
        start = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
        end = start + sum(column.total_compressed_size for column in columns)
        data[start:end] = bytes([0xEE]) * (end - start)
    path.write_bytes(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_more_is_read_than_the_sample_needs(
    layout: str, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files but three, and all row groups but the first of those, are destroyed: whoever read them would fail."""
    monkeypatch.setattr("pipeline.output.shards.ROW_GROUP_ROWS", 6)
    for module in ("sample", "page"):
        monkeypatch.setattr(f"pipeline.reporting.{module}.SAMPLE_SHARDS", 3)
    monkeypatch.setattr("pipeline.reporting.page.SAMPLE_ROWS", 12)
    generate(write_config(output={"layout": layout, "images_per_shard": 12}, runtime={"batch_size": 6}))
    assert len(list((tmp_path / "out").glob("*/test-00000-*"))) == (3 if layout == "images" else 1)
    for path in (tmp_path / "out").rglob("*.parquet"):
        groups = pq.ParquetFile(path).num_row_groups
        damage(path, range(0 if "test-00003" in path.name else 1, groups))
    page = make(tmp_path / "out")
    assert "a sample of 12 of 40 test images" in page.words
    assert "A sample is the first rows of up to 3 shards, which are cut from a permutation of the split." in page.words
    assert page.tables["Counts at each epsilon"][1][1] == "40"
    # The damage is one that a reader notices.
    monkeypatch.setattr("pipeline.reporting.page.SAMPLE_ROWS", 40)
    result = fgsm("report", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(r"Error: \S+\.parquet .*fgsm verify\b.*\n$", result.stderr)


def test_a_sample_is_filled_from_the_shards_there_are() -> None:
    from pipeline.reporting.sample import SAMPLE_SHARDS, _shares

    assert _shares({"a": 5, "b": 100, "c": 100}, 1000) == {"a": 5, "b": 100, "c": 100}
    assert _shares({"b": 100, "a": 5, "c": 0, "d": 100}, 40) == {"b": 10, "a": 5, "d": 10}
    many = _shares({f"{index:04d}": 4096 for index in range(1000)}, 10_000)
    assert sum(many.values()) == 10_000
    assert len(many) == SAMPLE_SHARDS
    assert list(many) == [f"{1000 * index // SAMPLE_SHARDS:04d}" for index in range(SAMPLE_SHARDS)]
    assert _shares({}, 10) == {}


def test_a_sample_in_the_source_s_order_may_not_be_fair(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.reporting.page.SAMPLE_ROWS", 12)
    own = self_labelled(tmp_path, "abc")
    generate(write_config(**{**own, "source": {**own["source"], "shuffle": False}}))
    page = make(tmp_path / "out")
    assert "which are cut from the source in its own order, so the sample may not be representative." in page.words


def test_a_picture_that_cannot_be_decoded_is_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(**self_labelled(tmp_path, "abc")))
    path = next((tmp_path / "out/clean").glob("*.parquet"))
    table = pq.read_table(path)
    broken = pa.array([{"bytes": b"RIFF", "path": None}] * len(table), table.schema.field("image").type)
    folder, manifest = opened(tmp_path / "out")
    pq.write_table(table.set_column(0, table.schema.field("image"), broken), path)
    place = rf"test-0000\d-of-00004-{manifest.run_id}"
    with pytest.raises(pipeline.core.errors.PipelineError, match=rf"\d+ of {place} .*fgsm verify"):
        write_report(folder, manifest)


@pytest.mark.parametrize("change", ["rows", "column", "gone"])
def test_files_that_do_not_fit_are_one_sentence(change: str, write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    folder, manifest = opened(tmp_path / "out")
    path = shard_path(tmp_path, "out/eps-8/test-00001-of-00003.parquet")
    table = pq.read_table(path)
    if change == "rows":
        pq.write_table(table.slice(1), path)
    elif change == "column":
        pq.write_table(table.drop_columns(["source_index"]), path)
    else:
        path.unlink()
    with pytest.raises(pipeline.core.errors.PipelineError, match=rf"^\S*{path.name} .*fgsm verify"):
        write_report(folder, manifest)


# ----------------------------------------------------------------------------------------------------- what it chooses


def sample_of(success: Sequence[Sequence[int]], confidence: Sequence[Sequence[float]], **fields: Any) -> Sample:
    """A sample of two classes from its flips; clean first, all right when clean."""
    flipped = np.array(success, dtype=bool)
    count = flipped.shape[1]
    classes = np.arange(count) % 2
    values: dict[str, Any] = {
        "split": "test",
        "rows": count,
        "labelled": True,
        "variants": fgsm_at(0, 2, 8, 16, model="digits")[: len(flipped)],
        "prediction": np.where(flipped, 1 - classes, classes),
        "confidence": np.array(confidence, dtype=np.float32),
        "right": ~flipped,
        "success": flipped,
        "target": None,
        "shards": ("test-00000-of-00001",),
        "shard": np.zeros(count, dtype=np.int64),
        "place": np.arange(count),
    }
    return Sample(**{**values, **fields})


def test_the_most_instructive_rows_are_chosen() -> None:
    none = [0] * 8
    success = [none, [0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    clean = [0.9, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9]
    small = [0.9, 0.6, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9]
    large = [0.9, 0.6, 0.6, 0.6, 0.6, 0.998, 0.7, 0.8]
    largest = [0.999, 0.6, 0.6, 0.6, 0.6, 0.999, 0.7, 0.8]
    sample = sample_of(success, [clean, small, large, largest])
    (easy, text, first), (_, _, second), (_, held, third) = choose_rows(sample, sample.variants)
    assert easy == "Fooled by the smallest step"
    assert text.startswith("2/255 is enough.")
    # One of each class first, the surest when clean: 4 is of class 0, 3 of class 1.
    assert first == [4, 3, 2]
    # 0 and 5 are equally sure mistakes in whole percents; that of 5 needs the smaller step.
    assert second == [5, 0, 1]  # and 4, 3 and 2 are shown already
    assert third == [7, 6]
    assert held.startswith("Up to 16/255")


def test_where_none_resists_those_are_shown_that_hold_out_longest() -> None:
    success = [[0] * 8, [1] * 7 + [0], [1] * 8]
    groups = choose_rows(sample_of(success, [[0.9] * 8] * 3), fgsm_at(0, 2, 8, model="digits"))
    title, text, chosen = groups[-1]
    assert (title, chosen) == ("Those that resist", [7])
    assert text == "None resists every epsilon; these fail only at 8/255."
    together = choose_rows(sample_of([[0] * 8, [1] * 8], [[0.9] * 8] * 2), fgsm_at(0, 2, model="digits"))
    assert [title for title, _, _ in together] == ["Fooled by the smallest step", "The most confident when fooled"]


def test_who_is_called_the_target_when_clean_resists_nothing() -> None:
    sample = sample_of([[0] * 4, [0] * 4], [[0.9] * 4] * 2, target=np.array([0, 0, 0, 0]))
    assert [chosen for _, _, chosen in choose_rows(sample, sample.variants)] == [[1, 3]]


def test_what_is_said_of_a_row_holds_at_the_epsilons_that_are_not_shown(digits: Path) -> None:
    """Row 0 is fooled from the second of ten epsilons on, 1 at the sixth only, 2 from the last but one."""
    _, manifest = opened(digits)
    levels = tuple(range(11))
    fooled = {0: range(2, 11), 1: [6], 2: range(9, 11), 3: []}
    success = [[level in fooled[row] for row in fooled] for level in levels]
    sure = [[0.9, 0.99 if level == 6 else 0.9, 0.9, 0.9] for level in levels]
    focus = focus_on(manifest, sample_of(success, sure, variants=fgsm_at(*levels, model="digits")))
    assert focus.shown == fgsm_at(
        0, 1, 2, 3, 5, 8, 9, 10, model="digits"
    )  # 2 and 9: where the first and the last give in
    groups = {title: (text, chosen) for title, text, chosen in choose_rows(focus.sample, focus.shown)}
    text, chosen = groups["Fooled by the smallest step"]
    assert (text[:16], chosen) == ("2/255 is enough.", [0])
    assert groups["The most confident when fooled"][1] == [2]  # that of 1 could not be seen
    assert groups["Those that resist"][1] == [3]


def test_no_row_is_shown_twice(digits: Path) -> None:
    folder, manifest = opened(digits)
    sample = read_sample(folder, manifest, "test", 10_000)
    assert sample is not None
    groups = choose_rows(sample, sample.variants)
    chosen = [row for _, _, own in groups for row in own]
    assert len(groups) == 3
    assert len(chosen) == len(set(chosen)) == 9


def test_the_focus_is_the_smallest_epsilon_that_reaches_half(digits: Path) -> None:
    _, manifest = opened(digits)
    sure = [[0.9] * 4] * 4
    for flips, level in [
        ([[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]], 8),
        ([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], 8),
        ([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], 16),
    ]:
        assert focus_on(manifest, sample_of([[0] * 4, *flips], sure)).variant.level == level
    assert by_interest(["train", "test"]) == ["test", "train"]
    assert by_interest(["train", "validation", "test"]) == ["test", "validation", "train"]
    assert by_interest(["a", "b"]) == ["b", "a"]


def test_surer_counts_those_that_gain_confidence(digits: Path) -> None:
    sample = sample_of([[0, 0, 0], [1, 1, 0]], [[0.6, 0.8, 0.9], [0.9, 0.7, 1.0]])
    assert share_of_surer(focus_on(opened(digits)[1], sample)) == 0.5
    right, wrong = sureness(sample)
    assert right == pytest.approx((2.3 / 3, 1.0))
    assert wrong[0] is None
    assert wrong[1] == pytest.approx(0.8)


def test_sources_have_the_names_that_people_use() -> None:
    assert source_name({"kind": "huggingface", "path": "uoft-cs/cifar10"}) == "uoft-cs/cifar10"
    assert source_name({"kind": "imagefolder", "path": "/data/my photos/cats"}) == "cats"
    assert source_name({"kind": "digits", "path": None}) == "digits"


@pytest.mark.parametrize(
    ("split", "stored", "said"),
    [(None, "train", "images"), (["train"], "train", "train images"), (None, "test", "test images")],
)
def test_a_split_that_nobody_named_is_not_told(digits: Path, split: list[str] | None, stored: str, said: str) -> None:
    """A folder without splits is stored as `train`, and may hold test images."""
    manifest = opened(digits)[1]
    config = {**manifest.config, "source": {**manifest.config["source"], "split": split}}
    only = manifest.model_copy(update={"config": config, "split_rows": {stored: 120}})
    assert images_of(only, stored) == said


# --------------------------------------------------------------------------------------------------------------- plots


def test_plots_have_no_traces_of_when(digits: Path) -> None:
    curves = [Curve("a", (1.0, None, 0.0), RIGHT, "o"), Curve("b", (0.5, 0.5, 0.5), SOFT, "s", dashed=True)]
    plot, again = (draw_curves(fgsm_at(0, 2, 8), curves, "it") for _ in range(2))
    assert plot == again
    image = opened_png(plot)
    assert image.convert("RGB").getpixel((0, 0)) == (0xFF, 0xFF, 0xFF)
    assert set(image.info) == {"dpi"}
    assert set(opened_png((digits / "assets/examples.png").read_bytes()).info) == {"dpi"}


def test_models_of_the_same_colour_have_other_markers() -> None:
    curves = [model_curve("a", (0.1, 0.2), index) for index in range(35)]
    assert len({(curve.colour, curve.marker) for curve in curves}) == 35


@pytest.mark.parametrize("name", NASTY)
def test_a_model_of_any_name_can_be_drawn(name: str) -> None:
    plot = draw_curves(fgsm_at(0, 1), [model_curve(name, (0.5, None), 7)], name)
    assert opened_png(plot).width < 1500


def test_names_are_shortened_in_the_middle() -> None:
    assert shortened("automobile") == "automobile"
    assert shortened("a very long name of a class", 11) == "a ver…class"
    assert shortened(" \n\u202e ") == "(no name)"
    assert shortened("a\nb") == "a b"
    assert all(len(shortened(name)) <= 14 for name in NASTY)
