"""The report: the page, and what it says."""

import base64
import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

import pipeline
import pipeline.core.errors
from pipeline.output.folder import OutputFolder, report_files, reported_receipts
from pipeline.reporting.findings import focus_on
from pipeline.reporting.gallery import choose_rows, make_groups, web_image
from pipeline.reporting.page import report, write_report
from pipeline.reporting.sample import read_sample
from tests.conftest import (
    FACTORY,
    KINDS,
    LAYOUTS,
    WriteConfig,
    fgsm,
    generate,
    generate_once,
    png_bytes,
    random_pixels,
    rows,
    shard_path,
    without_run,
    write_parquet,
)
from tests.support.page import Page, make, opened, self_labelled
from tests.support.variants import fgsm_at


def test_generate_ends_with_a_report_and_makes_it_once(write_config: WriteConfig, tmp_path: Path) -> None:
    config, page = write_config(), tmp_path / "out/report.html"
    first = fgsm("generate", config)
    assert first.exit_code == 0
    assert f"Report: {page}" in first.stderr
    assert {path.name for path in (tmp_path / "out/assets").iterdir()} >= {
        "accuracy.png",
        "confidence.png",
        "examples.png",
    }
    folder, manifest = opened(tmp_path / "out")
    assert reported_receipts(folder) == manifest.receipts
    written = page.stat().st_mtime_ns
    assert "Report:" not in fgsm("generate", config).stderr
    assert page.stat().st_mtime_ns == written
    page.write_text(page.read_text().replace(manifest.receipts, "0" * 64))  # as after another state of the run
    assert "Report:" in fgsm("generate", config).stderr
    assert fgsm("verify", tmp_path / "out").exit_code == 0


