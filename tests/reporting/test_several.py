"""The report of a run of several models and attacks."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from pipeline.output.card import render_card
from pipeline.output.manifest import contradictions
from pipeline.output.transfer import Transfer
from pipeline.reporting.findings import focus_on, who_travels
from pipeline.reporting.gallery import make_groups
from pipeline.reporting.page import report
from pipeline.reporting.sample import read_sample
from tests.conftest import (
    WriteConfig,
    generate,
    generate_once,
    manifest,
    pixels,
    png_bytes,
    random_pixels,
    rows,
    write_parquet,
    write_sealed,
)
from tests.support.page import Page, make, opened, opened_png
from tests.support.several import ATTACKS, write_several

MODELS = ("net", "sums", "turned")
FGSM, NOISE, PGD = ATTACKS["fgsm"], ATTACKS["noise"], ATTACKS["pgd"]


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """What a module's tests read of one run is made once."""
    return {}


@pytest.fixture
def out(write_config: WriteConfig, tmp_path: Path, made: dict[str, Path]) -> Path:
    """A run of three models and three attacks, with its report."""
    if not made:
        generate(write_several(write_config, tmp_path))
        report(tmp_path / "out")
        made["out"] = tmp_path / "out"
    return made["out"]


def said_of(cell: Transfer) -> str:
    lost = "-" if cell.share_lost is None else f"{100 * cell.share_lost:.1f}%"
    return f"{lost}{100 * (cell.accuracy or 0):.1f}%"


def test_cells_of_the_matrix_are_the_manifest_s_and_noise_is_last(out: Path) -> None:
    page, (_, manifest) = Page(out / "report.html"), opened(out)
    cells = {(cell.attack, cell.model, cell.level, cell.looking): cell for cell in manifest.transfer}
    seen = 0
    for level, images in (
        (2, ["fgsm on net", "fgsm on sums"]),
        (8, ["fgsm on net", "fgsm on sums", "pgd on net", "noise"]),
    ):
        head, *table = page.tables[f"{level}/255, test images"]
        for said, name in zip(head[1:], MODELS, strict=True):
            cell = cells["fgsm", "net", level, name]
            assert said == f"{name}{100 * cell.clean_correct / cell.images:.1f}% clean"
        assert [row[0] for row in table] == images
        for row in table:
            attack, _, model = row[0].partition(" on ")
            expected = [cells[attack, model or None, level, name] for name in MODELS]
            assert row[1:] == [said_of(cell) for cell in expected]
            seen += len(expected)
    assert seen == len(cells)
    framed = [cell for cell in page.all("td") if cell.get("class") == "share own"]
    assert len(framed) == 5, "one for each set of images of a model"


def test_the_picture_of_the_matrix_is_in_the_card_and_the_same_each_time(out: Path) -> None:
    picture = (out / "assets/transfer.png").read_bytes()
    assert opened_png(picture).width > 800
    assert "](assets/transfer.png)" in (out / "README.md").read_text()
    report(out)
    assert (out / "assets/transfer.png").read_bytes() == picture


def test_counts_are_grouped_by_attack_and_model(out: Path) -> None:
    page, (_, manifest) = Page(out / "report.html"), opened(out)
    head, *table = page.tables["Counts at each epsilon"]
    assert head == ["epsilon", "images", "accuracy", "mean confidence", "fooled", "size"]
    groups = ["fgsm on net", "fgsm on sums", "noise", "pgd on net"]
    assert [row[0] for row in table if len(row) == 1] == groups
    for row, subset in zip([row for row in table if len(row) > 1], manifest.subsets, strict=True):
        assert row[2] == f"{100 * subset.correct / subset.labelled:.2f}%"
        assert row[4] == (str(subset.fooled) if subset.level else "-")


