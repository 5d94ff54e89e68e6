"""The report: what it says, what it reads, and what a person sees of it in a real browser."""

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import pipeline
import pipeline.core.errors
from pipeline.output.folder import EvaluatorCounts, OutputFolder, report_files, reported_receipts
from pipeline.output.manifest import Manifest, require_manifest
from pipeline.report.findings import by_interest, focus_on, model_name, share_of_surer, source_name, sureness
from pipeline.report.gallery import choose_rows, make_groups, web_image
from pipeline.report.page import report, write_report
from pipeline.report.plots import RIGHT, SOFT, Curve, draw_curves, model_curve, shortened
from pipeline.report.sample import Sample, read_sample
from tests.conftest import (
    FACTORY,
    KINDS,
    LAYOUTS,
    REPOSITORY,
    ROOM,
    WriteConfig,
    fgsm,
    generate,
    png_bytes,
    random_pixels,
    rows,
    shard_path,
    without_run,
    write_parquet,
)
from tests.support.variants import fgsm_at

# ------------------------------------------------------------------------------------------------- helpers

NASTY = (
    "<script>document.title = 'pwned'</script>",
    "\"'><img src=x onerror=\"document.title = 'pwned'\">",
    "long " * 40,
    "unbroken" * 40,
    "🐢 turtle",
    "\u202eقطة",
    "",
    "$\\nope{1}$ {{ 7 * 7 }}\n%",
)


class Page(HTMLParser):
    """What a page says: its tables as rows of texts by caption, its images, and the elements in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._rows: list[list[str]] = []
        self._into: list[str] | None = None
        self._caption: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._into = []
        elif tag == "caption":
            self._caption = self._into = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join("".join(self._into or ()).split()))
        elif tag == "table":
            self.tables["".join(self._caption)] = self._rows
        if tag in ("td", "th", "caption"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        """All text, its spaces made one, without markup."""
        body = self.text[self.text.index("<body>") :]
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def opened(folder: Path) -> tuple[OutputFolder, Manifest]:
    output = OutputFolder(folder)
    return output, require_manifest(output)


def make(folder: Path) -> Page:
    return Page(Path(report(folder)))


LINEAR = """
import torch
from torch import nn


class Linear(nn.Module):
    # Of a coarse image, around grey: it takes images of all colours for all classes.
    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(48, classes, bias=False)

    def forward(self, x):
        return 20 * self.linear(nn.functional.adaptive_avg_pool2d(x - 0.5, 4).flatten(1))
"""


def self_labelled(folder: Path, names: Sequence[str], count: int = 60, side: int = 16) -> dict[str, dict[str, Any]]:
    """A dataset of noise of all colours, and a victim that reads it all right: it is labelled as the victim says.

    Returns:
        The sections of a config for both.
    """
    namespace: dict[str, Any] = {}
    exec(LINEAR, namespace)
    torch.manual_seed(0)  # runtime.seed
    model = namespace["Linear"](len(names)).eval()
    colours = np.random.RandomState(1).randint(0, 256, (count, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    pixels = (random_pixels(count, side) // 4 + 3 * (colours // 4)).astype(np.uint8)
    with torch.inference_mode():
        labels = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255).argmax(1).tolist()
    label = (datasets.ClassLabel(names=list(names)), labels)
    source = write_parquet(folder / "own", [png_bytes(image) for image in pixels], None, label=label)
    victim = folder / "linear.py"
    victim.write_text(LINEAR)
    model_section = {"name": f"{victim}:Linear", "kwargs": {"classes": len(names)}}
    return {"source": {"path": str(source)}, "model": model_section}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits of each split, attacked and reported."""
    folder = tmp_path_factory.mktemp("report") / "digits"
    generate(Path("digits"), "--limit", "120", "--output", str(folder), "--set", "runtime.workers=0")
    report(folder)
    return folder


@pytest.fixture(scope="module")
def page(digits: Path) -> Page:
    """Its page."""
    return Page(digits / "report.html")


