"""The defence: what the report says of it, and what becomes of its file."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from scipy.stats import ttest_1samp

from pipeline.core.errors import PipelineError
from pipeline.output.folder import OutputFolder, report_files
from pipeline.output.manifest import require_manifest
from pipeline.reporting.defence import (
    DEFENCE,
    ITSELF,
    RULE,
    Arm,
    Defence,
    Outcome,
    Spread,
    Training,
    columns,
    compare,
    exposes,
    protects,
    read_defence,
    statements,
    tabulate,
)
from tests.conftest import WriteConfig, fgsm, generate, generate_once
from tests.support.page import NASTY, make, opened, opened_png
from tests.support.several import write_several

TITLES = {
    "clean": "clean only",
    "noise": "random signs (control)",
    "one": "one source",
    "all": "all sources",
    "fly": "own FGSM",
    "both": "all sources and own FGSM",
}
# The wrong of 1000 images at the middle epsilon, by arm and seed.
Wrong = Mapping[str, Sequence[int]]
CLEAN, NOISE, ALL, FLY = [600, 620], [500, 520], [100, 120], [190, 210]
EVERY: Wrong = {"clean": CLEAN, "noise": NOISE, "one": [300, 320], "all": ALL, "fly": FLY}


def outcome(images: Any, against: str | None, level: int, wrong: int) -> Outcome:
    return Outcome(images=images, against=against, level=level, rows=1000, wrong=wrong, wrong_confidence=0.9)


def measured(black: Wrong = EVERY, white: Wrong | None = None, run_id: str = "0" * 16, **fields: Any) -> Defence:
    """Trainings that leave so many wrong under FGSM of two held-out models: 10 more under one, 10 less under the other.

    At the smaller epsilon these are half as many. `white` is FGSM on the trained model, as many as `black` by default.
    """
    trainings = []
    for arm, each in black.items():
        for seed, wrong in enumerate(each):
            held_out = {"b": wrong + 10, "e": wrong - 10}
            tests = [outcome("clean", None, 0, 10), outcome("fgsm", ITSELF, 8, (white or black)[arm][seed])]
            for name, count in held_out.items():
                tests += [outcome("fgsm", name, 8, count), outcome("fgsm", name, 7, count // 2)]
                tests.append(outcome("pgd", name, 8, 999))
            several = {"images": 1000, "seconds": 1.0, "history": ()}
            trainings.append(Training(**several, arm=arm, seed=seed, tests=tuple(tests)))
    arms = tuple(Arm(id=kind, title=TITLES[kind], kind=kind) for kind in black)
    known = {"command": "", "machine": "2 cores of a test", "versions": {}, "seconds": 60.0, "recipe": {"epochs": 6}}
    told = {"target": "net", "sources": ("a",), "held_out": ("b", "e"), "levels": (7, 8)}
    return Defence(**{**known, **told, "run_id": run_id, "arms": arms, "trainings": tuple(trainings), **fields})


# ------------------------------------------------------------------------------------------------------------ sentences


def test_a_spread_is_a_mean_with_the_standard_deviation_over_seeds() -> None:
    assert str(Spread.of([0.1, 0.2, 0.3])) == "20.0 ± 10.0%"
    assert str(Spread.of([0.25])) == "25.0%"
    assert Spread.of([]) is None


def test_what_protects_leaves_less_than_clean_images_and_than_the_control() -> None:
    assert protects(measured()) == (
        "Stored images protect against attacks from unseen models: FGSM on b, e at 8/255 leaves 11.0 ± 1.4% wrong "
        "after “all sources”; “clean only” leaves 61.0 ± 1.4%, which is more, and “random signs (control)” leaves "
        "51.0 ± 1.4%, which is more."
    )


@pytest.mark.parametrize(
    ("clean", "noise", "verdicts"),
    [
        ([600, 620], [110, 150], ["which is more", "a difference that does not count"]),
        ([110, 150], [500, 520], ["a difference that does not count", "which is more"]),
        ([600, 620], [40, 60], ["which is more", "which is less"]),
        ([40, 60], [40, 60], ["which is less", "which is less"]),
    ],
)
def test_what_is_not_clearly_less_than_both_shows_no_protection(
    clean: list[int], noise: list[int], verdicts: list[str]
) -> None:
    said = protects(measured({"clean": clean, "noise": noise, "all": ALL}))
    assert said.startswith("Here, stored images show no protection against attacks from unseen models: ")
    assert re.findall(r"%, (.*?)(?:, and|\.$)", said) == verdicts


@pytest.mark.parametrize(
    ("ours", "others", "sign"),
    [
        # Within each seed the difference is the same; over the seeds the errors vary by ten times as much.
        ([0.1, 0.2, 0.3], [0.12, 0.21, 0.32], -1),
        ([0.12, 0.21, 0.32], [0.1, 0.2, 0.3], 1),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], 0),
        # The mean is twice the standard deviation: 2.8 standard errors of two seeds, which are no proof of anything.
        ([0.2, 0.2], [0.3, 0.5], 0),
        # 6.3 of ten.
        ([0.2] * 10, [0.3, 0.5] * 5, -1),
        ([0.2] * 20, [0.3, 0.5] * 10, -1),
        ([0.2], [0.9], None),
        ([], [], None),
        ([0.2, 0.2], [0.9, 0.9, 0.9], None),
    ],
)
def test_a_difference_counts_where_its_interval_leaves_out_0(
    ours: list[float], others: list[float], sign: int | None
) -> None:
    assert compare(ours, others) == sign


@pytest.mark.parametrize("seeds", [*range(2, 11), 30])
def test_the_interval_is_that_of_a_t_test(seeds: int) -> None:
    differences = [0.0, 1.0] * (seeds // 2) + [0.5] * (seeds % 2)
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    half = (high - low) / 2
    # More seeds than 10 are taken for 10: the interval is wider than it need be, by a tenth at most.
    for factor, sign in ((0.99, 0), (1.01 if seeds <= 10 else 1.11, 1)):
        assert compare([one - 0.5 + factor * half for one in differences], [0.0] * seeds) == sign


def test_of_one_seed_nothing_is_claimed() -> None:
    alone = measured({arm: each[:1] for arm, each in EVERY.items()})
    for said in (protects(alone), exposes(alone)):
        assert "one seed allows no verdict" in said
        assert not re.search("±|which is|does not count|protect", said)
        assert "10.0% wrong" in said


def test_of_several_arms_on_all_sources_the_first_is_spoken_of_and_else_the_first_on_one() -> None:
    assert "after “one source”" in protects(measured({"clean": CLEAN, "noise": NOISE, "one": ALL}))
    arms: list[Any] = [{"id": kind, "title": kind, "kind": {"fly": "all"}.get(kind, kind)} for kind in EVERY]
    assert "after “all”" in protects(measured(arms=arms))
    assert "after “fly”" in protects(measured(arms=arms[::-1]))


def test_without_what_to_compare_with_nothing_is_said() -> None:
    assert protects(measured({"clean": CLEAN, "all": ALL})) == ""
    assert protects(measured({"clean": CLEAN, "noise": NOISE})) == ""
    assert exposes(measured({"noise": NOISE, "all": ALL, "fly": FLY})) == ""
    assert protects(measured(held_out=())) == ""
    assert statements(measured({"noise": NOISE})) == []


def test_under_an_attack_on_itself_it_is_compared_with_clean_images_and_its_own_attack() -> None:
    white = {**EVERY, "clean": [970, 990], "all": [990, 970]}
    assert exposes(measured(white=white)) == (
        "Stored images do not protect against an attack on the trained model itself: FGSM on it at 8/255 leaves "
        "98.0 ± 1.4% wrong after “all sources”; “clean only” leaves 98.0 ± 1.4%, a difference that does not count, and "
        "“own FGSM” leaves 20.0 ± 1.4%, which is less."
    )
    assert exposes(measured()).startswith("Under an attack on the trained model itself the error is lower, too: ")
    without = exposes(measured({arm: EVERY[arm] for arm in ("clean", "noise", "all")}, white))
    assert without.endswith("“clean only” leaves 98.0 ± 1.4%, a difference that does not count.")


def test_what_is_less_but_more_than_half_is_lowered_and_not_removed() -> None:
    for errors, words in (([310, 330], "lowered, not removed"), ([300, 310], "lower, too")):
        said = exposes(measured(white={**EVERY, "all": errors}))
        assert said.startswith(f"Under an attack on the trained model itself the error is {words}: ")


def test_an_attack_on_itself_is_pgd_at_the_largest_epsilon_that_was_measured() -> None:
    made = measured()
    for level, wrong in ((7, 710), (8, 820)):
        own = outcome("pgd", ITSELF, level, wrong)
        trainings = [one.model_copy(update={"tests": (*one.tests, own)}) for one in made.trainings]
        made = made.model_copy(update={"trainings": tuple(trainings)})
        assert f"PGD on it at {level}/255 leaves {wrong / 10} ± 0.0% wrong" in exposes(made)


def test_of_models_that_have_learnt_little_one_sentence_is_said() -> None:
    assert len(statements(measured())) == 2
    trainings = [
        one.model_copy(update={"tests": (outcome("clean", None, 0, 460), *one.tests[1:])})
        for one in measured().trainings
    ]
    assert statements(measured(trainings=tuple(trainings))) == ["Too few steps to compare; raise --epochs."]


@pytest.mark.parametrize("faults", [{"arms": ()}, {"trainings": measured().trainings[:1] * 2}, {"levels": ()}])
def test_results_that_cannot_be_are_none(faults: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        measured(**faults)


def test_the_table_is_of_seeds_that_have_every_arm() -> None:
    made = measured({"clean": [600, 620, 50], "noise": NOISE, "all": [100, 120, 990]})
    tested = columns(made)
    assert [*tested] == ["clean", "FGSM 7", "FGSM 8", "PGD 8", "own FGSM 8"]
    assert [(arm.id, *map(str, shares)) for arm, shares in tabulate(made, tested)] == [
        ("clean", "1.0 ± 0.0%", "30.5 ± 0.7%", "61.0 ± 1.4%", "99.9 ± 0.0%", "61.0 ± 1.4%"),
        ("noise", "1.0 ± 0.0%", "25.5 ± 0.7%", "51.0 ± 1.4%", "99.9 ± 0.0%", "51.0 ± 1.4%"),
        ("all", "1.0 ± 0.0%", "5.5 ± 0.7%", "11.0 ± 1.4%", "99.9 ± 0.0%", "11.0 ± 1.4%"),
    ]


# ------------------------------------------------------------------------------------------------------------- the page


@pytest.fixture
def out(write_config: WriteConfig, tmp_path: Path) -> Path:
    """A run of three models."""
    generate_once(write_several(write_config, tmp_path))
    return tmp_path / "out"


def keep(out: Path, **fields: Any) -> Defence:
    """Let a dataset have a file of the defence."""
    defence = measured(**{"run_id": opened(out)[1].run_id, **fields})
    (out / DEFENCE).write_text(defence.model_dump_json())
    return defence


def headings(text: str) -> list[str]:
    return re.findall(r"<h2 id=.*?>(.*?)</h2>", text)


LOOK_UP = ["Accuracy", "Examples", "Skipped rows", "The run"]


def test_a_run_of_several_models_tells_the_four_claims_in_order(out: Path) -> None:
    defence = keep(out)
    page = make(out)
    claims = ["The picture", "The confidence of mistakes", "The transfer, against noise", "The defence"]
    assert headings(page.text) == [*claims, *LOOK_UP]
    for said in (protects(defence), exposes(defence)):
        assert said in page.words
    assert "FGSM made against held-out models (b, e)" in page.words
    assert "over 2 seeds, 6 epochs, on 2 cores of a test. This is a small experiment." in page.words
    head, *rows = page.tables["Errors after each training"]
    tested = columns(defence)
    assert head == ["trained on", *tested]
    assert [row[1:] for row in rows] == [list(map(str, shares)) for _, shares in tabulate(defence, tested)]
    assert RULE in page.words
    (alt,) = (image["alt"] or "" for image in page.all("img") if "after each training" in (image["alt"] or ""))
    assert "all sources, 11.0 ± 1.4%" in alt


@pytest.mark.slow
def test_its_picture_is_one_of_the_report_and_the_same_each_time(out: Path) -> None:
    keep(out)
    make(out)
    picture = (out / "assets/defence.png").read_bytes()
    assert opened_png(picture).width > 800
    assert "assets/defence.png" in report_files(OutputFolder(out))
    make(out)
    assert (out / "assets/defence.png").read_bytes() == picture
    (out / DEFENCE).unlink()
    make(out)
    assert not (out / "assets/defence.png").exists()


def test_what_was_not_measured_says_how_to(out: Path) -> None:
    page = make(out)
    assert "The defence" in headings(page.text)
    assert "python scripts/train_robust.py OUTPUT" in page.words
    assert "Errors after each training" not in page.tables


def test_what_is_not_finished_says_so(out: Path) -> None:
    keep(out, black={**EVERY, "fly": []})
    page = make(out)
    assert "Not finished: 8 trainings are done, but no seed has been trained in all 5 ways yet." in page.words
    assert "Errors after each training" not in page.tables
    assert not (out / "assets/defence.png").exists()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "pipeline.reporting"):
        yield caplog


def test_that_of_another_run_is_not_shown(out: Path, log: pytest.LogCaptureFixture) -> None:
    keep(out, run_id="f" * 16)
    page = make(out)
    (line,) = log.messages
    assert str(out / DEFENCE) in line
    assert "has not been measured" in page.words
    assert "2 cores of a test" not in page.words


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"{}", b'{"rows":1000,"wrong":1001', b'"rows":0,"wrong":0'], ids=range(5)
)
def test_what_is_no_defence_is_one_sentence(out: Path, content: bytes) -> None:
    keep(out)
    folder = OutputFolder(out)
    run_id = require_manifest(folder).run_id
    assert read_defence(folder, run_id) is not None
    if b"rows" in content:
        whole = (out / DEFENCE).read_bytes()
        content = re.sub(rb'"rows":1000,"wrong":10\b', content.lstrip(b"{"), whole, count=1)
        assert content != whole
    (out / DEFENCE).write_bytes(content)
    with pytest.raises(PipelineError, match=re.escape(str(out / DEFENCE))):
        read_defence(folder, run_id)


def test_what_is_no_defence_is_no_failure(out: Path, log: pytest.LogCaptureFixture) -> None:
    (out / DEFENCE).write_bytes(b"{}")
    page = make(out)
    (line,) = log.messages
    assert str(out / DEFENCE) in line
    assert "has not been measured" in page.words
    assert (out / DEFENCE).read_bytes() == b"{}"


def test_names_in_it_stay_text(out: Path) -> None:
    arms = tuple(Arm(id=kind, title=name, kind="clean") for kind, name in zip(EVERY, NASTY[:5], strict=True))
    keep(out, arms=arms, held_out=NASTY[:2], machine=NASTY[0])
    page = make(out)
    assert "<p></p>" not in page.text, "there is nothing to compare, and nothing is said"
    assert "<script" not in page.text
    assert "onerror=" not in page.text.replace("onerror=&#34;", "")


def test_a_run_of_one_model_shows_it_where_there_is_one(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    picture = ["The picture", "The confidence of mistakes"]
    assert headings(make(out).text) == [*picture, *LOOK_UP]
    keep(out)
    assert headings(make(out).text) == [*picture, "The defence", *LOOK_UP]


# ------------------------------------------------------------------------------------------------------------- the file


def test_it_is_the_user_s_and_stays(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    keep(out)
    whole = (out / DEFENCE).read_bytes()
    assert fgsm("verify", out).exit_code == 0
    next(out.glob("eps-8/*.parquet")).write_bytes(b"damaged")
    assert fgsm("verify", out, "--repair").exit_code == 1
    for arguments in ([], ["--overwrite"]):
        generate(finished.parent / "config.yaml", "--output", str(out), *arguments)
        assert fgsm("verify", out).exit_code == 0
    assert (out / DEFENCE).read_bytes() == whole
    assert "11.0 ± 1.4%" in make(out).words, "the same run again"
