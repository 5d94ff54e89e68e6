"""What holds for every layout: nobody else knows its name, and a column is one declaration."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from torch import Tensor

import pipeline
from pipeline.core.variants import CLEAN, Variant, at_levels
from pipeline.layouts import base
from pipeline.layouts.base import Column, Picture, subsets_of
from pipeline.layouts.per_image import PerImage
from pipeline.layouts.registry import LAYOUTS as REGISTRY
from tests.conftest import (
    KINDS,
    LAYOUTS,
    REPOSITORY,
    WriteConfig,
    digests,
    fgsm,
    generate,
    generate_once,
    manifest,
    png_bytes,
    random_pixels,
    rows,
    shard_path,
    subset_of,
    write_parquet,
)
from tests.support.forgery import SHARD, assert_found, forge
from tests.support.variants import fgsm_at

LEVELS = (0, 2, 8)
VARIANTS = fgsm_at(*LEVELS)
# Where a quoted `images` is no layout: source images of a session, what an attack is given, the heading of a table.
NO_LAYOUT = {
    ("core/console.py", "images"),
    ("engine/execute.py", "images"),
    ("engine/model_check.py", "images"),
    ("reporting/findings.py", "images"),
    ("reporting/report.html.jinja", "images"),
}


def test_no_other_room_knows_a_layout_by_its_name() -> None:
    quoted = re.compile(rf"""(["'`])({"|".join(REGISTRY)})\1""")
    package = REPOSITORY / "pipeline"
    found = {
        (str(path.relative_to(package)), match[2])
        for suffix in ("py", "j2", "jinja")
        for path in package.rglob(f"*.{suffix}")
        if path.parent.name != "layouts"
        for match in quoted.finditer(path.read_text())
    }
    # The schema has the default, and describes the keys.
    known = {(f"config/{module}.py", name) for module in ("kinds", "schema") for name in REGISTRY}
    assert found - NO_LAYOUT - known == set()
    assert ("config/kinds.py", "signs") in found


@pytest.mark.parametrize("layout", REGISTRY.values(), ids=REGISTRY)
def test_every_image_is_made_from_pictures_that_are_stored(layout: base.Layout) -> None:
    pictures = layout.pictures(VARIANTS)
    assert len(set(pictures)) == len(pictures)
    ray = layout.ray(VARIANTS[-1], VARIANTS)
    assert ray[0] == pictures[0] == layout.source(CLEAN, VARIANTS)[0]
    for variant in at_levels(VARIANTS, range(256)):
        source = layout.source(variant, VARIANTS)
        assert set(source) <= set(pictures)
        assert source == ray or (len(source) == 1 and variant in VARIANTS)
    assert all(re.fullmatch(layout.subsets, subset) for subset in subsets_of(layout, VARIANTS))
    assert {layout.subset(variant) for variant in VARIANTS} == set(subsets_of(layout, VARIANTS))
    assert layout.per_image == (len(subsets_of(layout, VARIANTS)) == 1)


def test_no_layout_takes_another_s_subsets_for_its_own() -> None:
    for name, layout in REGISTRY.items():
        subsets = ["all", *subsets_of(layout, VARIANTS)]
        entries = [{name: getattr(one, name) for name in ("epsilon", "attack", "model")} for one in VARIANTS[1:]]
        attacks: Callable[[str, str], Any] = lambda *_: entries  # noqa: B023, E731
        recorded = {other: found.recorded(subsets, attacks) for other, found in REGISTRY.items()}
        # Layout images looks at names alone.
        expected = (
            VARIANTS if layout.per_image else (CLEAN, *(replace(one, attack=None, model=None) for one in VARIANTS[1:]))
        )
        # What a sign map is stored as, its column's type says.
        same = [other for other, found in REGISTRY.items() if found.subsets == layout.subsets]
        assert recorded == {other: expected if other in same else None for other in REGISTRY}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_column_is_one_declaration(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    margin = Column("margin", "a", "b", lambda scores, _: scores.confidence - scores.label_confidence, dtype="float32")
    monkeypatch.setattr(base, "COLUMNS", (*base.COLUMNS[:-1], margin, base.COLUMNS[-1]))
    generate(write_config(output={"layout": layout}))
    loaded = pipeline.load(tmp_path / "out", split="test")
    assert loaded.features["margin"] == datasets.Value("float32")
    expected = np.array(loaded["confidence"]) - np.array(loaded["label_confidence"])
    np.testing.assert_allclose(loaded["margin"], expected, atol=1e-6)
    assert set(pipeline.load(tmp_path / "out", ["3/255"], split="test")["margin"]) == {None}
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0

    def forged(columns: dict[str, list[Any]]) -> None:
        of_row = columns["attacks"][5][-1] if "attacks" in columns else {"margin": columns["margin"][5]}
        of_row["margin"] += 0.5
        columns.get("margin", [None] * 6)[5] = of_row["margin"]

    forge(tmp_path / "out", forged, f"{subset_of(layout, 8)}/{SHARD}.parquet")
    assert_found(rf"{SHARD}\S* .*\bmargin\b", tmp_path / "out")


class Largest(PerImage):
    """The clean image and the one at the largest epsilon, from which the others follow."""

    subsets = "wide"

    def picture(self, variant: Variant) -> Picture:
        return Picture(self.subsets, "image" if variant == CLEAN else "attacked")

    def source(self, variant: Variant, variants: Sequence[Variant]) -> tuple[Picture, ...]:
        return (self.picture(variant),) if variant in (CLEAN, variants[-1]) else self.ray(variant, variants)

    def stored(self, images: Sequence[Tensor], directions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        del directions
        return images[0], images[-1]

    def summary(self, subset: str, variants: Sequence[Variant]) -> str:
        del subset, variants
        return "Clean images, each beside the one at the largest epsilon"


def test_a_layout_may_store_some_images_and_make_the_others(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_once(write_config())
    plain = pipeline.load(tmp_path / "out", ["0", "2/255", "3/255", "8/255"], split="test")
    monkeypatch.setitem(REGISTRY, "wide", Largest())
    out = tmp_path / "largest"
    generate(write_config(output={"layout": "wide", "path": str(out)}))
    result = fgsm("verify", out, "--recompute")
    assert result.exit_code == 0, result.output
    assert "120 predictions" in result.stdout
    largest = pipeline.load(out, ["0", "2/255", "3/255", "8/255"], split="test")
    pixels = [[np.asarray(image).tobytes() for image in rows["image"]] for rows in (plain, largest)]
    assert sorted(pixels[0]) == sorted(pixels[1])
    result = fgsm("generate", write_config(output={"layout": "wide"}, attack={"kind": "pgd"}), "--overwrite")
    assert result.exit_code == 2
    assert "Error: output.layout: wide " in result.stderr

    def another(columns: dict[str, list[Any]]) -> None:
        columns["attacked"][5] = columns["attacked"][6]

    forge(out, another, f"wide/{SHARD}.parquet")
    assert_found(rf"{SHARD}\S* .* ball of 8/255", out)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if REGISTRY[name].per_image])
def test_what_is_said_of_a_source_image_is_what_layout_images_says(
    write_config: WriteConfig, tmp_path: Path, layout: str
) -> None:
    generate_once(write_config())
    generate(write_config(output={"layout": layout}), "--output", str(tmp_path / layout))
    frame, clean = rows(tmp_path / layout, subset_of(layout, 0)), rows(tmp_path / "out", "clean")
    for name in ("prediction", "confidence", "label_confidence", "correct"):
        assert frame[f"clean_{name}"].to_json() == clean[name].to_json()
    for index, level in enumerate(LEVELS[1:]):
        attacked = rows(tmp_path / "out", f"eps-{level}")
        for name in ("epsilon", "attack", "model", "prediction", "confidence", "label_confidence", "correct", "fooled"):
            assert [attacks[index][name] for attacks in frame["attacks"]] == attacked[name].tolist()
    counts = [
        [{**subset, "bytes": None} for subset in manifest(tmp_path / folder)["subsets"]] for folder in ("out", layout)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_that_is_gone_is_found_and_written_again(
    write_config: WriteConfig, tmp_path: Path, layout: str
) -> None:
    config, out = write_config(output={"layout": layout}), tmp_path / "out"
    generate_once(config)
    before = digests(out)
    shard_path(out / subset_of(layout, 8), "test-00001-of-00003.parquet").unlink()
    result = fgsm("verify", out, "--repair")
    assert result.exit_code == 1
    assert re.search(r"/test-00001-of-00003\S*\.parquet is missing", result.stderr)
    assert "2 of 3 shards" in generate(config)
    assert digests(out) == before
    assert fgsm("verify", out, "--source").exit_code == 0


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("signs", "sign"),
        ("wide", "eps_8"),
        *(
            (name, taken)
            for name in ("signs", "wide")
            for taken in ("attacks", "clean_correct", "epsilon", "fooled", "attack")
        ),
        *((name, taken) for name in LAYOUTS for taken in ("prediction", "model")),
    ],
)
def test_a_kept_column_must_not_have_the_name_of_ours(
    write_config: WriteConfig, tmp_path: Path, layout: str, name: str
) -> None:
    column: dict[str, Any] = {name: (datasets.Value("string"), ["a"] * 4)}
    source = write_parquet(tmp_path / "named", [png_bytes(image) for image in random_pixels(4)], [0] * 4, **column)
    keep = {"path": str(source), "keep_columns": [name]}
    result = fgsm("generate", write_config(source=keep, output={"layout": layout}))
    assert result.exit_code == 2
    assert f"Error: source.keep_columns: {name} " in result.stderr


@pytest.mark.parametrize(("layout", "pictures"), [("signs", ("image", "sign")), ("wide", ("image", "eps_2", "eps_8"))])
def test_the_columns_of_a_row_for_each_image_are_those_of_the_contract(
    write_config: WriteConfig, tmp_path: Path, layout: str, pictures: tuple[str, ...]
) -> None:
    generate_once(write_config(**{**KINDS["targeted"](tmp_path), "output": {"layout": layout}}))
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="test")
    classes, value = loaded.features["label"], datasets.Value
    answer = {
        "prediction": classes,
        "confidence": value("float32"),
        "label_confidence": value("float32"),
        "correct": value("bool"),
    }
    made = {"attack": value("string"), "model": value("string")}
    assert list(loaded.features.items()) == [
        *((name, datasets.Image()) for name in pictures),
        ("label", classes),
        *((f"clean_{name}", feature) for name, feature in answer.items()),
        ("attacks", datasets.List({"epsilon": value("float64"), **made, **answer, "fooled": value("bool")})),
        ("target", classes),
        ("source_index", value("int64")),
        ("caption", value("string")),
        ("boxes", datasets.List(value("int32"))),
    ]
    assert isinstance(classes, datasets.ClassLabel)
