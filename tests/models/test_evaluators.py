"""Evaluators: other models that look at the victim's images, and what of the attack transfers to them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn

import pipeline
from pipeline.config.load import load_config, parse_config
from pipeline.config.schema import EvaluatorConfig
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.images import decode_image
from pipeline.models.load import load_model
from pipeline.sources.digits import digits_split
from tests.conftest import LABELS, LAYOUTS, ROOM, WriteConfig, digests, generate, kept_parquet, manifest, rows
from tests.conftest import fgsm_without_run as fgsm
from tests.support.configs import section
from tests.support.forgery import FILE, SHARD, another_mistake, assert_found, forge

LEVELS = (0, 2, 8)


@pytest.fixture
def other(tmp_path: Path) -> dict[str, Any]:
    """An evaluator of another architecture than the victim's."""
    path = tmp_path / "other.py"
    path.write_text(ROOM)
    return {"id": "sums", "kind": "factory", "name": f"{path}:make"}


def with_evaluators(config: Path, *evaluators: dict[str, Any]) -> Path:
    config.write_text(config.read_text() + f"evaluators: {json.dumps(evaluators)}\n")
    return config


# --------------------------------------------------------------------------------------------------- config


def parsed(*evaluators: Any) -> tuple[EvaluatorConfig, ...]:
    sections = {"source": {"kind": "digits"}, "model": {"kind": "digits"}, "output": {"path": "out"}}
    return parse_config({**sections, "attack": {"epsilons": [0.1]}, "evaluators": list(evaluators)}).evaluators


def test_an_evaluator_is_a_model_with_an_id() -> None:
    (evaluator,) = parsed({"id": "resnet_18", "kind": "torchvision", "name": "resnet18", "mean": [0.5]})
    assert (evaluator.id, evaluator.call[0], evaluator.mean, evaluator.std) == ("resnet_18", "resnet18", (0.5,), None)
    assert parsed({"id": "d", "kind": "digits"})[0].weights == "digits"


@pytest.mark.parametrize(
    ("evaluators", "message"),
    [
        ([{"kind": "digits"}], r"^evaluators\.0\.id is missing"),
        ([{"id": "a b", "kind": "digits"}], r"^evaluators\.0\.id: got 'a b'; allowed: up to 64 letters"),
        ([{"id": "", "kind": "digits"}], r"^evaluators\.0\.id: got ''"),
        ([{"id": "a" * 65, "kind": "digits"}], r"^evaluators\.0\.id: got 'aaa"),
        ([{"id": "../a", "kind": "digits"}], r"^evaluators\.0\.id: got '\.\./a'"),
        ([{"id": "a", "kind": "digits"}] * 2, r"^evaluators: two of them have the id a"),
        ([{"id": "a", "kind": "digits"}, {"id": "b", "kind": "timm"}], r"^evaluators\.1\.name is missing"),
        ([{"id": "a", "kind": "digits", "wieghts": None}], r"^evaluators\.0\.wieghts is an unknown key; .*weights\?"),
        ([{"id": "a", "kind": "digits", "name": "b"}], r"^evaluators\.0\.name is an unknown key with kind digits"),
        ([3], r"^evaluators\.0 must be a mapping"),
    ],
)
def test_what_is_wrong_with_evaluators_is_one_sentence(evaluators: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*evaluators)