def test_a_report_that_fails_is_no_failed_run(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    generate_once(config)
    (tmp_path / "out/assets").write_text("in the way")
    result = fgsm("generate", config)
    assert result.exit_code == 0
    assert "split  subset" in result.stdout
    line = next(line for line in result.stderr.splitlines() if line.startswith("Warning"))
    assert f"{tmp_path}/out/assets" in line
    assert line.endswith(f"fgsm report {tmp_path / 'out'}")
    assert "Traceback" not in result.stderr
    assert "Traceback" in fgsm("generate", config, "--debug").stderr
    assert fgsm("report", tmp_path / "out").exit_code == 1


OWN_PICTURES = ["accuracy.png", "confidence.png", "examples.png"]


def test_report_names_the_page_and_keeps_the_pictures_of_others(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    for name in ("transfer.png", "mine.png"):
        (copy / "assets" / name).write_bytes(b"")
    result = fgsm("report", copy)
    assert result.exit_code == 0
    assert result.stdout == f"{copy / 'report.html'}\n"
    assert {path.name for path in (copy / "assets").iterdir()} == {*OWN_PICTURES, "transfer.png", "mine.png"}
    assert report_files(OutputFolder(copy)) == [*(f"assets/{name}" for name in OWN_PICTURES), "report.html"]


@pytest.mark.parametrize("name", ["assets/accuracy.png", "assets/examples.png", "report.html"])
def test_a_file_of_others_is_not_replaced_by_a_report(digits: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    (copy / name).write_bytes(b"mine")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    result = fgsm("report", copy)
    assert result.exit_code == 1
    assert str(copy / name) in result.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_pictures_that_a_killed_report_leaves_are_its_own(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    folder, manifest = opened(copy)
    monkeypatch.setattr("pipeline.reporting.page.draw_sheet", lambda _: b"another sheet")
    write, done = folder.store.write, []

    def killed(name: str, content: bytes) -> None:
        if "assets/examples.png" in done:
            raise KeyboardInterrupt
        write(name, content)
        done.append(name)

    monkeypatch.setattr(folder.store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(folder, manifest)
    assert (copy / "assets/examples.png").read_bytes() == b"another sheet"
    assert reported_receipts(folder) != manifest.receipts
    monkeypatch.undo()
    report(copy)
    assert [(copy / name).read_bytes() for name in report_files(folder)] == [
        (digits / name).read_bytes() for name in report_files(OutputFolder(digits))
    ]


def test_a_picture_that_a_report_no_longer_has_goes_if_it_is_its_own(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    (copy / "assets/examples.png").write_bytes(b"mine")
    for path in copy.rglob("*.parquet"):
        path.unlink()
    report(copy)
    assert [path.name for path in (copy / "assets").iterdir()] == ["examples.png"]


def test_overwriting_a_run_replaces_its_report(finished: Path, tmp_path: Path) -> None:
    """By a page of no receipts, of which the pictures still are: the next report replaces them, and nothing else."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "assets/mine.png").write_text("mine")
    folder = OutputFolder(out)
    of_receipts, names = reported_receipts(folder), report_files(folder)
    pictures = {name: (out / name).read_bytes() for name in names[:-1]}
    assert len(pictures) == len(list((out / "assets").iterdir())) - 1
    generate(finished.parent / "config.yaml", "--output", str(out), "--overwrite")
    assert reported_receipts(folder) == ""
    page = (out / "report.html").read_text()
    assert len(page) < 1000
    assert "This dataset is being written anew" in page
    assert report_files(folder) == names
    report(out)
    assert (reported_receipts(folder), report_files(folder)) == (of_receipts, names)
    assert {name: (out / name).read_bytes() for name in names[:-1]} == pictures
    assert (out / "assets/mine.png").read_text() == "mine"


def test_overwriting_a_run_leaves_a_page_that_no_report_wrote(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    (tmp_path / "out/report.html").write_text("<html>")
    (tmp_path / "out/assets").mkdir()
    (tmp_path / "out/assets/accuracy.png").write_text("a plot")
    generate(write_config(), "--overwrite")
    assert (tmp_path / "out/report.html").read_text() == "<html>"
    assert [path.name for path in (tmp_path / "out/assets").iterdir()] == ["accuracy.png"]
    assert (tmp_path / "out/assets/accuracy.png").read_text() == "a plot"


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xfe"])
def test_what_is_no_report_of_ours_is_of_no_receipts(tmp_path: Path, content: bytes) -> None:
    folder = OutputFolder(tmp_path)
    assert reported_receipts(folder) is None
    (tmp_path / "report.html").write_bytes(content)
    assert reported_receipts(folder) is None


def test_a_folder_that_is_no_output_is_one_sentence(tmp_path: Path) -> None:
    result = fgsm("report", tmp_path)
    assert result.exit_code == 2
    assert re.fullmatch(rf"Error: {tmp_path} .*manifest\.json\.\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- what it says


def test_the_counts_are_those_of_the_manifest(digits: Path, page: Page) -> None:
    _, manifest = opened(digits)
    head, *rows = page.tables["Counts at each epsilon"]
    assert head == ["epsilon", "images", "accuracy", "mean confidence", "fooled", "size"]
    assert [row[0] for row in rows if len(row) == 1] == ["test", "train"]
    by_page = [row for row in rows if len(row) > 1]
    assert len(by_page) == len(manifest.subsets) == 10
    for row, subset in zip(by_page, sorted(manifest.subsets, key=lambda each: each.split), strict=True):
        assert row[0] == (f"{subset.level}/255" if subset.level else "clean")
        assert row[1] == str(subset.rows) == "120"
        assert row[2] == f"{100 * subset.correct / 120:.2f}%"
        assert row[3] == f"{100 * subset.confidence_sum / 120:.1f}%"
        assert row[4] == (str(subset.fooled) if subset.level else "-")


def test_confidence_of_mistakes_is_that_of_the_rows(digits: Path, page: Page) -> None:
    (alt,) = (image["alt"] or "" for image in page.all("img") if "confidence against" in (image["alt"] or ""))
    ends = []
    for subset in ("clean", "eps-64"):
        frame = rows(digits, subset)
        sure, right = frame["confidence"].to_numpy(dtype=float), frame["correct"].to_numpy(dtype=bool)
        ends.append([f"{100 * sure[of].mean():.1f}%" if of.any() else "-" for of in (right, ~right, right | ~right)])
    assert ends[1][0] == "-", "no digit is read right at the largest epsilon"
    said = zip(("right", "wrong", "all"), *ends, strict=True)
    lines = "; ".join(f"{which}, {clean} clean, {last} last" for which, clean, last in said)
    assert alt == f"Mean confidence against epsilon, test images. {lines}."


def test_the_headline_is_of_real_numbers(digits: Path, page: Page) -> None:
    _, manifest = opened(digits)
    clean, there = (next(s for s in manifest.subsets if s.split == "test" and s.level == level) for level in (0, 32))
    said = f"images is {clean.correct / 1.2:.1f}% clean; moving every pixel value by at most 32 of 255"
    assert f"{said} grey levels leaves {there.correct / 1.2:.1f}%." in page.words
    before, now = rows(digits, "clean")["confidence"], rows(digits, "eps-32")["confidence"]
    fooled = rows(digits, "eps-32")["fooled"].astype(bool)  # 32: the smallest that fools half of the test digits
    assert 60 <= fooled.sum() < 120
    surer = f"{100 * (now > before)[fooled].mean():.0f}%"
    said = f"the model is {100 * now[fooled].mean():.0f}% sure of its answer on average, and surer than when the image"
    assert f"{said} was clean in {surer} of the cases." in page.words


def test_the_same_dataset_gives_the_same_bytes_but_for_the_sessions(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(digits, copy)
    report(copy)
    names = ["report.html", *(f"assets/{name}.png" for name in ("accuracy", "confidence", "examples"))]
    for name in names:
        assert (digits / name).read_bytes() == (copy / name).read_bytes()
    session = {
        "images": 240,
        "images_per_second": 1537.25,
        "device": "cpu <AVX>",
        "busy": {"load": 0.01, "attack": 0.88},
    }
    lines = [json.dumps(session), "no json", '{"images": 3}', json.dumps(session)]
    (copy / ".run/sessions.jsonl").write_text("\n".join(lines))
    page = make(copy)
    (caption,) = (caption for caption in page.tables if caption.startswith("How fast"))
    assert page.tables[caption] == [
        ["session", "images", "images/s", "load", "attack", "device"],
        ["1", "240", "1,537.2", "1%", "88%", "cpu <AVX>"],
        ["2", "240", "1,537.2", "1%", "88%", "cpu <AVX>"],
    ]


def test_the_run_can_be_read_off(digits: Path, page: Page) -> None:
    _, manifest = opened(digits)
    for said in (
        f"Run {manifest.run_id}",
        "240 of 240, 64 x 64 pixels, 1 channel",
        "8/255, 16/255, 32/255, 64/255",
        f"torch {manifest.versions['torch']}",
        "None: every source row is in the dataset.",
        "images_per_shard: 4096",
    ):
        assert said in page.words


def test_skipped_rows_are_listed_with_their_reasons(write_config: WriteConfig, tmp_path: Path) -> None:
    images: list[bytes | None] = [png_bytes(image) for image in random_pixels(40)]
    images[3], images[7] = b"no image <b>", None
    source = write_parquet(tmp_path / "broken", images, [i % 3 for i in range(40)])
    generate_once(write_config(source={"path": str(source)}, runtime={"max_skipped": 0.5}))
    page, (_, manifest) = make(tmp_path / "out"), opened(tmp_path / "out")
    assert "2 of 40 source rows could not be read." in page.words
    listed = page.tables["Rows of the source that are not in the dataset"][1:]
    assert sorted(row[1] for row in listed) == ["3", "7"]
    assert {row[2] for row in listed} == {row.reason for row in manifest.skipped}


def test_more_skipped_rows_than_a_page_lists(write_config: WriteConfig, tmp_path: Path) -> None:
    images: list[bytes | None] = [None if i % 2 else png_bytes(image) for i, image in enumerate(random_pixels(60))]
    source = write_parquet(tmp_path / "broken", images, [i % 3 for i in range(60)])
    generate_once(write_config(source={"path": str(source)}, runtime={"max_skipped": 0.9}))
    page = make(tmp_path / "out")
    assert "30 of 60 source rows could not be read. The first 20; manifest.json lists all." in page.words
    assert len(page.tables["Rows of the source that are not in the dataset"]) == 21


# -------------------------------------------------------------------------------------------------------- odd datasets


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_what_the_rows_say(kind: str, layout: str, write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(**{**KINDS[kind](tmp_path), "output": {"layout": layout, "images_per_shard": 16}}))
    folder, manifest = opened(tmp_path / "out")
    sample = read_sample(folder, manifest, "test", 10_000)
    assert sample is not None
    loaded = pipeline.load(tmp_path / "out", split="test").remove_columns("image").to_pandas()
    by_level = [loaded[loaded["epsilon"] == level / 255] for level in manifest.levels]
    labelled = by_level[0]["label"].notna().to_numpy()
    assert len(sample) == sample.rows == labelled.sum()
    for index, frame in enumerate(frame[labelled] for frame in by_level):
        np.testing.assert_array_equal(sample.prediction[index], frame["prediction"])
        np.testing.assert_array_equal(sample.confidence[index], frame["confidence"])
        np.testing.assert_array_equal(sample.right[index], frame["correct"].astype(bool))
        moved = frame["prediction"] != frame["clean_prediction"]
        expected = frame["fooled"].fillna(False).astype(bool) & moved
        np.testing.assert_array_equal(sample.success[index], expected)
    if kind == "targeted":
        np.testing.assert_array_equal(sample.target, by_level[1]["target"])


# The smaller step goes up, the larger one down: along no one direction.
BENT = """
from pipeline.attacks.base import Perturbed


class Bent:
    on_ray = False
    needs_draws = False

    def perturb(self, model, images, classes, levels, draws):
        return Perturbed((images.clamp(max=253) + 2, images.clamp(min=8) - 8))
"""


@pytest.mark.parametrize(
    ("layout", "on_ray"), [*((layout, True) for layout in LAYOUTS), ("images", False), ("wide", False)]
)
def test_the_pictures_of_the_sheet_are_the_stored_ones(
    layout: str, on_ray: bool, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Pixel for pixel, as the page carries them."""
    own = self_labelled(tmp_path, "abc")
    (tmp_path / "bent.py").write_text(BENT)
    kind = "fgsm" if on_ray else f"{tmp_path}/bent.py:Bent"
    generate_once(write_config(**own, attack={"kind": kind}, output={"layout": layout, "images_per_shard": 16}))
    folder, manifest = opened(tmp_path / "out")
    sample = read_sample(folder, manifest, "test", 10_000)
    assert sample is not None
    assert len(sample.shards) == 4
    picked = [1, 20, len(sample) - 1, 21]
    stored = pipeline.load(tmp_path / "out", split="test")
    order = list(zip(stored["source_index"], stored["epsilon"], strict=True))
    place = [f"test-{int(sample.shard[row]):05d}-of-00004" for row in picked]
    assert [without_run(sample.shards[sample.shard[row]]) for row in picked] == place
    (name, _, chosen), *_ = choose_rows(sample, sample.variants)
    group = make_groups(folder, manifest, sample, sample.variants, str)[0]
    assert group.title == name
    for row, example in zip(chosen, group.examples, strict=True):
        # The sample has the rows of the shards in order, as has a subset.
        source_index = stored["source_index"][row]
        for variant, cell in zip(sample.variants, [example[0], *example[2:]], strict=True):
            expected = stored[order.index((source_index, variant.epsilon))]["image"]
            shown, form = web_image(cell.image)
            assert form == "png"
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown))), np.asarray(expected))
        if not on_ray:
            continue
        clean, sign = (np.asarray(cell.image).astype(int) for cell in example[:2])
        largest = np.asarray(example[-1].image).astype(int)
        np.testing.assert_array_equal(np.clip(clean + 8 * (sign // 127 - 1), 0, 255), largest)


def test_without_labels_it_counts_answers_that_change(write_config: WriteConfig, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "bare", [png_bytes(image) for image in random_pixels(60)], None)
    generate_once(
        write_config(
            source={"path": str(source), "classes": ["cat", "dog", "eel"]},
            attack={"label": "prediction", "epsilons": ["2/255", "32/255"]},
            output={"layout": "signs"},
        )
    )
    page, frame = make(tmp_path / "out"), rows(tmp_path / "out", "signs")
    attacked = pandas.Series(attacks[1]["prediction"] for attacks in frame["attacks"])
    changed = int((attacked != frame["clean_prediction"]).sum())
    assert changed > 0
    assert "The unchanged share of make on test images is 100.0% clean; moving" in page.words
    assert f" of 255 grey levels leaves {100 - changed / 0.6:.1f}%." in page.words
    assert page.tables["Counts at each epsilon"][0] == ["epsilon", "images", "mean confidence"]
    assert "≠ and orange: changed" in page.words


def test_a_targeted_run_is_about_its_target(write_config: WriteConfig, tmp_path: Path) -> None:
    attack = {"epsilons": ["4/255", "12/255"], "target": "dog"}
    generate_once(write_config(**self_labelled(tmp_path, ("cat", "dog", "eel")), attack=attack))
    page, frame = make(tmp_path / "out"), rows(tmp_path / "out", "eps-12")
    reached = frame["fooled"].sum()
    assert 0 < reached < 60
    assert f" {reached / 0.6:.1f}% are on target." in page.words
    assert page.tables["Counts at each epsilon"][0][4] == "on target"
    assert "towards dog" in page.words
    assert "◎ the target: dog" in page.words


def test_one_epsilon_is_enough(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(**self_labelled(tmp_path, "abc"), attack={"epsilons": ["16/255"]}))
    assert len(make(tmp_path / "out").tables["Counts at each epsilon"]) == 3


@pytest.mark.slow
def test_of_many_epsilons_some_have_pictures(write_config: WriteConfig, tmp_path: Path) -> None:
    levels = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    attack = {"epsilons": [f"{level}/255" for level in levels]}
    generate_once(write_config(**self_labelled(tmp_path, "abc"), attack=attack))
    page = make(tmp_path / "out")
    assert "5 of 10 epsilons are shown." in page.words
    assert len(page.tables["Counts at each epsilon"]) == 12
    folder, manifest = opened(tmp_path / "out")
    sample = read_sample(folder, manifest, "test", 10_000)
    assert sample is not None
    shown = focus_on(manifest, sample).shown
    assert shown == fgsm_at(0, 1, 3, 8, 34, 89, model="Linear")


STUBBORN = """

class Stubborn(Net):
    def forward(self, x):
        return 1e-6 * super().forward(x) + torch.tensor([0.0, 1.0, 0.0])
"""


def test_nobody_is_fooled(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> None:
    """A victim that hardly looks at the image."""
    factory_file.write_text(FACTORY + STUBBORN)
    generate_once(write_config(model={"name": f"{factory_file}:Stubborn"}))
    page = make(tmp_path / "out")
    assert "clean; no step up to 8 of 255 grey levels succeeds on any of them." in page.words
    assert "Those that resist" in page.words


def test_no_answer_is_right_and_none_is_fooled(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> None:
    """The card shows the examples of any complete dataset with rows, so there are some."""
    factory_file.write_text(FACTORY + STUBBORN)
    source = write_parquet(tmp_path / "wrong", [png_bytes(image) for image in random_pixels(8)], [0] * 8)
    generate_once(write_config(source={"path": str(source)}, model={"name": f"{factory_file}:Stubborn"}))
    page = make(tmp_path / "out")
    assert "The surest answers" in page.words
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "out/README.md").read_text())
    assert sorted(linked) == ["assets/accuracy.png", "assets/confidence.png", "assets/examples.png"]
    for name in linked:
        Image.open(tmp_path / "out" / name).verify()


def test_an_incomplete_dataset_is_reported_as_one(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    for subset in ("clean", "eps-2", "eps-8"):
        shard_path(tmp_path / "out" / subset, "test-00001-of-00003.parquet").unlink()
    page = make(tmp_path / "out")
    assert "Incomplete: 24 of 40 source images are written." in page.words
    assert "all 24 test images" in page.words
    assert page.tables["Counts at each epsilon"][1][1] == "24"
    assert "every source row is in the dataset" not in page.words


def test_a_dataset_without_receipts_is_what_its_manifest_says(digits: Path, page: Page, tmp_path: Path) -> None:
    """As it comes from the Hub, which gets no `.run/`."""
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy, ignore=shutil.ignore_patterns(".run", "report.html", "assets"))
    result = fgsm("report", copy)
    assert result.exit_code == 0
    tables = {caption: rows for caption, rows in page.tables.items() if not caption.startswith("How fast")}
    assert Page(copy / "report.html").tables == tables
    for name in ("accuracy.png", "confidence.png", "examples.png"):
        assert (copy / "assets" / name).read_bytes() == (digits / "assets" / name).read_bytes()
    assert fgsm("inspect", copy).stdout == fgsm("inspect", digits).stdout
    assert "complete; 240 of 240 " in fgsm("inspect", copy).stdout
    assert not (copy / ".run").exists()


def test_a_split_or_a_dataset_of_skipped_rows_only(write_config: WriteConfig, tmp_path: Path) -> None:
    images = [png_bytes(image) for image in random_pixels(20)]
    write_parquet(tmp_path / "two", images, [i % 3 for i in range(20)], split="train")
    write_parquet(tmp_path / "two", [None] * 8, [i % 3 for i in range(8)], split="test")
    source = {"path": str(tmp_path / "two"), "split": ["train", "test"]}
    generate_once(write_config(source=source, runtime={"max_skipped": 1.0}))
    page = make(tmp_path / "out")
    assert "all 20 train images" in page.words
    assert "test images" not in page.words
    assert "8 of 28 source rows could not be read." in page.words
    for path in (tmp_path / "out").rglob("train-*.parquet"):
        path.unlink()
    page = make(tmp_path / "out")
    assert "There is nothing to show yet" in page.words
    assert "8 of 28 source rows could not be read." in page.words
    assert list((tmp_path / "out").glob("assets/*")) == []


def test_predictions_without_names_are_numbers(write_config: WriteConfig, tmp_path: Path) -> None:
    """Of three of a model's seven classes; the others have no name."""
    generate_once(
        write_config(
            model={"kwargs": {"classes": 7}, "label_map": {"cat": 4, "dog": 0, "eel": 2}},
            attack={"epsilons": ["64/255"]},
        )
    )
    page = make(tmp_path / "out")
    answers = {*rows(tmp_path / "out", "clean")["prediction"], *rows(tmp_path / "out", "eps-64")["prediction"]}
    shown = set(re.findall(r'<span class="says">.*<bdi>(.*?)</bdi>', page.text))
    assert len(shown) > 1
    assert shown <= {str(answer) for answer in answers}


@pytest.mark.slow
def test_large_images_are_shown_smaller(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(**self_labelled(tmp_path, "abc", count=8, side=300)))
    page = make(tmp_path / "out")
    (first, *_) = (image for image in page.all("img") if image.get("width") == "300")
    assert first["src"] is not None
    assert "small" not in (first.get("class") or "")
    kind, data = first["src"].split(";base64,")
    assert kind == "data:image/webp"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 256)


# -------------------------------------------------------------------------------------------------------- for everyone


def contrast(first: str, second: str) -> float:
    """As the WCAG define it, of two colours #rrggbb."""
    levels = []
    for colour in (first, second):
        rgb = np.array([int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        levels.append(float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05)
    return max(levels) / min(levels)


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_on_every_paper(page: Page, dark: bool) -> None:
    papers = re.findall(r":root \{(.*?)\}", page.text, re.DOTALL)
    colours = dict(re.findall(r"--(\S+): (#\w{6})", papers[int(dark)]))
    for paper in ("page", "card"):
        for ink in ("ink", "soft", "right", "wrong"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    assert contrast(colours["ink"], colours["wrong-wash"]) >= 4.5
    assert contrast(colours["ink"], colours["heat"]) >= 4.5


def test_the_page_can_be_walked_through_without_eyes_or_mouse(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(headings))
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {(link["href"] or "").removeprefix("#") for link in page.all("a")}
    assert anchors <= set(ids)
    for attributes in page.all("section"):
        assert attributes["aria-labelledby"] in ids
    scrolling = [attributes for tag, attributes in page.tags if attributes.get("class") == "scroll"]
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in scrolling)


def test_nothing_points_outside(page: Page) -> None:
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "url(" not in page.text
    assert page.all("script") == []
    for attributes in (attributes for _, attributes in page.tags):
        for key in ("src", "srcset"):
            assert (attributes.get(key) or "data:").startswith("data:")