# ------------------------------------------------------------------------------------------------- the command


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
    generate(config)
    (tmp_path / "out/assets").write_text("in the way")
    result = fgsm("generate", config)
    assert result.exit_code == 0
    assert "split  subset" in result.stdout
    line = next(line for line in result.stderr.splitlines() if line.startswith("Warning"))
    assert "the dataset is complete, but its report was not made: Cannot write" in line
    assert line.endswith(f"Try fgsm report {tmp_path / 'out'}")
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
    monkeypatch.setattr("pipeline.report.page.draw_sheet", lambda _: b"another sheet")
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
    generate(write_config())
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
    assert result.stderr == f"Error: {tmp_path} holds no dataset of ours: there is no manifest.json.\n"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what it says


def test_the_counts_are_those_of_the_manifest(digits: Path, page: Page) -> None:
    _, manifest = opened(digits)
    head, *rows = page.tables["Counts at each epsilon"]
    assert head == ["epsilon", "images", "accuracy", "mean confidence", "fooled", "size"]
    assert [row[0] for row in rows if len(row) == 1] == ["train", "test"]
    by_page = [row for row in rows if len(row) > 1]
    assert len(by_page) == len(manifest.subsets) == 10
    for row, subset in zip(by_page, manifest.subsets, strict=True):
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
    assert alt == f"Mean confidence against epsilon, test. {lines}."


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
    generate(write_config(source={"path": str(source)}, runtime={"max_skipped": 0.5}))
    page, (_, manifest) = make(tmp_path / "out"), opened(tmp_path / "out")
    assert "2 of 40 source rows could not be read." in page.words
    listed = page.tables["Rows of the source that are not in the dataset"][1:]
    assert sorted(row[1] for row in listed) == ["3", "7"]
    assert {row[2] for row in listed} == {row.reason for row in manifest.skipped}


def test_more_skipped_rows_than_a_page_lists(write_config: WriteConfig, tmp_path: Path) -> None:
    images: list[bytes | None] = [None if i % 2 else png_bytes(image) for i, image in enumerate(random_pixels(60))]
    source = write_parquet(tmp_path / "broken", images, [i % 3 for i in range(60)])
    generate(write_config(source={"path": str(source)}, runtime={"max_skipped": 0.9}))
    page = make(tmp_path / "out")
    assert "30 of 60 source rows could not be read. The first 20; manifest.json lists all." in page.words
    assert len(page.tables["Rows of the source that are not in the dataset"]) == 21


# ------------------------------------------------------------------------------------------------- odd datasets


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_what_the_rows_say(kind: str, layout: str, write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config(**{**KINDS[kind](tmp_path), "output": {"layout": layout, "images_per_shard": 16}}))
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
    generate(write_config(**own, attack={"kind": kind}, output={"layout": layout, "images_per_shard": 16}))
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
    generate(
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
    assert "The unchanged share of victim.py:make on test images is 100.0% clean; moving" in page.words
    assert f" of 255 grey levels leaves {100 - changed / 0.6:.1f}%." in page.words
    assert page.tables["Counts at each epsilon"][0] == ["epsilon", "images", "mean confidence"]
    assert "≠ and orange: changed" in page.words


def test_a_targeted_run_is_about_its_target(write_config: WriteConfig, tmp_path: Path) -> None:
    attack = {"epsilons": ["4/255", "12/255"], "target": "dog"}
    generate(write_config(**self_labelled(tmp_path, ("cat", "dog", "eel")), attack=attack))
    page, frame = make(tmp_path / "out"), rows(tmp_path / "out", "eps-12")
    reached = frame["fooled"].sum()
    assert 0 < reached < 60
    assert f" {reached / 0.6:.1f}% are on target." in page.words
    assert page.tables["Counts at each epsilon"][0][4] == "on target"
    assert "towards dog" in page.words
    assert "◎ the target: dog" in page.words


def test_one_epsilon_is_enough(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config(**self_labelled(tmp_path, "abc"), attack={"epsilons": ["16/255"]}))
    assert len(make(tmp_path / "out").tables["Counts at each epsilon"]) == 3


def test_of_many_epsilons_some_have_pictures(write_config: WriteConfig, tmp_path: Path) -> None:
    levels = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    attack = {"epsilons": [f"{level}/255" for level in levels]}
    generate(write_config(**self_labelled(tmp_path, "abc"), attack=attack))
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
    generate(write_config(model={"name": f"{factory_file}:Stubborn"}))
    page = make(tmp_path / "out")
    assert "clean; no step up to 8 of 255 grey levels succeeds on any of them." in page.words
    assert "Those that resist" in page.words


def test_no_answer_is_right_and_none_is_fooled(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> None:
    """The card shows the examples of any complete dataset with rows, so there are some."""
    factory_file.write_text(FACTORY + STUBBORN)
    source = write_parquet(tmp_path / "wrong", [png_bytes(image) for image in random_pixels(8)], [0] * 8)
    generate(write_config(source={"path": str(source)}, model={"name": f"{factory_file}:Stubborn"}))
    page = make(tmp_path / "out")
    assert "The surest answers" in page.words
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "out/README.md").read_text())
    assert sorted(linked) == ["assets/accuracy.png", "assets/confidence.png", "assets/examples.png"]
    for name in linked:
        Image.open(tmp_path / "out" / name).verify()


