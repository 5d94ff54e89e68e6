"""The card: what it says is so, what it shows runs, and no name breaks out of it."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from pipeline.core.origin import Origin
from pipeline.output.card import HERE, code, moved_card, plain, read_configs, render_card, size_category
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest, read_manifest
from pipeline.output.transfer import by_epsilon
from pipeline.sources.digits import DIGITS
from pipeline.sources.origins import card_license
from tests.conftest import (
    KINDS,
    LAYOUTS,
    WriteConfig,
    fgsm,
    generate_once,
    png_bytes,
    random_pixels,
    write_parquet,
)
from tests.support.several import ATTACKS, write_several

NASTY = [
    "a|b",
    "two\nlines",
    "---",
    "\n---\nlicense: mit\n---\n",
    "<script>alert(1)</script>",
    "<!-- ",
    "`tick` and ``ticks``",
    "```\nfence",
    "[link](https://example.org)",
    "![image](x.png)",
    "*bold* _under_ __strong__",
    "# heading",
    "- item: {a: b}",
    "1. item",
    "2) item",
    "+ item",
    "===",
    "&amp; &#60;b&#62;",
    "back\\slash \\| pipe",
    "{{ config }} {% raw %}",
    'quote " and \' and "',
    "tab\tnull\x00 bell\x07",
    "right\u202eleft \u2028 line",
    " leading and trailing ",
    "naïve 犬 🐕",
    "$x$ ~~no~~ ^up^ @user",
    "",
]


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def front_of(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(OutputFolder(folder))
    assert manifest is not None
    return manifest


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every Markdown table, as GitHub's rules split them."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]


# --------------------------------------------------------------------------------------------- what it shows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "gray", "unlabelled"])
def test_every_example_of_the_card_runs(write_config: WriteConfig, tmp_path: Path, layout: str, kind: str) -> None:
    generate_once(write_config(**{**KINDS[kind](tmp_path), "output": {"layout": layout}}))
    text = card_of(tmp_path / "out")
    assert text.count(HERE) == 3
    shown = examples(text.replace(HERE, str(tmp_path / "out")))
    assert len(shown) == (4 if layout == "images" else 5)
    names: dict[str, Any] = {}
    for index, example in enumerate(shown):
        exec(example, names)
        if index == 0:
            loaded = names["rows"]
    channels, size = (1, 16) if kind == "gray" else (3, 16)
    images = next(iter(names["loader"]))["image"]
    assert (images.dtype, tuple(images.shape[1:])) == (torch.uint8, (channels, size, size))
    table = names["table"].fetchall()
    assert [row[0] for row in table] == ([0.0] if layout == "images" else []) + [2 / 255, 8 / 255]
    assert sorted(set(names["rows"]["epsilon"])) == [0.0, 3 / 255]
    assert len(loaded) * 2 == len(names["rows"])
    if layout != "images":
        row = loaded[0]
        ours = np.asarray(names["pipeline"].load(tmp_path / "out", ["8/255"], split="test")[0]["image"])
        np.testing.assert_array_equal(np.asarray(names["attacked"]), ours)
        assert row["source_index"] == names["row"]["source_index"]


def test_the_table_is_that_of_inspect(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    lines = [line.split() for line in fgsm("inspect", tmp_path / "out").stdout.splitlines()[1:4]]
    _, rule, *cells = next(table for table in tables(card_of(tmp_path / "out")) if " accuracy " in table[0])
    assert rule == ["---"] * 5 + ["---:"] * 4
    made = [("-", "-"), *[("fgsm", "make")] * 2]
    for line, row, (attack, model) in zip(lines, cells, made, strict=True):
        split, subset, *by, epsilon, images, accuracy, confidence, fooled = (cell.strip() for cell in row)
        numbers = [images, accuracy, confidence, fooled]
        assert [split, subset, *by] == ["`test`", f"`{line[1]}`", attack, model]
        assert epsilon.split()[0] == line[2]
        assert numbers == line[3:7]


def test_the_columns_are_those_of_the_files(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(**KINDS["targeted"](tmp_path)))
    columns = next(table for table in tables(card_of(tmp_path / "out")) if "column" in table[0][0])[2:]
    features = datasets.load_dataset(str(tmp_path / "out"), "eps-8", split="test").features
    assert [row[0].strip(" `") for row in columns] == list(features)
    meanings = {row[0].strip(" `"): row[2].strip() for row in columns}
    assert meanings["caption"] == meanings["boxes"] == "from the source, unchanged"
    assert meanings["fooled"] == "whether the prediction is the target; null on clean images"
    types = {row[0].strip(" `"): row[1].strip() for row in columns}
    assert (types["image"], types["label"], types["epsilon"]) == ("Image", "ClassLabel", "float64")
    assert (types["boxes"], types["caption"]) == ("list of int32", "string")


def test_the_attacks_of_layout_signs_are_described(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output={"layout": "signs"}))
    text = card_of(tmp_path / "out")
    fields = next(table for table in tables(text) if "field" in table[0][0])[2:]
    assert [row[0].strip(" `") for row in fields] == [
        "epsilon",
        "attack",
        "model",
        "prediction",
        "confidence",
        "label_confidence",
        "correct",
        "fooled",
    ]
    assert "| `attacks` | list of struct |" in text
    assert "One row per source image." in text


@pytest.mark.parametrize("layout", ["signs", "signs-bits", "wide"])
def test_yaml_says_the_features_of_a_row_for_each_image(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    generate_once(write_config(output={"layout": layout}))
    stated = datasets.DatasetInfo._from_yaml_dict(front_of(card_of(tmp_path / "out"))["dataset_info"]).features
    assert stated == datasets.load_dataset(str(tmp_path / "out"), split="test").features


def test_yaml_is_what_the_hub_wants(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    text = card_of(tmp_path / "out")
    front = front_of(text)
    assert front["task_categories"] == ["image-classification"]
    assert front["dataset_info"]["config_name"] == front["configs"][0]["config_name"]
    stated = datasets.DatasetInfo._from_yaml_dict(front["dataset_info"]).features
    assert (
        stated
        == datasets.load_dataset(str(tmp_path / "out"), front["configs"][-1]["config_name"], split="test").features
    )
    assert front["size_categories"] == ["n<1K"]  # 3 * 40 rows
    assert {"adversarial", "fgsm"} <= set(front["tags"])
    assert [config["config_name"] for config in front["configs"] if config.get("default")] == ["all"]
    assert "license" not in front, "it is not known"
    assert "The licence of the source is unknown" in text
    assert DatasetCard(text).data.get("pretty_name") == "source under FGSM"


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9_999, "1K<n<10K"), (10**6, "1M<n<10M"), (10**13, "n>1T")],
)
def test_size_categories(rows: int, category: str) -> None:
    assert size_category(rows) == category


def test_signs_count_their_rows_once(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output={"layout": "signs"}))
    manifest = manifest_of(tmp_path / "out")
    for layout_rows, category in ((900, "n<1K"), (1100, "1K<n<10K")):
        text = render_card(manifest.model_copy(update={"rows": layout_rows}))
        assert front_of(text)["size_categories"] == [category]


def test_pictures_are_linked_once_the_dataset_is_complete(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    manifest = manifest_of(tmp_path / "out")
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", card_of(tmp_path / "out"))
    assert pictures == ["assets/accuracy.png", "assets/confidence.png", "assets/examples.png"]
    unfinished = render_card(manifest.model_copy(update={"complete": False, "rows": 16}))
    assert "assets/" not in unfinished
    assert "**Incomplete: 16 of 40 source images so far.**" in unfinished


def test_how_it_was_made_is_said(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(attack={"epsilons": [0.031, "8/255"]}, preprocess={"resize": 20, "crop": 16})
    generate_once(config)
    text = card_of(tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert "clip(x + k*s, 0, 255)" in text
    assert "7 (7/255 = 0.0275, asked for as 0.031) and 8 (8/255 = 0.0314)." in text
    assert "factory `victim.py:make`, as its callable makes it" in text
    assert "16x16 RGB, WEBP without loss, resized to 20 (bilinear), cropped to 16 in the centre." in text
    assert f"torch {manifest.versions['torch']}" in text
    assert manifest.run_id in text
    assert "fp32" in text
    assert "raises the loss of the label" in text
    # Where things lie on this machine is nobody's business.
    assert str(tmp_path) not in text


def test_a_reader_is_told_what_it_is_not(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    text = card_of(tmp_path / "out")
    assert "not a robustness evaluation on their own" in text
    assert "against one model" in text
    assert "arxiv.org/abs/1705.07204" not in text, "several source models are another thing"
    assert "label leaking" in text
    assert "Goodfellow, Ian J." in text
    assert "Kurakin, Alexey" not in text


@pytest.mark.parametrize("attack", [{"label": "prediction"}, {"target": "least_likely"}, {"target": "eel"}])
def test_attacks_without_the_true_label_cite_their_source(
    write_config: WriteConfig, tmp_path: Path, attack: dict[str, Any]
) -> None:
    generate_once(write_config(attack=attack))
    text = card_of(tmp_path / "out")
    assert "Kurakin, Alexey" in text
    assert "label leaking" not in text


OWN_ATTACK = """
from pipeline.attacks.base import Perturbed


