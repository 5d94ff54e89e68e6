"""Verify a run of several models and attacks: what was exchanged between these is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.attacks.base import Perturbed
from pipeline.attacks.fgsm import FGSM
from pipeline.attacks.iterative import PGD
from pipeline.attacks.noise import Noise
from pipeline.check.verify import verify
from pipeline.core.images import decode_image
from tests.conftest import WriteConfig, generate, generate_once, shard_path, without_run, write_sealed
from tests.conftest import fgsm_without_run as fgsm
from tests.support.forgery import SHARD, agree, assert_found, forge, forge_run, make_consistent
from tests.support.several import write_several

Columns = dict[str, list[Any]]

ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {"epsilons": ["2/255", "8/255"], "models": ["net", "sums"]},
    "noise": {"kind": "noise", "epsilons": ["2/255", "8/255"]},
    "pgd": {"kind": "pgd", "epsilons": ["2/255", "8/255"], "models": ["net"], "steps": 3, "target": "random"},
}


@pytest.fixture
def out(write_config: WriteConfig, tmp_path: Path, made: Any) -> Path:
    """A copy of the run, which a test may forge."""
    if not made:
        generate(write_several(write_config, tmp_path, ATTACKS))
        made["out"] = tmp_path / "out"
    return Path(shutil.copytree(made["out"], tmp_path / "copy"))


def found(out: Path, **options: bool) -> str:
    """The one problem of the forged shard."""
    findings = verify(out, **options)
    assert (len(findings.problems), findings.damaged) == (1, {SHARD}), findings.problems
    return without_run(findings.problems[0])


def rows(out: Path, subset: str) -> Columns:
    columns: Columns = pq.read_table(shard_path(out, f"{subset}/{SHARD}.parquet")).to_pydict()
    return columns


def test_it_is_sound(out: Path) -> None:
    findings = verify(out, recompute=True, source=True)
    assert (findings.problems, findings.changes) == ([], set())
    assert (findings.near_ties, findings.near_tie_signs, findings.last_digits) == (0, 0, 0)


# ------------------------------------------------------------------------------------------- without the models


def other_value(column: str) -> Callable[[Columns], None]:
    def edit(columns: Columns) -> None:
        value = columns[column][2]
        columns[column][2] = not value if isinstance(value, bool) else (value + 1) % 3

    return edit


def said(column: str, value: Any) -> Callable[[Columns], None]:
    def edit(columns: Columns) -> None:
        columns[column][2] = value

    return edit


@pytest.mark.parametrize(
    ("subset", "column", "edit"),
    [
        ("fgsm-sums-eps-8", "model", said("model", "net")),
        ("fgsm-sums-eps-8", "model", said("model", "turned")),
        ("fgsm-net-eps-2", "attack", said("attack", "pgd")),
        ("noise-eps-2", "model", said("model", "net")),
        ("clean", "attack", said("attack", "noise")),
        ("pgd-net-eps-8", "target", other_value("target")),
        ("pgd-net-eps-2", "target", other_value("target")),
        ("fgsm-net-eps-8", "target", said("target", 1)),
        ("noise-eps-8", "correct_turned", other_value("correct_turned")),
        ("fgsm-sums-eps-2", "correct_net", other_value("correct_net")),
        ("fgsm-sums-eps-2", "clean_prediction", other_value("clean_prediction")),
        ("noise-eps-8", "fooled", other_value("fooled")),
        ("pgd-net-eps-8", "fooled", other_value("fooled")),
        ("pgd-net-eps-8", "prediction_turned", said("prediction_turned", 3)),
        ("fgsm-net-eps-8", "prediction_sums", said("prediction_sums", None)),
    ],
)
def test_rows_that_contradict_the_run_or_each_other(
    out: Path, subset: str, column: str, edit: Callable[[Columns], None]
) -> None:
    forge_run(out, {subset: edit})
    assert column in found(out)


def test_files_of_two_models_that_were_exchanged(out: Path) -> None:
    """With receipts that agree: a file says of which subset it is."""
    files = [shard_path(out, f"fgsm-{model}-eps-8/{SHARD}.parquet") for model in ("net", "sums")]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    path = shard_path(out, f".run/receipts/{SHARD}.json")
    receipt = json.loads(path.read_text())
    entries = {without_run(entry["path"]): entry for entry in receipt["files"]}
    one, other = (entries[f"fgsm-{model}-eps-8/{SHARD}.parquet"] for model in ("net", "sums"))
    for key in ("bytes", "sha256"):
        one[key], other[key] = other[key], one[key]
    write_sealed(path, receipt)
    agree(out)
    assert f"fgsm-net-eps-8/{SHARD}.parquet is marked as a file of another run" in found(out)


def test_images_of_two_attacks_at_another_epsilon(out: Path) -> None:
    """An image that lies on no ray is still in its ball."""
    large = rows(out, "pgd-net-eps-8")["image"]
    forge_run(out, {"pgd-net-eps-2": lambda columns: columns.update(image=large)})
    assert "images outside the epsilon ball of 2/255" in found(out)


@pytest.mark.parametrize(("of", "as_if"), [("noise-eps-8", "fgsm-net-eps-8"), ("fgsm-sums-eps-8", "noise-eps-8")])
def test_images_along_another_direction_than_at_the_other_epsilon(out: Path, of: str, as_if: str) -> None:
    images = rows(out, of)["image"]
    forge_run(out, {as_if: lambda columns: columns.update(image=images)})
    assert "along one sign for all epsilons" in found(out)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_a_manifest_that_says_of_an_attack_that_it_leaves_its_ray(out: Path, attack: str) -> None:
    """Then no image would be held to one sign, or those of other epsilons made along one."""
    content = json.loads((out / "manifest.json").read_text())
    key = f"attacks.{attack}.on_ray"
    if attack == "fgsm":
        content["identity"][key] = False
    else:
        del content["identity"][key]
    make_consistent(out, content)
    assert_found(key, out)


# ---------------------------------------------------------------------------------- what only the models can tell


def everything_of(source: Columns) -> Callable[[Columns], None]:
    """Images of another subset, with all that the models say of them."""
    own = ("label", "epsilon", "attack", "model", "clean_prediction", "target", "source_index")

    def edit(columns: Columns) -> None:
        columns.update({name: values for name, values in source.items() if name not in own})
        right = [before == label for before, label in zip(columns["clean_prediction"], columns["label"], strict=True)]
        columns["fooled"] = [
            (now == goal) if goal is not None else (was and now != label)
            for now, goal, was, label in zip(
                columns["prediction"], columns["target"], right, columns["label"], strict=True
            )
        ]

    return edit


@pytest.mark.parametrize(
    ("of", "as_if"),
    [
        # Of one model both, so that all that is said of the images is true.
        ("fgsm-net-eps-8", "pgd-net-eps-8"),
        ("pgd-net-eps-2", "pgd-net-eps-8"),
        ("noise-eps-8", "pgd-net-eps-8"),
        ("clean", "pgd-net-eps-2"),
    ],
)
def test_images_of_another_attack(out: Path, of: str, as_if: str) -> None:
    forge_run(out, {as_if: everything_of(rows(out, of))})
    path = shard_path(out, f".run/receipts/{SHARD}.json")
    receipt = json.loads(path.read_text())
    counts = {count["subset"]: count for count in receipt["counts"]}
    stored = [pq.read_table(shard_path(out, f"{name}/{SHARD}.parquet")).column("image") for name in ("clean", as_if)]
    counts[as_if]["zero_signs"] = unmoved(*stored)
    write_sealed(path, receipt)
    agree(out)
    assert verify(out).problems == []
    assert f"{as_if}/{SHARD}.parquet" in found(out, recompute=True)


def unmoved(clean: Any, moved: Any) -> int:
    """How many values of images are the same."""
    pairs = zip(clean.to_pylist(), moved.to_pylist(), strict=True)
    return sum(int((decode_image(a["bytes"]) == decode_image(b["bytes"])).sum()) for a, b in pairs)


@pytest.mark.parametrize("subset", ["clean", "noise-eps-2", "fgsm-sums-eps-8", "pgd-net-eps-8"])
def test_what_a_model_says_that_only_looks(out: Path, subset: str) -> None:
    def other_mistake(columns: Columns) -> None:
        wrong = next(row for row, right in enumerate(columns["correct_turned"]) if not right)
        columns["prediction_turned"][wrong] = 3 - columns["label"][wrong] - columns["prediction_turned"][wrong]

    forge_run(out, {subset: other_mistake})
    assert verify(out).problems == []
    assert f"{subset}/{SHARD}.parquet has 1 predictions in prediction_turned" in found(out, recompute=True)


def test_targets_that_were_not_drawn(out: Path) -> None:
    def other_target(columns: Columns) -> None:
        columns["target"][2] = (columns["target"][2] + 1) % 3
        columns["fooled"][2] = columns["prediction"][2] == columns["target"][2]

    forge_run(out, dict.fromkeys(("pgd-net-eps-2", "pgd-net-eps-8"), other_target))
    assert verify(out).problems == []
    assert "targets that are not the attack's" in found(out, recompute=True)


def run_with(
    write_config: WriteConfig,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    attack: type,
    perturb: Any,
    elsewhere: bool,
) -> Path:
    """A run with another attack in the place of one: all that is recorded is of the images that it makes."""
    with monkeypatch.context() as patch:
        patch.setattr(attack, "perturb", perturb)
        generate(write_several(write_config, folder, ATTACKS))
    out = folder / "out"
    if elsewhere:
        for path in (out / ".run/receipts").iterdir():
            receipt = json.loads(path.read_text())
            receipt["versions"]["torch"] = "1.0"
            write_sealed(path, receipt)
        agree(out)
    assert verify(out).problems == []
    return out


@pytest.mark.parametrize("elsewhere", [False, True])
def test_noise_of_other_draws(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """One value of one image, wherever it is verified: noise asks nobody."""

    perturb = Noise.perturb

    def turned(*arguments: Any) -> Perturbed:
        _, _, images, _, levels, _ = arguments
        signs = perturb(*arguments).direction
        assert signs is not None
        signs[0, 1, 5, 6] *= -1
        return Perturbed.along(images, signs, levels)

    out = run_with(write_config, tmp_path, monkeypatch, Noise, turned, elsewhere)
    findings = verify(out, recompute=True)
    assert len(findings.damaged) == 3
    assert all(problem.startswith("noise-eps-2/") for problem in findings.problems)


def test_pgd_that_is_noise(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def random(_: PGD, model: Any, images: Any, classes: Any, levels: Any, draws: Any) -> Perturbed:
        noise = Noise().perturb(model, images, classes, levels, draws)
        model.gradient(images, classes)
        return Perturbed(noise.images)

    out = run_with(write_config, tmp_path, monkeypatch, PGD, random, elsewhere=False)
    findings = verify(out, recompute=True)
    assert len(findings.damaged) == 3
    assert all("the attack does not reproduce" in problem for problem in findings.problems)


def test_fgsm_along_a_gradient_that_is_turned(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturb = FGSM.perturb

    def turned(self: FGSM, model: Any, images: Any, classes: Any, levels: Any, draws: Any) -> Perturbed:
        direction = perturb(self, model, images, classes, levels, draws).direction
        assert direction is not None
        return Perturbed.along(images, torch.flip(direction, [3]), levels)

    out = run_with(write_config, tmp_path, monkeypatch, FGSM, turned, elsewhere=True)
    findings = verify(out, recompute=True)
    assert len(findings.damaged) == 3
    assert all("do not lie along the sign" in problem for problem in findings.problems)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["wide", "signs"])
def test_lists_of_attacks_that_were_reordered(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    """One row's entries of two models, or of two attacks, are exchanged."""
    attacks = {name: attack for name, attack in ATTACKS.items() if name != "pgd"}
    generate_once(write_several(write_config, tmp_path, attacks, output={"layout": layout}))
    out = tmp_path / "out"
    assert fgsm("verify", out, "--recompute").exit_code == 0

    def exchange(columns: Columns) -> None:
        entries = columns["attacks"][2]
        entries[0], entries[2] = entries[2], entries[0]

    forge(out, exchange, f"{layout}/{SHARD}.parquet")
    assert "has other values in model" in found(out)