def test_an_incomplete_dataset_is_reported_as_one(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config())
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
    assert "complete; 240 of 240 source images" in fgsm("inspect", copy).stdout
    assert not (copy / ".run").exists()


def test_a_split_or_a_dataset_of_skipped_rows_only(write_config: WriteConfig, tmp_path: Path) -> None:
    images = [png_bytes(image) for image in random_pixels(20)]
    write_parquet(tmp_path / "two", images, [i % 3 for i in range(20)], split="train")
    write_parquet(tmp_path / "two", [None] * 8, [i % 3 for i in range(8)], split="test")
    source = {"path": str(tmp_path / "two"), "split": ["train", "test"]}
    generate(write_config(source=source, runtime={"max_skipped": 1.0}))
    page = make(tmp_path / "out")
    assert "all 20 train images" in page.words
    assert "test images" not in page.words
    assert "8 of 28 source rows could not be read." in page.words
    for path in (tmp_path / "out").rglob("train-*.parquet"):
        path.unlink()
    page = make(tmp_path / "out")
    assert "There is nothing to see yet" in page.words
    assert "8 of 28 source rows could not be read." in page.words
    assert list((tmp_path / "out").glob("assets/*")) == []


def test_predictions_without_names_are_numbers(write_config: WriteConfig, tmp_path: Path) -> None:
    """Of three of a model's seven classes; the others have no name."""
    generate(
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


def test_large_images_are_shown_smaller(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config(**self_labelled(tmp_path, "abc", count=8, side=300)))
    page = make(tmp_path / "out")
    (first, *_) = (image for image in page.all("img") if image.get("width") == "300")
    assert first["src"] is not None
    assert "small" not in (first.get("class") or "")
    kind, data = first["src"].split(";base64,")
    assert kind == "data:image/webp"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 256)


# ------------------------------------------------------------------------------------------------- transfer


def with_evaluators(manifest: Manifest, **rates: float) -> Manifest:
    """The manifest as if there had been evaluators that so many of the fooled images transfer to."""
    subsets = []
    for subset in manifest.subsets:
        evaluators = {
            name: EvaluatorCounts(
                correct=subset.labelled - round(rate * subset.fooled),
                fooled=round(rate * subset.fooled),
                exposed=subset.fooled,
                transferred=round(rate * subset.fooled),
            )
            for name, rate in rates.items()
        }
        subsets.append(subset.model_copy(update={"evaluators": evaluators}))
    return manifest.model_copy(update={"subsets": tuple(subsets)})