def test_a_file_s_evaluators_are_relative_to_it(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    generate(with_evaluators(write_config(), {**other, "name": "other.py:make"}))
    assert manifest(tmp_path / "out")["config"]["evaluators"][0]["name"] == str(tmp_path / "other.py:make")


# ------------------------------------------------------------------------------------------------- recorded


def asked(config: dict[str, Any], images: list[dict[str, bytes]]) -> list[int]:
    """What a model says of stored images, one at a time, with nothing of ours between them."""
    model = load_model(section("evaluators", **config), seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        return [int(model(decode_image(image["bytes"])[None] / 255).argmax()) for image in images]


def test_its_predictions_are_those_of_the_stored_images(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path
) -> None:
    generate(with_evaluators(write_config(), other, {**other, "id": "turned", "kwargs": {"order": [2, 0, 1]}}))
    for level in LEVELS:
        table = rows(tmp_path / "out", f"eps-{level}" if level else "clean")
        expected = np.array(asked(other, list(table["image"])))
        assert len(set(expected)) == 3
        assert table["prediction_sums"].tolist() == expected.tolist()
        assert table["correct_sums"].tolist() == (expected == table["label"]).tolist()
        # Red is its class 1, as the order [2, 0, 1] puts it second.
        assert table["prediction_turned"].tolist() == np.array([1, 2, 0])[expected].tolist()
        order = list(table.columns)
        assert order[order.index("source_index") + 1 :] == [
            *("prediction_sums", "correct_sums", "prediction_turned", "correct_turned"),
        ]


def test_a_label_map_says_how_its_classes_meet_the_dataset_s(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path
) -> None:
    turned = {**other, "id": "turned", "kwargs": {"order": [2, 0, 1]}, "label_map": {"cat": 1, "dog": 2, "eel": 0}}
    generate(with_evaluators(write_config(), other, turned))
    table = rows(tmp_path / "out", "eps-8")
    assert table["prediction_turned"].tolist() == table["prediction_sums"].tolist()
    assert table["correct_turned"].tolist() == table["correct_sums"].tolist()


def test_counts_say_what_transfers(write_config: WriteConfig, other: dict[str, Any], tmp_path: Path) -> None:
    config = write_config()
    victim = load_config(str(config)).model.model_dump(include={"kind", "name"})
    generate(with_evaluators(config, other, {**victim, "id": "itself"}))
    clean = rows(tmp_path / "out", "clean")
    for subset in manifest(tmp_path / "out")["subsets"]:
        level, counts = subset["level"], subset["evaluators"]
        table = rows(tmp_path / "out", f"eps-{level}" if level else "clean")
        lost = clean["correct_sums"] & ~table["correct_sums"]
        fooled = table["fooled"].fillna(False).astype(bool)
        assert counts["sums"] == {
            "correct": int(table["correct_sums"].sum()),
            "fooled": int(lost.sum()),
            "exposed": int((fooled & clean["correct_sums"]).sum()),
            "transferred": int((fooled & lost).sum()),
        }
        assert counts["itself"]["transferred"] == counts["itself"]["exposed"] == subset["fooled"]
        assert counts["itself"]["correct"] == subset["correct"]
    assert subset["fooled"] > 0
    line = next(line for line in fgsm("inspect", tmp_path / "out").stdout.splitlines() if "eps-8   itself" in line)
    assert line.endswith(f"{subset['fooled']} of {subset['fooled']} (100.0%)")


@pytest.mark.parametrize("levels", [["0", "2/255", "8/255"], ["8/255", "5/255"]])
def test_all_layouts_hold_and_load_the_same(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path, levels: list[str]
) -> None:
    source = {
        "path": str(kept_parquet(tmp_path / "kept", [None, *LABELS[1:]])),
        "keep_columns": ["caption"],
    }
    sections = {"source": source, "attack": {"label": "prediction"}}
    for layout in LAYOUTS:
        config = with_evaluators(write_config(**sections, output={"layout": layout}), other)
        generate(config, "--output", str(tmp_path / layout))
    loaded = [pipeline.load(tmp_path / layout, levels, split="test") for layout in LAYOUTS]
    assert loaded[0].column_names[-3:] == ["prediction_sums", "correct_sums", "caption"]
    plain = [rows.remove_columns("image").to_list() for rows in loaded]
    for there, found in zip(loaded, plain, strict=True):
        assert there.column_names == loaded[0].column_names
        assert found == plain[0]
    null = [row["correct_sums"] is None for row in plain[0]]
    assert any(null)
    recorded = [row["epsilon"] in [level / 255 for level in LEVELS] for row in plain[0]]
    for row, unknown, was_recorded in zip(plain[0], null, recorded, strict=True):
        assert unknown == (row["label"] is None or not was_recorded)
        assert (row["prediction_sums"] is None) == (not was_recorded)
    for name in LAYOUTS:
        result = fgsm("verify", tmp_path / name, "--recompute")
        assert result.exit_code == 0, result.output
        assert "120 predictions re-derived" in result.stdout


def test_a_kept_column_cannot_be_taken_for_an_evaluator_s(write_config: WriteConfig, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    kept_parquet(folder, LABELS)
    table = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train")
    table.rename_column("caption", "prediction_of_age").to_parquet(str(folder / "test-00000-of-00001.parquet"))
    config = write_config(source={"path": str(folder), "keep_columns": ["prediction_of_age"]})
    result = fgsm("generate", config)
    assert result.exit_code == 2
    assert "prediction_of_age could be taken for an evaluator's column" in result.stderr


# ------------------------------------------------------------------------------------------------- identity


def test_another_evaluator_is_another_run(write_config: WriteConfig, other: dict[str, Any], tmp_path: Path) -> None:
    generate(with_evaluators(write_config(), other))
    first = digests(tmp_path / "out")
    generate(with_evaluators(write_config(), other))
    assert digests(tmp_path / "out") == first
    result = fgsm("generate", with_evaluators(write_config(), {**other, "kwargs": {"scale": 2.0}}))
    assert result.exit_code == 2
    assert "differs in evaluators.sums.kwargs" in result.stderr
    result = fgsm("generate", write_config())
    assert result.exit_code == 2
    assert "evaluators.sums.content" in result.stderr


def test_a_missing_evaluator_is_named(write_config: WriteConfig, other: dict[str, Any]) -> None:
    result = fgsm("generate", with_evaluators(write_config(), {**other, "weights": "nowhere.safetensors"}))
    assert result.exit_code == 2
    assert "Error: evaluators, sums: model.weights: " in result.stderr
    assert "nowhere.safetensors" in result.stderr
    other["name"] = other["name"].replace(":make", ":mkae")
    result = fgsm("generate", with_evaluators(write_config(), other))
    assert result.exit_code == 2
    assert "Error: evaluators, sums: model.name: " in result.stderr


def test_an_evaluator_of_other_classes_needs_a_label_map(write_config: WriteConfig, other: dict[str, Any]) -> None:
    result = fgsm("generate", with_evaluators(write_config(), {**other, "kwargs": {"order": [0, 1]}}))
    assert result.exit_code == 2
    assert "evaluators, sums: The dataset has 3 classes and the model 2" in result.stderr


def test_an_evaluator_need_not_let_a_gradient_through(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path
) -> None:
    other["name"] = other["name"].replace(":make", ":detached")
    generate(with_evaluators(write_config(), other))
    assert manifest(tmp_path / "out")["complete"]


def test_an_evaluator_that_produces_no_numbers_stops_the_run(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path
) -> None:
    result = fgsm("generate", with_evaluators(write_config(), {**other, "kwargs": {"scale": 1.5e39}}))
    assert result.exit_code == NonFiniteError.exit_code
    assert "The logits of the evaluator sums hold NaN or infinity in shard test-00000-of-00003" in result.stderr
    assert not list((tmp_path / "out/.run/receipts").iterdir())


# --------------------------------------------------------------------------------------------------- verify


def another_prediction(columns: dict[str, list[Any]]) -> None:
    another_mistake(columns["prediction_sums"], columns["label"])


def another_flag(columns: dict[str, list[Any]]) -> None:
    columns["correct_sums"][3] = not columns["correct_sums"][3]


def lose_a_prediction(columns: dict[str, list[Any]]) -> None:
    columns["prediction_sums"][3] = None


def exchange_two_flags(columns: dict[str, list[Any]]) -> None:
    """Counts stay as they are."""
    flags, fooled = columns["correct_sums"], columns["fooled"]
    right = next(i for i, flag in enumerate(flags) if flag and not fooled[i])
    wrong = next(i for i, flag in enumerate(flags) if not flag and not fooled[i])
    flags[right], flags[wrong] = flags[wrong], flags[right]


@pytest.mark.parametrize(
    ("edit", "options", "named"),
    [
        (another_flag, [], f"{FILE} has other values in correct_sums"),
        (lose_a_prediction, [], f"{FILE} has other values in prediction_sums"),
        (
            another_prediction,
            ["--recompute"],
            f"{FILE} has 1 predictions in prediction_sums that its pixels do not give",
        ),
    ],
)
def test_forged_opinions_are_found(
    write_config: WriteConfig,
    other: dict[str, Any],
    tmp_path: Path,
    edit: Callable[[dict[str, list[Any]]], None],
    options: list[str],
    named: str,
) -> None:
    generate(with_evaluators(write_config(), other))
    forge(tmp_path / "out", edit)
    if options:
        assert fgsm("verify", tmp_path / "out").exit_code == 0
    assert_found(named, tmp_path / "out", *options)


def test_flags_that_add_up_are_found_by_asking_again(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path
) -> None:
    generate(with_evaluators(write_config(), other))
    forge(tmp_path / "out", exchange_two_flags, f"clean/{SHARD}.parquet")
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 1
    # The counts of larger epsilons compare with the clean flags, and may notice first.
    assert "correct_sums" in result.stderr or "other counts" in result.stderr


def test_an_evaluator_that_has_changed_is_not_asked_again(
    write_config: WriteConfig, other: dict[str, Any], tmp_path: Path
) -> None:
    generate(with_evaluators(write_config(), other))
    path = tmp_path / "other.py"
    path.write_text(path.read_text().replace("mean((2, 3))", "amax((2, 3))"))
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 2
    assert "evaluators, sums: the model that the config names has changed since the run" in result.stderr


# ------------------------------------------------------------------------------------------------- transfer


class Wide(nn.Sequential):
    """Another architecture than the digits victim's: no convolution at all."""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = Wide()
    pool, flatten, *layers = model
    pooled, learning = flatten(pool(images / 255)), nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for some in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(learning(pooled[some]), labels[some]).backward()
            optimizer.step()
    return model


def test_the_same_images_fool_another_architecture(tmp_path: Path) -> None:
    """Made on the digits CNN, measured on a perceptron that was trained here: not made for it, and it falls."""
    pixels, labels = digits_split("train")
    model = trained(torch.from_numpy(pixels)[:, None].float(), torch.from_numpy(labels))
    torch.save(model.state_dict(), tmp_path / "wide.pt")
    config = {
        "source": {"kind": "digits", "split": "test"},
        "preprocess": {"mode": "L"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": ["64/255"]},
        "evaluators": [
            {"id": "wide", "kind": "factory", "name": f"{__name__}:Wide", "weights": str(tmp_path / "wide.pt")}
        ],
        "output": {"path": str(tmp_path / "out")},
        "runtime": {"workers": 0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    generate(tmp_path / "config.yaml")
    clean, attacked = manifest(tmp_path / "out")["subsets"]
    right, fell = clean["evaluators"]["wide"], attacked["evaluators"]["wide"]
    assert right["correct"] > 0.9 * clean["labelled"]
    assert fell["exposed"] > 300
    # By chance: as many steps of the same size in random directions.
    generator = torch.Generator().manual_seed(0)
    table = rows(tmp_path / "out", "clean")
    stored = torch.stack([decode_image(image["bytes"]) for image in table["image"]]).float()
    noise = torch.randint(0, 2, stored.shape, generator=generator) * 2 - 1
    with torch.no_grad():
        noisy = model((stored + 64 * noise).clamp(0, 255) / 255).argmax(1).numpy()
    lost = (noisy != table["label"]) & table["correct_wide"]
    assert fell["transferred"] / fell["exposed"] > 0.1 + 2 * lost.sum() / right["correct"]