def test_the_page_looks_closely_at_the_first_attack_on_the_first_model(out: Path) -> None:
    page, (folder, manifest) = Page(out / "report.html"), opened(out)
    sample = read_sample(folder, manifest, "test", 10_000)
    assert sample is not None
    assert [variant.subset for variant in sample.variants] == ["clean", "fgsm-net-eps-2", "fgsm-net-eps-8"]
    assert "one of 4 sets of attacked images: fgsm on net ." in page.words
    (alt,) = (image["alt"] or "" for image in page.all("img") if "Accuracy against" in (image["alt"] or ""))
    said = dict(re.findall(r"(\w[\w ]*), \S+ clean, (\S+) last", alt))
    looking = {name: rows(out, "fgsm-net-eps-8")[f"correct_{name}"].mean() for name in MODELS}
    looking["net on noise"] = rows(out, "noise-eps-8")["correct"].mean()
    assert said == {name: f"{100 * share:.1f}%" for name, share in looking.items()}


@pytest.mark.parametrize("layout", ["images", "wide"])
@pytest.mark.parametrize(
    ("attacks", "subsets"),
    [
        ({"pgd": {**PGD, "epsilons": ["2/255", "8/255"]}, "noise": NOISE}, ["pgd-eps-2", "pgd-eps-8"]),
        ({"noise": NOISE, "fgsm": {**FGSM, "models": ["turned", "sums"]}}, ["fgsm-turned-eps-2", "fgsm-turned-eps-8"]),
        ({"noise": NOISE}, ["eps-8"]),
    ],
    ids=["off its ray", "not on the first model", "noise alone"],
)
def test_a_sample_and_its_pictures_are_what_is_stored(
    attacks: Mapping[str, Any], subsets: list[str], layout: str, write_config: WriteConfig, tmp_path: Path
) -> None:
    for each in ("images", layout):
        output = {"layout": each, "path": str(tmp_path / each)}
        generate(write_several(write_config, tmp_path, dict(attacks), output=output))
    folder, manifest = opened(tmp_path / layout)
    sample = read_sample(folder, manifest, "test", 10_000)
    assert sample is not None
    assert [variant.subset for variant in sample.variants] == ["clean", *subsets]
    own = focus_on(manifest, sample).models[0]
    assert own == (sample.variants[1].model or "net")
    stored = [rows(tmp_path / "images", variant.subset) for variant in sample.variants]
    for index, table in enumerate(stored):
        np.testing.assert_array_equal(sample.prediction[index], table[f"prediction_{own}"])
        np.testing.assert_array_equal(sample.right[index], table[f"correct_{own}"].astype(bool))
        if index:
            np.testing.assert_array_equal(sample.success[index], table["fooled"].astype(bool))
        sure = table["confidence"] if index or own == "net" else np.full(len(table), np.nan)
        np.testing.assert_array_equal(sample.confidence[index], sure)
    images = [pixels(table).transpose(0, 2, 3, 1) for table in stored]
    shown = [cells for group in make_groups(folder, manifest, sample, sample.variants, str) for cells in group.examples]
    assert shown
    for cells in shown:
        pictures = [np.asarray(cell.image).astype(int) for cell in (cells[0], *cells[2:])]
        (row,) = (row for row, image in enumerate(images[0]) if np.array_equal(image, pictures[0]))
        for picture, own_images in zip(pictures, images, strict=True):
            np.testing.assert_array_equal(picture, own_images[row])
        sign_map = np.asarray(cells[1].image).astype(int) // 127 - 1
        np.testing.assert_array_equal(sign_map, np.sign(pictures[-1] - pictures[0]))


def test_what_is_not_known_of_clean_images_is_not_said(write_config: WriteConfig, tmp_path: Path) -> None:
    """The stored confidence in clean images is the first model's, whom no attack names."""
    generate_once(write_several(write_config, tmp_path, {"fgsm": {**FGSM, "models": ["turned"]}}))
    page = make(tmp_path / "out")
    clean = rows(tmp_path / "out", "clean")
    assert f"The accuracy of turned on test images is {100 * clean['correct_turned'].mean():.1f}% clean" in page.words
    assert "surer than when" not in page.words
    assert "surest of these when they were clean" not in page.words
    (alt,) = (image["alt"] or "" for image in page.all("img") if "confidence against" in (image["alt"] or ""))
    assert re.findall(r", (\S+) clean", alt) == ["-", "-", "-"]
    assert re.search(r"clean</span></span>", page.text), "without a number"