def test_transfer_is_a_matrix(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "copy")
    folder, manifest = opened(tmp_path / "copy")
    manifest = with_evaluators(manifest, vit=0.5, **{"<b>wide</b>": 0.25})
    page = Page(Path(write_report(folder, manifest)))
    head, *table = page.tables["Transfer rate, and the images it is a share of, from the manifest"]
    assert head == ["epsilon", "fooled", "vit", "<b>wide</b>"]
    attacked = [subset for subset in manifest.subsets if subset.level]
    for row, subset in zip([row for row in table if len(row) > 1], attacked, strict=True):
        for cell, counts in zip(row[2:], subset.evaluators.values(), strict=True):
            rate = f"{100 * counts.transferred / counts.exposed:.1f}%" if counts.exposed else "-"
            assert cell == f"{rate}{counts.transferred} of {counts.exposed}"
    assert page.tables["Counts at each epsilon"][0][2:5] == ["accuracy of digits", "vit", "<b>wide</b>"]
    shares = [cell["style"] for cell in page.all("td") if cell.get("class") == "share"]
    assert len(shares) == 2 * len(attacked)
    counts = attacked[-1].evaluators["<b>wide</b>"]
    assert shares[-1] == f"--share: {round(counts.transferred / counts.exposed, 3)}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transfer_of_a_real_run_is_that_of_its_rows(layout: str, write_config: WriteConfig, tmp_path: Path) -> None:
    sections = {**self_labelled(tmp_path, ("cat", "dog", "eel")), "output": {"layout": layout}}
    config = write_config(**sections, attack={"epsilons": ["4/255", "16/255"]})
    (tmp_path / "room.py").write_text(ROOM)
    other = {"id": "sums", "kind": "factory", "name": f"{tmp_path}/room.py:make"}
    config.write_text(config.read_text() + f"evaluators: {json.dumps([other])}\n")
    generate(config)
    page = make(tmp_path / "out")
    loaded = pipeline.load(tmp_path / "out", split="test").remove_columns("image").to_pandas()
    clean, *attacked = (loaded[loaded["epsilon"] == level / 255].reset_index() for level in (0, 4, 16))
    rates = page.tables["Transfer rate, and the images it is a share of, from the manifest"][1:]
    for frame, row in zip(attacked, rates, strict=True):
        exposed = frame["fooled"].astype(bool) & clean["correct_sums"]
        transferred = exposed & ~frame["correct_sums"]
        assert exposed.any()
        rate = f"{100 * transferred.sum() / exposed.sum():.1f}%"
        assert row[1:] == [str(frame["fooled"].sum()), f"{rate}{transferred.sum()} of {exposed.sum()}"]
    counts = page.tables["Counts at each epsilon"]
    assert counts[0][2:4] == ["accuracy of linear.py:Linear", "sums"]
    assert counts[1][3] == f"{100 * clean['correct_sums'].mean():.2f}%"
    assert any(caption.startswith("How fast it was written") for caption in page.tables)


def test_names_of_models_keep_their_capitals(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "copy")
    folder, manifest = opened(tmp_path / "copy")
    page = Page(Path(write_report(folder, with_evaluators(manifest, ResNet50=0.5))))
    (alt,) = (image["alt"] or "" for image in page.all("img") if "Accuracy against" in (image["alt"] or ""))
    assert alt.startswith("Accuracy against epsilon, test. digits, ")
    assert "; ResNet50, " in alt


def test_evaluators_that_nothing_exposes_have_no_matrix(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "copy")
    folder, manifest = opened(tmp_path / "copy")
    unfooled = tuple(subset.model_copy(update={"fooled": 0}) for subset in manifest.subsets)
    page = Page(Path(write_report(folder, with_evaluators(manifest.model_copy(update={"subsets": unfooled}), vit=0.5))))
    assert "Transfer" not in page.words


