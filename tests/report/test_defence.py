"""The defence: what the report says of it, and what becomes of its file."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.output.folder import OutputFolder, report_files
from pipeline.report.defence import (
    DEFENCE,
    ITSELF,
    Arm,
    Defence,
    Outcome,
    Spread,
    Training,
    exposes,
    protects,
    tabulate,
)
from tests.conftest import WriteConfig, fgsm, generate
from tests.support.page import NASTY, make, opened, opened_png
from tests.support.several import write_several

TITLES = {
    "clean": "clean only",
    "noise": "random signs",
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
        "Stored images protect against attacks from models never seen: FGSM on b, e at 8/255 leaves 11.0 ± 1.4% wrong "
        "after “all sources”; “clean only” leaves 61.0 ± 1.4%, which is more, and “random signs (the control)” leaves "
        "51.0 ± 1.4%, which is more."
    )


@pytest.mark.parametrize(
    ("clean", "noise", "verdicts"),
    [
        ([600, 620], [110, 150], ["which is more", "a difference within the spread"]),
        ([110, 150], [500, 520], ["a difference within the spread", "which is more"]),
        ([600, 620], [40, 50], ["which is more", "which is less"]),
        ([40, 50], [40, 50], ["which is less", "which is less"]),
    ],
)
def test_what_is_not_less_than_both_beyond_the_spread_shows_no_protection(
    clean: list[int], noise: list[int], verdicts: list[str]
) -> None:
    said = protects(measured({"clean": clean, "noise": noise, "all": ALL}))
    assert "does not show here" in said
    assert re.findall(r"%, (.*?)(?:, and|\.$)", said) == verdicts


def test_the_control_is_called_so_once() -> None:
    assert Arm(id="noise", title="random signs (control)", kind="noise").name == "random signs (control)"


def test_of_one_seed_nothing_is_claimed() -> None:
    alone = measured({arm: each[:1] for arm, each in EVERY.items()})
    for said in (protects(alone), exposes(alone)):
        assert "no spread is known" in said
        assert "±" not in said
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


def test_under_an_attack_on_itself_it_is_compared_with_clean_images_and_its_own_attack() -> None:
    white = {**EVERY, "clean": [970, 990], "all": [980, 1000]}
    assert exposes(measured(white=white)) == (
        "They do not protect against an attack on the trained model itself: FGSM on it leaves 99.0 ± 1.4% wrong after "
        "“all sources”; “clean only” leaves 98.0 ± 1.4%, a difference within the spread, and “own FGSM” leaves "
        "20.0 ± 1.4%, which is less."
    )
    assert exposes(measured()).startswith("Under an attack on the trained model itself the error is lower, too: ")
    without = exposes(measured({arm: EVERY[arm] for arm in ("clean", "noise", "all")}, white))
    assert without.endswith("“clean only” leaves 98.0 ± 1.4%, a difference within the spread.")


def test_the_table_is_of_seeds_that_have_every_arm() -> None:
    head, rows = tabulate(measured({"clean": [600, 620, 50], "noise": NOISE, "all": [100, 120, 990]}))
    assert head == ["clean", "black-box, 7/255", "black-box, 8/255", "white-box FGSM, 8/255"]
    assert [(arm.id, *map(str, shares)) for arm, shares in rows] == [
        ("clean", "1.0 ± 0.0%", "30.5 ± 0.7%", "61.0 ± 1.4%", "61.0 ± 1.4%"),
        ("noise", "1.0 ± 0.0%", "25.5 ± 0.7%", "51.0 ± 1.4%", "51.0 ± 1.4%"),
        ("all", "1.0 ± 0.0%", "5.5 ± 0.7%", "11.0 ± 1.4%", "11.0 ± 1.4%"),
    ]


# ------------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """What a module's tests read of one run is made once."""
    return {}


@pytest.fixture
def out(write_config: WriteConfig, tmp_path: Path, made: dict[str, Path]) -> Path:
    """A run of three models, a copy for each test."""
    if not made:
        generate(write_several(write_config, tmp_path))
        made["out"] = tmp_path / "out"
    shutil.copytree(made["out"], tmp_path / "copy")
    return tmp_path / "copy"


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
    assert "FGSM of models that no training saw (b, e)" in page.words
    assert "over 2 seeds, 6 epochs, on 2 cores of a test. This is a small experiment." in page.words
    head, *rows = page.tables["Errors after each training"]
    names, expected = tabulate(defence)
    assert head == ["trained on", *names]
    assert [row[1:] for row in rows] == [list(map(str, shares)) for _, shares in expected]
    assert [row[0] for row in rows if "control" in row[0]] == ["random signs (the control)"]
    (alt,) = (image["alt"] or "" for image in page.all("img") if "after each training" in (image["alt"] or ""))
    assert "all sources, 11.0 ± 1.4%" in alt


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
    assert "Not finished: 8 trainings are done, and no seed has all 5 arms yet." in page.words
    assert "Errors after each training" not in page.tables
    assert not (out / "assets/defence.png").exists()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "pipeline.report"):
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
def test_what_is_no_defence_is_no_failure(out: Path, content: bytes, log: pytest.LogCaptureFixture) -> None:
    keep(out)
    if b"rows" in content:
        whole = (out / DEFENCE).read_bytes()
        content = re.sub(rb'"rows":1000,"wrong":10\b', content.lstrip(b"{"), whole, count=1)
        assert content != whole
    (out / DEFENCE).write_bytes(content)
    page = make(out)
    (line,) = log.messages
    assert str(out / DEFENCE) in line
    assert "has not been measured" in page.words
    assert (out / DEFENCE).read_bytes() == content


def test_names_in_it_stay_text(out: Path) -> None:
    arms = tuple(Arm(id=kind, title=name, kind="clean") for kind, name in zip(EVERY, NASTY[:5], strict=True))
    keep(out, arms=arms, held_out=NASTY[:2], machine=NASTY[0])
    page = make(out)
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