def test_without_labels_there_is_no_matrix(write_config: WriteConfig, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "bare", [png_bytes(image) for image in random_pixels(20)], None)
    sections = {"path": str(source), "classes": ["cat", "dog", "eel"]}
    generate_once(write_several(write_config, tmp_path, {"fgsm": {**FGSM, "label": "prediction"}}, source=sections))
    page = make(tmp_path / "out")
    assert "The transfer" not in page.words
    assert not (tmp_path / "out/assets/transfer.png").exists()
    assert "transfer.png" not in (tmp_path / "out/README.md").read_text()


def test_titles_stand_in_place_of_ids_and_change_no_run(out: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(out, tmp_path / "titled")
    content = manifest(folder)
    content["config"]["output"]["title"], title = "Photos & <noise>", "A *net* <b>"
    content["config"]["models"]["net"]["title"] = title
    write_sealed(folder / "manifest.json", content)
    page, (_, titled) = make(folder), opened(folder)
    assert contradictions(titled) == []  # with the identity, of which the run id is made
    head, *table = page.tables["8/255, test images"]
    assert [said.startswith(name) for said, name in zip(head[1:], (title, *MODELS[1:]), strict=True)] == [True] * 3
    assert [row[0] for row in table] == [f"fgsm on {title}", "fgsm on sums", f"pgd on {title}", "noise"]
    assert "<h1><bdi>Photos &amp; &lt;noise&gt;</bdi></h1>" in page.text
    assert not re.search(r"\bon net\b|\bof net\b", page.words)
    card = MarkdownIt().enable("table").render(render_card(titled))
    assert "<h1>Photos &amp; &lt;noise&gt;</h1>" in card
    assert card.count("<td>A *net* &lt;b&gt;</td>") == card.count("<td>sums</td>") + 2  # of pgd
    assert "<code>net</code> (A *net* &lt;b&gt;)" in card


def row_of(attack: str, model: str | None, level: int, **lost: int) -> list[Transfer]:
    """What models lose of 50 images that each predicts right when clean."""
    counts = {"split": "test", "images": 100, "clean_correct": 50}
    return [
        Transfer(**counts, attack=attack, model=model, level=level, looking=name, correct=50 - count, lost=count)
        for name, count in lost.items()
    ]


def test_the_sentence_is_of_other_models_at_an_epsilon_that_has_noise() -> None:
    matrix = [
        row_of("fgsm", "a", 4, a=50, b=40, c=40),
        row_of("fgsm", "a", 8, a=50, b=20, c=10),
        row_of("pgd", "b", 8, a=15, b=50, c=16),
        row_of("noise", None, 8, a=1, b=50, c=2),
        row_of("fgsm", "a", 16, a=50, b=50, c=50),
        row_of("noise", None, 16, a=1, b=3, c=2),
    ]
    said = who_travels(matrix, 2)
    assert said.startswith(
        "At 8/255 no images transfer better than those of pgd on b: the other models together get 31.0% wrong of"
    )
    assert said.endswith("with noise it is 3.0%.")
    assert who_travels(matrix, 64).startswith("At 16/255 no images transfer better than those of fgsm on a")
    without = who_travels(matrix[:3], 4)
    assert "get 80.0% wrong of" in without
    assert without.endswith("the run has no noise of that epsilon to compare with.")
    assert "b gets 40.0% wrong of" in who_travels([row_of("fgsm", "a", 8, a=50, b=20)], 8)


def test_where_nobody_else_looks_the_sentence_is_left_out() -> None:
    assert who_travels([], 8) == ""
    assert who_travels([row_of("noise", None, 8, a=1, b=2)], 8) == ""
    blind = [cell.model_copy(update={"clean_correct": 0, "lost": 0}) for cell in row_of("fgsm", "a", 8, a=0, b=0)]
    assert who_travels([blind], 8) == ""