# ------------------------------------------------------------------------------------------------- what it reads


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
        monkeypatch.setattr(f"pipeline.report.{module}.SAMPLE_SHARDS", 3)
    monkeypatch.setattr("pipeline.report.page.SAMPLE_ROWS", 12)
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
    monkeypatch.setattr("pipeline.report.page.SAMPLE_ROWS", 40)
    result = fgsm("report", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(r"Error: \S+\.parquet cannot be read \(.*\); fgsm verify says what is damaged\.\n$", result.stderr)


def test_a_sample_is_filled_from_the_shards_there_are() -> None:
    from pipeline.report.sample import SAMPLE_SHARDS, _shares

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
    monkeypatch.setattr("pipeline.report.page.SAMPLE_ROWS", 12)
    own = self_labelled(tmp_path, "abc")
    generate(write_config(**{**own, "source": {**own["source"], "shuffle": False}}))
    page = make(tmp_path / "out")
    assert "which are cut from the source in its own order, so it may not be a fair one." in page.words


def test_a_picture_that_cannot_be_decoded_is_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config(**self_labelled(tmp_path, "abc")))
    path = next((tmp_path / "out/clean").glob("*.parquet"))
    table = pq.read_table(path)
    broken = pa.array([{"bytes": b"RIFF", "path": None}] * len(table), table.schema.field("image").type)
    folder, manifest = opened(tmp_path / "out")
    pq.write_table(table.set_column(0, table.schema.field("image"), broken), path)
    place = rf"test-0000\d-of-00004-{manifest.run_id}"
    with pytest.raises(pipeline.core.errors.PipelineError, match=rf"A picture in row \d+ of {place} cannot be"):
        write_report(folder, manifest)


@pytest.mark.parametrize("change", ["rows", "column", "gone"])
def test_files_that_do_not_fit_are_one_sentence(change: str, write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config())
    folder, manifest = opened(tmp_path / "out")
    path = shard_path(tmp_path, "out/eps-8/test-00001-of-00003.parquet")
    table = pq.read_table(path)
    if change == "rows":
        pq.write_table(table.slice(1), path)
    elif change == "column":
        pq.write_table(table.drop_columns(["source_index"]), path)
    else:
        path.unlink()
    with pytest.raises(pipeline.core.errors.PipelineError, match=r"parquet cannot be read \(.+\); fgsm verify says"):
        write_report(folder, manifest)


# ------------------------------------------------------------------------------------------------- what it chooses


