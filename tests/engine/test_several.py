"""One run of several models and attacks: what its rows record, what they add up to, and that nothing else decides."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pytest
import torch
import yaml
from torch import nn

import pipeline
from pipeline.config.load import load_config
from pipeline.core import lanes
from pipeline.core.errors import NonFiniteError
from pipeline.core.images import decode_image
from pipeline.models.load import load_model
from pipeline.sources.digits import digits_split
from tests.conftest import (
    LABELS,
    LAYOUTS,
    WriteConfig,
    digests,
    generate,
    generate_once,
    kept_parquet,
    manifest,
    pixels,
    rows,
    some_slow,
)
from tests.conftest import fgsm_without_run as fgsm
from tests.support.forgery import assert_found, forge
from tests.support.several import ATTACKS, EVERY_KIND, write_several

SUBSETS = {
    "clean": (None, None, 0),
    "fgsm-net-eps-2": ("fgsm", "net", 2),
    "fgsm-net-eps-8": ("fgsm", "net", 8),
    "fgsm-sums-eps-2": ("fgsm", "sums", 2),
    "fgsm-sums-eps-8": ("fgsm", "sums", 8),
    "noise-eps-8": ("noise", None, 8),
    "pgd-net-eps-8": ("pgd", "net", 8),
}
MODELS = ("net", "sums", "turned")


@pytest.fixture
def out(write_config: WriteConfig, tmp_path: Path, made: Any) -> Path:
    if not made:
        generate(write_several(write_config, tmp_path))
        made["out"] = tmp_path / "out"
    folder: Path = made["out"]
    return folder


def answers(folder: Path, model: str, images: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What a model says of stored images, one at a time, in the dataset's classes."""
    section = load_config(str(folder.parent / "config.yaml")).all_models[model]
    module = load_model(section, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        found = np.array([int(module(decode_image(image["bytes"])[None] / 255).argmax()) for image in images])
    return np.array([2, 0, 1])[found] if model == "turned" else found


def test_every_row_says_what_made_it_and_what_each_model_makes_of_it(out: Path) -> None:
    clean = {model: answers(out, model, rows(out, "clean")["image"]) for model in MODELS}
    assert any(len(set(said)) > 1 for said in clean.values())
    for subset, (attack, model, level) in SUBSETS.items():
        table = rows(out, subset)
        assert set(table["attack"].fillna("")) == {attack or ""}
        assert set(table["model"].fillna("")) == {model or ""}
        assert set(table["epsilon"]) == {level / 255}
        own = model or "net"
        for name in MODELS:
            said = answers(out, name, table["image"])
            assert table[f"prediction_{name}"].tolist() == said.tolist()
            assert table[f"correct_{name}"].tolist() == (said == table["label"]).tolist()
            if name == own:
                assert table["prediction"].tolist() == said.tolist()
                assert table["correct"].tolist() == (said == table["label"]).tolist()
        assert table["clean_prediction"].tolist() == clean[own].tolist()
        if attack:
            fooled = (clean[own] == table["label"]) & (table["prediction"] != table["label"])
            assert table["fooled"].tolist() == fooled.tolist()
    names = list(rows(out, "clean").columns)
    expected = [name for model in MODELS for name in (f"prediction_{model}", f"correct_{model}")]
    assert names[names.index("source_index") + 1 :] == expected


def test_images_of_each_attack_lie_where_it_says(out: Path) -> None:
    clean = pixels(rows(out, "clean"))
    for subset, (attack, _, level) in SUBSETS.items():
        moved = pixels(rows(out, subset)) - clean
        assert abs(moved).max() == level
        if attack == "fgsm":
            # One sign a model for both epsilons; it is 0, or all of the epsilon but where that is clipped.
            other = pixels(rows(out, subset.replace(f"eps-{level}", f"eps-{10 - level}"))) - clean
            inside = (clean > 8) & (clean < 247)
            assert (np.sign(moved) == np.sign(other))[inside].all()
            assert set(np.unique(abs(moved[inside]))) <= {0, level}
    # Of two models they are not the same, nor is noise a gradient.
    images = [pixels(rows(out, subset)) for subset in ("fgsm-net-eps-8", "fgsm-sums-eps-8", "noise-eps-8")]
    assert all((a != b).mean() > 0.2 for a, b in itertools.pairwise(images))


def test_the_matrix_is_what_the_rows_add_up_to(out: Path) -> None:
    query = ", ".join(
        f"count_if(a.correct_{name}), count_if(c.correct_{name}), count_if(c.correct_{name} and not a.correct_{name})"
        for name in MODELS
    )
    keys = ("attack", "model", "level", "looking")
    cells = {tuple(cell[key] for key in keys): cell for cell in manifest(out)["transfer"]}
    assert len(cells) == (len(SUBSETS) - 1) * len(MODELS)
    for subset, (attack, model, level) in SUBSETS.items():
        if attack is None:
            continue
        files = f"'{out}/{subset}/*.parquet' a join '{out}/clean/*.parquet' c using (source_index)"
        (found,) = duckdb.execute(f"select count(*), {query} from {files}").fetchall()
        for index, name in enumerate(MODELS):
            cell = cells[attack, model, level, name]
            correct, before, lost = found[1 + 3 * index : 4 + 3 * index]
            assert (cell["images"], cell["correct"]) == (found[0], correct)
            assert (cell["clean_correct"], cell["lost"]) == (before, lost)
    shown = json.loads(fgsm("inspect", out, "--json").stdout)
    assert shown["transfer"] == manifest(out)["transfer"]
    assert shown["subsets"] == manifest(out)["subsets"]


def test_it_is_verified_and_forgeries_of_each_model_s_answers_are_found(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    generate_once(write_several(write_config, tmp_path))
    out = tmp_path / "out"
    result = fgsm("verify", out, "--recompute")
    assert result.exit_code == 0, result.stderr
    assert f"{40 * len(SUBSETS) * len(MODELS)} predictions re-derived" in result.stdout

    def other_answer(columns: dict[str, list[Any]]) -> None:
        columns["prediction_turned"][3] = (columns["prediction_turned"][3] + 1) % 3

    file = "pgd-net-eps-8/test-00001-of-00003"
    forge(out, other_answer, f"{file}.parquet")
    assert_found("_turned", out, "--recompute")


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, "signs", "wide"))
def test_every_layout_gives_the_same_rows(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    attacks = {**ATTACKS, "pgd": {**ATTACKS["pgd"], "kind": "fgsm", "target": "random", "steps": None}}
    generate_once(write_several(write_config, tmp_path, attacks))
    config = write_several(write_config, tmp_path, attacks, output={"layout": layout})
    generate(config, "--output", str(tmp_path / layout))
    plain, other = (pipeline.load(tmp_path / name, split="test") for name in ("out", layout))
    assert other.remove_columns("image").to_list() == plain.remove_columns("image").to_list()
    for a, b in zip(plain["image"], other["image"], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    aimed = {subset["subset"]: subset for subset in manifest(tmp_path / layout)["subsets"]}
    assert [name for name in aimed if "pgd" in name] == ["pgd-net-eps-8"]
    targets = [row["target"] for row in plain.select_columns(["target", "attack"]) if row["attack"] == "pgd"]
    assert set(targets) == {0, 1, 2}
    assert {row["target"] for row in plain.select_columns(["target", "attack"]) if row["attack"] != "pgd"} == {None}
    assert fgsm("verify", tmp_path / layout, "--recompute").exit_code == 0


def test_neither_lanes_nor_a_resumed_run_change_a_byte(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_several(write_config, tmp_path, EVERY_KIND)
    generate_once(config)
    before = digests(tmp_path / "out")
    monkeypatch.setattr(lanes, "available_cores", lambda: 1)
    generate(config, "--output", str(tmp_path / "alone"))
    assert digests(tmp_path / "alone") == before
    for file in [*(tmp_path / "out").glob(".run/receipts/*-00000-*"), *(tmp_path / "out").glob("*/*-00000-*")]:
        file.unlink()
    generate(config)
    assert digests(tmp_path / "out") == before


@pytest.mark.slow
def test_the_batch_size_changes_no_pixel_of_a_model_in_float64(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "exact.py").write_text(
        (tmp_path / "victim.py").read_text() + "\n\ndef exact():\n    return Net().double()\n"
    )
    images = []
    for size in (4, 16):
        model = {"name": f"{tmp_path / 'exact.py'}:exact"}
        config = write_several(write_config, tmp_path, EVERY_KIND, model=model, runtime={"batch_size": size})
        generate(config, "--output", str(tmp_path / f"of-{size}"))
        subsets = [subset["subset"] for subset in manifest(tmp_path / f"of-{size}")["subsets"]]
        images.append({subset: pixels(rows(tmp_path / f"of-{size}", subset)) for subset in subsets})
    assert {*images[0]} == {*SUBSETS, "bim-net-eps-8", "mifgsm-net-eps-8"}
    for subset in images[0]:
        np.testing.assert_array_equal(images[0][subset], images[1][subset])


def test_another_model_attack_or_order_is_another_run(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_several(write_config, tmp_path)
    generate_once(path)
    config = yaml.safe_load(path.read_text())
    for change, key in (
        ({"attacks": {**ATTACKS, "noise": {**ATTACKS["noise"], "epsilons": ["4/255"]}}}, "attacks.noise.epsilons"),
        ({"attacks": {**ATTACKS, "pgd": {**ATTACKS["pgd"], "models": ["sums"]}}}, "attacks.pgd.models"),
        ({"attacks": {**ATTACKS, "pgd": {**ATTACKS["pgd"], "steps": 4}}}, "attacks.pgd.steps"),
        ({"models": {**config["models"], "turned": dict(config["models"]["sums"])}}, "models.turned.kwargs"),
        ({"models": dict(reversed(config["models"].items()))}, "models"),
    ):
        path.write_text(yaml.safe_dump({**config, **change}, sort_keys=False))
        result = fgsm("generate", path)
        assert result.exit_code == 2
        assert key in result.stderr


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ({"kwargs": {"order": [0, 1]}}, "models.sums"),
        ({"weights": "nowhere.safetensors"}, "models.sums.weights"),
        ({"name": "sums.py:mkae"}, "models.sums.name"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(
    write_config: WriteConfig, tmp_path: Path, model: dict[str, Any], start: str
) -> None:
    path = write_several(write_config, tmp_path)
    config = yaml.safe_load(path.read_text())
    config["models"]["sums"] |= model
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    result = fgsm("generate", path)
    assert result.exit_code == 2
    assert start in result.stderr


@pytest.mark.parametrize(("target", "recorded"), [("cat", {"net": 0, "more": 4}), (1, {"net": 1, "more": 1})])
def test_one_target_is_each_model_s_own_index_of_that_class(
    write_config: WriteConfig, tmp_path: Path, target: str | int, recorded: dict[str, int]
) -> None:
    attacks = {"aimed": {"epsilons": ["8/255"], "models": ["net", "more"], "target": target}}
    path = write_several(write_config, tmp_path, attacks)
    config = yaml.safe_load(path.read_text())
    # Of its five classes three are the dataset's, and it names none of them.
    more = {"kwargs": {"order": [0, 1, 2, 0, 1]}, "label_map": {"cat": 4, "dog": 2, "eel": 0}}
    config["models"] = {"net": config["models"]["net"], "more": config["models"]["sums"] | more}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    generate(path)
    for model, index in recorded.items():
        table = rows(tmp_path / "out", f"{model}-eps-8")
        assert set(table["target"]) == {index}
        assert table["fooled"].tolist() == (table["prediction"] == index).tolist()
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


@pytest.mark.parametrize("target", ["ox", "part of the model"])
def test_a_target_that_is_no_class_names_the_attack_the_model_and_what_was_asked(
    write_config: WriteConfig, tmp_path: Path, target: str
) -> None:
    attacks = {"aimed": {"epsilons": ["8/255"], "models": ["sums"], "target": target}}
    result = fgsm("generate", write_several(write_config, tmp_path, attacks))
    assert result.exit_code == 2
    assert "attacks.aimed.target: " in result.stderr
    assert f"{target!r} " in result.stderr
    assert "the model sums" in result.stderr


def test_a_model_that_only_looks_need_not_let_a_gradient_through(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_several(write_config, tmp_path)
    config = yaml.safe_load(path.read_text())
    config["models"]["turned"] = {"kind": "factory", "name": str(tmp_path / "sums.py:detached")}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    generate_once(path)
    config["attacks"]["fgsm"]["models"] = ["turned"]
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    result = fgsm("generate", path, "--output", tmp_path / "other")
    assert result.exit_code == 2
    assert re.search(r"Error: models\.turned: .*gradient", result.stderr)


def test_a_model_that_gives_no_numbers_stops_the_run_and_is_named(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_several(write_config, tmp_path)
    config = yaml.safe_load(path.read_text())
    config["models"]["turned"] |= {"kwargs": {"scale": 1.5e39}, "label_map": None}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    result = fgsm("generate", path)
    assert result.exit_code == NonFiniteError.exit_code
    assert "turned" in result.stderr
    assert not list((tmp_path / "out/.run/receipts").iterdir())


def test_a_layout_of_signs_names_the_attack_that_it_cannot_hold(write_config: WriteConfig, tmp_path: Path) -> None:
    result = fgsm("generate", write_several(write_config, tmp_path, output={"layout": "signs"}))
    assert result.exit_code == 2
    assert "output.layout" in result.stderr
    assert "attacks.pgd" in result.stderr


def test_a_model_or_an_attack_that_has_changed_is_not_asked_again(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_several(write_config, tmp_path))
    path = tmp_path / "sums.py"
    path.write_text(path.read_text().replace("mean((2, 3))", "amax((2, 3))"))
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 2
    assert "models.sums" in result.stderr


class Perceptron(nn.Sequential):
    """Another architecture than the digits model's: no convolution at all."""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = Perceptron()
    pool, flatten, *layers = model
    pooled, learning = flatten(pool(images / 255)), nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for some in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(learning(pooled[some]), labels[some]).backward()
            optimizer.step()
    return model


@pytest.mark.slow
def test_the_same_images_fool_another_architecture_and_noise_does_not(tmp_path: Path) -> None:
    """Made on the digits CNN, seen by a perceptron that was trained here: not made for it, and it falls."""
    images, labels = digits_split("train")
    model = trained(torch.from_numpy(images)[:, None].float(), torch.from_numpy(labels))
    torch.save(model.state_dict(), tmp_path / "perceptron.pt")
    other = {"kind": "factory", "name": f"{__name__}:Perceptron", "weights": str(tmp_path / "perceptron.pt")}
    config = {
        "source": {"kind": "digits", "split": "test"},
        "preprocess": {"mode": "L"},
        "models": {"cnn": {"kind": "digits"}, "perceptron": other},
        "attacks": {
            "fgsm": {"epsilons": ["64/255"], "models": ["cnn"]},
            "noise": {"kind": "noise", "epsilons": ["64/255"]},
        },
        "output": {"path": str(tmp_path / "out")},
        "runtime": {"workers": 0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    generate_once(tmp_path / "config.yaml")
    clean, fgsm_rows, _ = manifest(tmp_path / "out")["subsets"]
    assert clean["models"]["perceptron"]["correct"] > 0.9 * clean["labelled"]
    fell = fgsm_rows["models"]["perceptron"]
    assert fell["exposed"] > 300
    cells = manifest(tmp_path / "out")["transfer"]
    lost = {cell["attack"]: cell["lost"] / cell["clean_correct"] for cell in cells if cell["looking"] == "perceptron"}
    assert fell["transferred"] / fell["exposed"] > 0.1 + 2 * lost["noise"]
    assert lost["fgsm"] > 0.1 + 2 * lost["noise"]


@pytest.mark.parametrize("levels", some_slow([["0", "2/255", "8/255"], ["8/255", "5/255"]], ["8/255", "5/255"]))
def test_all_layouts_hold_kept_columns_and_load_the_same_at_any_epsilon(
    write_config: WriteConfig, tmp_path: Path, levels: list[str]
) -> None:
    kept = kept_parquet(tmp_path / "kept", [None, *LABELS[1:]])
    attacks = {"fgsm": {**ATTACKS["fgsm"], "label": "prediction"}}
    for layout in LAYOUTS:
        source = {"path": str(kept), "keep_columns": ["caption"]}
        config = write_several(write_config, tmp_path, attacks, source=source, output={"layout": layout})
        generate(config, "--output", str(tmp_path / layout))
        assert fgsm("verify", tmp_path / layout, "--recompute").exit_code == 0
    tables = [pipeline.load(tmp_path / layout, levels, split="test") for layout in LAYOUTS]
    plain = [table.remove_columns("image").to_list() for table in tables]
    assert tables[0].column_names[-1] == "caption"
    for table, found in zip(tables, plain, strict=True):
        assert table.column_names == tables[0].column_names
        assert found == plain[0]
    recorded = [round(row["epsilon"] * 255) in (0, 2, 8) for row in plain[0]]
    assert all(recorded) == ("5/255" not in levels)
    for row, known in zip(plain[0], recorded, strict=True):
        for name in MODELS:
            assert (row[f"prediction_{name}"] is None) == (not known)
            assert (row[f"correct_{name}"] is None) == (row["label"] is None or not known)


def test_a_kept_column_cannot_be_taken_for_a_model_s(write_config: WriteConfig, tmp_path: Path) -> None:
    table = datasets.Dataset.from_parquet(str(kept_parquet(tmp_path / "kept", LABELS) / "test-00000-of-00001.parquet"))
    table.rename_column("caption", "prediction_of_age").to_parquet(str(tmp_path / "named/test-00000-of-00001.parquet"))
    source = {"path": str(tmp_path / "named"), "keep_columns": ["prediction_of_age"]}
    result = fgsm("generate", write_several(write_config, tmp_path, source=source))
    assert result.exit_code == 2
    assert "prediction_of_age" in result.stderr


@pytest.mark.parametrize("options", [[], ["--recompute"]])
def test_forged_flags_of_a_model_that_looks_are_found(
    write_config: WriteConfig, tmp_path: Path, options: list[str]
) -> None:
    """One flag changes what is counted; two that are exchanged change no count."""
    generate_once(write_several(write_config, tmp_path))

    def another(columns: dict[str, list[Any]]) -> None:
        flags = columns["correct_turned"]
        flags[flags.index(True)] = False
        if options:
            flags[flags.index(False, flags.index(False) + 1)] = True

    forge(tmp_path / "out", another, "noise-eps-8/test-00001-of-00003.parquet")
    result = fgsm("verify", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert re.search(r"correct_turned|test-00001-of-00003\.json .*counts", result.stderr)