class Darker:
    on_ray = False
    needs_draws = False

    def perturb(self, model, images, classes, levels, draws):
        return Perturbed(tuple(images - images.clamp(max=level) for level in levels))
"""


def test_an_attack_of_ones_own_is_not_cited_as_another(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_ATTACK)
    generate_once(write_config(attack={"kind": f"{tmp_path}/own.py:Darker"}))
    text = card_of(tmp_path / "out")
    assert "@inproceedings" not in text


@pytest.mark.parametrize(("kind", "epsilons"), [("fgsm", {0.0, 3 / 255}), ("pgd", {0.0, 8 / 255})])
def test_the_card_offers_epsilons_that_can_be_read(
    write_config: WriteConfig, tmp_path: Path, kind: str, epsilons: set[float]
) -> None:
    """Of an attack whose images lie on no ray, the recorded ones alone."""
    generate_once(write_config(attack={"kind": kind}))
    text = card_of(tmp_path / "out")
    assert ("recorded or not" in text) == (kind == "fgsm")
    names: dict[str, Any] = {}
    exec(examples(text.replace(HERE, str(tmp_path / "out")))[-1], names)
    assert {*names["rows"]["epsilon"]} == epsilons


def test_origins_are_named(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    manifest = manifest_of(tmp_path / "out")
    digits = render_card(manifest.model_copy(update={"origin": DIGITS}))
    assert front_of(digits)["license"] == "cc-by-4.0"
    assert "E. Alpaydin and C. Kaynak" in digits
    origin = Origin(name="cifar10", repository="uoft-cs/cifar10", revision="0" * 40, license="Ask Ian | first")
    text = render_card(manifest.model_copy(update={"origin": origin}))
    assert front_of(text)["source_datasets"] == ["uoft-cs/cifar10"]
    assert front_of(text)["license"] == "other"
    assert f"(https://huggingface.co/datasets/uoft-cs/cifar10) at revision {'0' * 40}" in text
    assert "states this licence: Ask Ian &#124; first." in text


# ------------------------------------------------------------------------------------- several models and attacks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_card_of_several_models_and_attacks(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    signs = layout.startswith("signs")
    attacks = {name: attack for name, attack in ATTACKS.items() if not signs or name != "pgd"}
    generate_once(write_several(write_config, tmp_path, attacks, output={"layout": layout}))
    out = tmp_path / "out"
    text, manifest = card_of(out), manifest_of(out)
    names: dict[str, Any] = {}
    for example in examples(text.replace(HERE, str(out))):
        exec(example, names)
    made = {(attack, model, level / 255) for attack, model, level in made_by(manifest)}
    assert {row[:3] for row in names["table"].fetchall()} == (
        made if layout != "images" else {(None, None, 0.0), *made}
    )
    shown = set(names["rows"]["epsilon"])
    assert shown == ({0.0, 3 / 255} if signs else {0.0, 8 / 255})
    assert ("recorded or not" in text) == signs
    if layout != "images":
        # The first row of the last variant, of 40 rows each.
        ours = names["pipeline"].load(out, ["8/255"], split="test")[-40]["image"]
        np.testing.assert_array_equal(np.asarray(names["attacked"]), np.asarray(ours))
    head, _, *body = next(table for table in tables(text) if " images of " in table[0])
    assert [cell.strip() for cell in head[4:]] == ["`net`", "`sums`", "`turned`"]
    for row, cells in zip(body, by_epsilon(manifest.transfer), strict=True):
        _, _, attack, model, *answers = (cell.strip() for cell in row)
        assert (attack, model) == (cells[0].attack, cells[0].model or "no model")
        assert answers == [f"{cell.accuracy:.1%} ({cell.share_lost or 0:.1%})" for cell in cells]
    assert re.search(r"\*\*Model\*\* `turned`, which is not attacked: factory `sums.py:make`", text)
    assert "made against `net` and `sums`. For another" in text
    assert "https://arxiv.org/abs/1705.07204" in text, "what images of several source models are for"
    assert "| `prediction_turned` | ClassLabel | as prediction, of model turned |" in text
    assert ("| `clean_correct_turned` | bool | as clean_correct, of model turned |" in text) == (layout != "images")
    assert ("Madry" in text) != signs
    assert "Kurakin, Alexey" not in text, "no attack does without the true label"
    assert {"fgsm", "pgd"} & set(front_of(text)["tags"]) == set(attacks) - {"noise"}


def made_by(manifest: Manifest) -> list[tuple[str | None, str | None, int]]:
    return [(variant.attack, variant.model, variant.level) for variant in manifest.variants[1:]]


def test_one_epsilon_of_several_subsets_is_a_config(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_several(write_config, tmp_path))
    out, whole = tmp_path / "out", {}
    for name in ("eps-2", "eps-8", "all", "clean"):
        whole[name] = datasets.load_dataset(str(out), name, split="test").to_pandas()
    made = {name: set(zip(rows["attack"], rows["model"].fillna(""), strict=True)) for name, rows in whole.items()}
    assert made["eps-2"] == {("fgsm", "net"), ("fgsm", "sums")}
    assert made["eps-8"] == {("fgsm", "net"), ("fgsm", "sums"), ("noise", ""), ("pgd", "net")}
    assert {name: len(rows) for name, rows in whole.items()} == {"eps-2": 80, "eps-8": 160, "all": 280, "clean": 40}
    for level in (2, 8):
        assert set(whole[f"eps-{level}"]["epsilon"]) == {level / 255}


def test_noise_alone_has_no_paper_and_no_model(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(attack={"kind": "noise"}))
    text = card_of(tmp_path / "out")
    for claim in ("bibtex", "Citation", "Kurakin", "They were made against", "direction of the attack", "true label"):
        assert claim not in text, claim
    assert set(front_of(text)["tags"]) == {"adversarial", "adversarial-examples", "robustness"}


@pytest.mark.parametrize(("target", "cited"), [(None, 1), ("eel", 2)])
def test_noise_beside_it_does_not_cite_attacks_without_the_label(
    write_config: WriteConfig, tmp_path: Path, target: str | None, cited: int
) -> None:
    attacks = {"pgd": {**ATTACKS["pgd"], "target": target}, "noise": ATTACKS["noise"]}
    generate_once(write_several(write_config, tmp_path, attacks))
    text = card_of(tmp_path / "out")
    assert text.count("@inproceedings") == cited
    assert ("direction of the attack" in text) == (target is None)


# ------------------------------------------------------------------------------------------- names from elsewhere


class Seen(HTMLParser):
    """What a reader of the rendered card gets: the tags it has, and the texts of some of them."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.add(tag)
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def handle_comment(self, data: str) -> None:
        self.tags.add(f"<!--{data}-->")