def sample_of(success: Sequence[Sequence[int]], confidence: Sequence[Sequence[float]], **fields: Any) -> Sample:
    """A sample of two classes from its flips; clean first, all right when clean."""
    flipped = np.array(success, dtype=bool)
    count = flipped.shape[1]
    classes = np.arange(count) % 2
    values: dict[str, Any] = {
        "split": "test",
        "rows": count,
        "labelled": True,
        "variants": fgsm_at(0, 2, 8, 16)[: len(flipped)],
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
    groups = choose_rows(sample_of(success, [[0.9] * 8] * 3), fgsm_at(0, 2, 8))
    title, text, chosen = groups[-1]
    assert (title, chosen) == ("Those that resist", [7])
    assert text == "None resists every epsilon; these give in at 8/255 only."
    together = choose_rows(sample_of([[0] * 8, [1] * 8], [[0.9] * 8] * 2), fgsm_at(0, 2))
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
    focus = focus_on(manifest, sample_of(success, sure, variants=fgsm_at(*levels)))
    assert focus.shown == fgsm_at(0, 1, 2, 3, 5, 8, 9, 10)  # 2 and 9: where the first and the last give in
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


def test_models_and_sources_have_the_names_that_people_use() -> None:
    assert model_name({"kind": "factory", "name": "/home/me/resnet20.py:make"}) == "resnet20.py:make"
    assert model_name({"kind": "transformers", "name": "google/vit"}) == "google/vit"
    assert model_name({"kind": "digits", "name": None}) == "digits"
    assert source_name({"kind": "huggingface", "path": "uoft-cs/cifar10"}) == "uoft-cs/cifar10"
    assert source_name({"kind": "imagefolder", "path": "/data/my photos/cats"}) == "cats"
    assert source_name({"kind": "digits", "path": None}) == "digits"


# ------------------------------------------------------------------------------------------------- plots


def opened_png(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


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


# ------------------------------------------------------------------------------------------------- for everyone


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


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real headless Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


Look = Callable[..., Any]


@pytest.fixture
def look(browser: Any) -> Iterator[Look]:
    """Open a page; what goes wrong in it fails the test at its end."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url[:100]))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_sees_it(width: int, scheme: str, digits: Path, look: Look) -> None:
    page = look(digits / "report.html", width, scheme)
    assert page.evaluate(FITS)
    images = page.evaluate(
        "Promise.all([...document.images].map(image => image.decode().then(() => {"
        "  const box = image.getBoundingClientRect();"
        "  return [image.naturalWidth, box.width, box.height, image.currentSrc.length] })))"
    )
    assert len(images) == 2 + 9 * 6
    assert all(natural > 0 and shown > 80 and height > 80 for natural, shown, height, _ in images)
    plot = opened_png(page.query_selector(".accuracy img").screenshot()).convert("RGB")
    drawn = {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in plot.getcolors(1 << 20)}  # type: ignore[misc,union-attr]
    assert {"#ffffff", RIGHT} <= drawn
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(245, 246, 248)" if scheme == "light" else "rgb(15, 18, 23)")
    # What a plot shows must be large enough to read.
    smallest = page.evaluate("Math.min(...[...document.querySelectorAll('.plot img')].map(i => i.clientWidth))")
    assert smallest >= 320
    rendering = page.evaluate("getComputedStyle(document.querySelector('.strip img')).imageRendering")
    assert rendering == "pixelated"


def test_the_marked_epsilon_is_so_without_colour(digits: Path, look: Look) -> None:
    page = look(digits / "report.html")
    marks = page.evaluate(
        "[...document.querySelectorAll('tbody th[scope=row]')].map(cell => ["
        "  cell.parentElement.getAttribute('aria-current'), getComputedStyle(cell, '::before').content])"
    )
    marked = [mark for mark in marks if mark != [None, "none"]]
    assert marked == [["true", '"▸ "']]


def test_the_first_tab_reaches_the_skip_link(digits: Path, look: Look) -> None:
    page = look(digits / "report.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    order = []
    for _ in range(2):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert order == ["Counts at each epsilon", "Sessions"]


def test_names_of_classes_stay_text(write_config: WriteConfig, tmp_path: Path, look: Look) -> None:
    generate(write_config(**self_labelled(tmp_path, NASTY), attack={"epsilons": ["4/255", "32/255"]}))
    made = make(tmp_path / "out")
    assert "<script" not in made.text
    assert "onerror=" not in made.text.replace("onerror=&#34;", "")
    assert look(tmp_path / "out/report.html", 390).evaluate(FITS)
    page = look(tmp_path / "out/report.html", 1280)
    assert page.evaluate(FITS)
    assert "under FGSM" in page.title()
    shown = page.evaluate("[...document.querySelectorAll('.says bdi')].map(name => name.textContent)")
    assert {*shown} <= {name.strip() or "(no name)" for name in NASTY}
    assert len({*shown}) >= 5


def test_a_page_with_everything_fits(digits: Path, tmp_path: Path, look: Look) -> None:
    shutil.copytree(digits, tmp_path / "copy")
    folder, manifest = opened(tmp_path / "copy")
    names = {f"a-rather-long-name-of-an-evaluator-{index}": index / 8 for index in range(5)}
    write_report(folder, with_evaluators(manifest, **names).model_copy(update={"complete": False}))
    for width in (1280, 390):
        page = look(Path(folder.store.at(folder.report)), width)
        assert page.evaluate(FITS)
        assert page.is_visible("text=Incomplete:")
        assert page.is_visible("text=Transfer rate, and the images")


def test_a_page_without_rows_fits(write_config: WriteConfig, tmp_path: Path, look: Look) -> None:
    generate(write_config())
    for path in (tmp_path / "out").rglob("*.parquet"):
        path.unlink()
    make(tmp_path / "out")
    page = look(tmp_path / "out/report.html", 390)
    assert page.evaluate(FITS)
    assert page.is_visible("text=There is nothing to see yet")
    assert list((tmp_path / "out").glob("assets/*")) == []


# ------------------------------------------------------------------------------------------------- on real images

DATA = REPOSITORY.parent / "shared/data"
CIFAR, RESNET20 = DATA / "cifar10-test-2000", DATA / "cifar10-resnet20.safetensors"
PLAIN = """
from torch import nn


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48 * 16, 10),
    )
"""
ATTACKED = 256


def train_plain(folder: Path) -> dict[str, Any]:
    """A small plain network, trained for seconds on rows that are not attacked; as an evaluator of a config."""
    unseen = datasets.load_dataset(str(CIFAR), split="test").select(range(ATTACKED, 2000))
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in unseen["img"]])
    images, labels = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255, torch.tensor(unseen["label"])
    namespace: dict[str, Any] = {}
    exec(PLAIN, namespace)
    model = namespace["plain"]()
    # By hand: the first optimizer of torch.optim imports its compiler, which takes seconds.
    weights = list(model.parameters())
    speeds = [torch.zeros_like(weight) for weight in weights]
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(64):
            slopes = torch.autograd.grad(F.cross_entropy(model(2 * images[batch] - 1), labels[batch]), weights)
            with torch.no_grad():
                for weight, speed, slope in zip(weights, speeds, slopes, strict=True):
                    weight -= 0.05 * speed.mul_(0.9).add_(slope)
    (folder / "plain.py").write_text(PLAIN)
    save_file(model.state_dict(), folder / "plain.safetensors")
    return {
        "id": "plain",
        "kind": "factory",
        "name": f"{folder}/plain.py:plain",
        "weights": f"{folder}/plain.safetensors",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


@pytest.mark.skipif(not (CIFAR.is_dir() and RESNET20.is_file()), reason=f"there is no CIFAR-10 in {DATA}")
def test_real_images_a_trained_victim_and_what_transfers_of_it(
    write_config: WriteConfig, tmp_path: Path, look: Look
) -> None:
    victim = {
        "name": f"{REPOSITORY}/scripts/resnet20.py:resnet20",
        "weights": str(RESNET20),
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    config = write_config(
        # In its own order: the evaluator has seen none of these.
        source={"path": str(CIFAR), "shuffle": False, "limit": ATTACKED},
        model=victim,
        attack={"epsilons": ["8/255", "32/255"]},
        output={"images_per_shard": 128},
        runtime={"batch_size": 64},
    )
    config.write_text(config.read_text() + f"evaluators: {json.dumps([train_plain(tmp_path)])}\n")
    assert fgsm("generate", config).exit_code == 0
    folder, manifest = opened(tmp_path / "out")
    clean, *attacked = manifest.subsets
    # The victim's published accuracy is 81 % clean and 7 % at 8/255; the evaluator must know more than to guess.
    assert clean.correct / ATTACKED > 0.7
    assert attacked[0].correct / ATTACKED < 0.2
    assert clean.evaluators["plain"].correct / ATTACKED > 0.3
    frames = {level: rows(Path(folder.root), subset) for level, subset in ((0, "clean"), (8, "eps-8"), (32, "eps-32"))}
    page = Page(Path(folder.store.at(folder.report)))
    transfer = page.tables["Transfer rate, and the images it is a share of, from the manifest"]
    assert transfer[0] == ["epsilon", "fooled", "plain"]
    known = frames[0]["correct_plain"].to_numpy(dtype=bool)
    for subset, row in zip(attacked, transfer[1:], strict=True):
        fooled, correct = (frames[subset.level][name].to_numpy(dtype=bool) for name in ("fooled", "correct_plain"))
        exposed, transferred = int((fooled & known).sum()), int((fooled & known & ~correct).sum())
        expected = EvaluatorCounts(
            correct=int(correct.sum()), fooled=int((known & ~correct).sum()), exposed=exposed, transferred=transferred
        )
        assert subset.evaluators == {"plain": expected}
        rate = f"{100 * transferred / exposed:.1f}%{transferred} of {exposed}"
        assert row == [f"{subset.level}/255", str(fooled.sum()), rate]
    # A step that a person sees carries further.
    small, large = (subset.evaluators["plain"] for subset in attacked)
    assert small.transferred / small.exposed < large.transferred / large.exposed
    for width in (1280, 390):
        seen = look(Path(folder.store.at(folder.report)), width)
        assert seen.evaluate(FITS)
        widths = seen.evaluate(
            "Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth)))"
        )
        # How many rows resist every epsilon is the victim's affair: two groups at least, of three examples each.
        strips = sum(attributes.get("class") == "strip" for attributes in page.all("ol"))
        assert strips >= 6
        assert len(widths) == 2 + strips * 4  # two plots; clean, sign map and two epsilons of each example
        assert all(widths)