def visible(name: str) -> str:
    """A name with its control characters as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_shown_as_it_is_and_does_nothing(name: str) -> None:
    seen = Seen(f"| a | b |\n|---|---|\n| {code(name)} | {plain(name)} |\n\n{plain(name)}\n")
    assert seen.tags <= {"table", "thead", "tbody", "tr", "th", "td", "code", "p"}
    assert seen.texts["code"] == [visible(name)]
    assert seen.texts["td"] == [visible(name), visible(name).strip()]
    assert seen.texts.get("p", [""]) == [visible(name).strip()]


def test_nasty_names_stay_inside(write_config: WriteConfig, tmp_path: Path) -> None:
    """A dataset whose every name is hostile: classes, columns, licence, the model's file, the source's folder."""
    names = [name.replace("\x00", "") for name in NASTY if name.strip()]
    names = [*dict.fromkeys(names)]
    folder = tmp_path / "so|urce --- <b>`x`"
    images = [png_bytes(image) for image in random_pixels(len(names))]
    column: Any = (datasets.Value("string"), names)
    more: dict[str, Any] = {"text": column, "k|e<b>\n---`p`t": column}
    write_parquet(folder, images, None, **more)
    (folder / "README.md").write_text(f"---\nlicense: {NASTY[3]!r}\n---\n")
    victim = tmp_path / "vic`tim | <i>.py"
    shutil.copy(tmp_path / "victim.py", victim)
    generate_once(
        write_config(
            source={"path": str(folder), "label_column": "text", "keep_columns": ["k|e<b>\n---`p`t"]},
            model={"name": f"{victim}:make", "kwargs": {"classes": len(names)}},
        )
    )
    text = card_of(tmp_path / "out")
    assert text.count("\n---\n") == 1, "only our own line ends the YAML"
    front = front_of(text)
    assert set(front) == {
        *("pretty_name", "license", "task_categories", "size_categories", "tags", "dataset_info", "configs"),
    }
    assert front["pretty_name"] == f"{folder.name} under FGSM"
    assert front["license"] == "other"
    seen = Seen(text.split("\n---\n", 1)[1])
    blocks = {"p", "pre", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    assert seen.tags == {"h1", "h2", "code", "strong", "img", *blocks}
    assert seen.texts["h1"] == [f"{folder.name} under FGSM"]
    assert seen.texts["h2"] == [
        "Load it",
        "What the model predicts",
        "Columns",
        "How it was made",
        "Intended use and limits",
        "Source and licence",
        "Citation",
    ]
    assert {visible(name) for name in sorted(names)[:20]} <= set(seen.texts["code"])
    assert {visible("k|e<b>\n---`p`t"), "vic`tim | <i>.py:make"} <= set(seen.texts["code"])
    assert any(visible(NASTY[3].strip()) in text for text in seen.texts["p"]), "the licence"
    for table in tables(text):
        assert len({len(row) for row in table}) == 1, table
    loaded = datasets.load_dataset(str(tmp_path / "out"), "eps-8", split="test")
    assert set(loaded.features["label"].names) == set(names)
    assert fgsm("verify", tmp_path / "out").exit_code == 0


# ------------------------------------------------------------------------------------------- moved to the Hub


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_card_loads_from_the_hub_and_keeps_what_was_added(
    write_config: WriteConfig, tmp_path: Path, layout: str
) -> None:
    generate_once(write_config(output={"layout": layout}))
    manifest, text = manifest_of(tmp_path / "out"), card_of(tmp_path / "out")
    text = text.replace("configs:", "license: mit\nconfigs:", 1) + "\nThanks to Ian.\u2028Really.\n"
    moved = moved_card(text, manifest, "user/name")
    assert 'load_dataset("user/name", ' in moved
    assert 'pipeline.load("user/name", ' in moved
    assert "hf://datasets/user/name/" in moved
    assert "From the Hub, with nothing but" in moved
    assert HERE not in moved
    assert "license: mit" in moved
    assert moved.endswith("\nThanks to Ian.\u2028Really.\n")
    assert front_of(moved) == front_of(text)
    # And on from there, and to where it is.
    assert moved_card(moved, manifest, "user/name") == moved
    assert moved_card(moved, manifest, "other/name") == moved.replace("user/name", "other/name")
    assert render_card(manifest, "user/name") == moved_card(render_card(manifest), manifest, "user/name")


def test_a_card_without_our_examples_is_left_as_it_is(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    assert moved_card("# Mine\n", manifest_of(tmp_path / "out"), "user/name") == "# Mine\n"


@pytest.mark.parametrize("front", ["day: 2001-99-99", "at: 2001-01-01T99:00:00", "[" * 5000])
def test_a_card_with_yaml_that_cannot_be_is_as_none(tmp_path: Path, front: str) -> None:
    """What YAML takes for a date and Python for none is a ValueError."""
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: mit\n{front}\n---\n")
    assert card_license(card) is None
    assert read_configs(OutputFolder(tmp_path)) is None
