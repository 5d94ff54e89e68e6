"""Some attacks and models of a dataset: which rows a reader gives, and how often training draws each variant."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import pipeline
from pipeline.core.errors import ConfigError
from pipeline.core.variants import make_variants
from pipeline.read.choice import draw_shares
from tests.conftest import LAYOUTS, WriteConfig, generate, generate_once
from tests.support.hub import push, read_back, running_hub
from tests.support.s3 import bucket as bucket
from tests.support.s3 import out as out
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server
from tests.support.several import ON_RAYS, write_several

# What made a row, and at which level.
Made = tuple[str | None, str | None, int]

CLEAN: Made = (None, None, 0)
# In the order in which `load` gives them: by epsilon, within one as the dataset has them.
EVERY: list[Made] = [
    CLEAN,
    ("fgsm", "net", 2),
    ("fgsm", "sums", 2),
    ("fgsm", "net", 8),
    ("fgsm", "sums", 8),
    ("noise", None, 8),
    ("aimed", "net", 8),
]
CHOICES: list[tuple[dict[str, Any], list[Made]]] = [
    ({}, EVERY),
    ({"models": "net"}, [CLEAN, *(made for made in EVERY if made[1] == "net" or made[0] == "noise")]),
    ({"models": ["sums", "net"]}, EVERY),
    ({"attacks": "fgsm"}, EVERY[:5]),
    ({"attacks": ["aimed", "noise"]}, [CLEAN, *EVERY[5:]]),
    ({"attacks": ["aimed", "fgsm"], "models": "sums"}, [CLEAN, EVERY[2], EVERY[4]]),
    ({"attacks": "noise", "models": "sums"}, [CLEAN, EVERY[5]]),
    ({"epsilons": [0], "models": "sums"}, [CLEAN]),
    ({"epsilons": ["8/255"]}, [EVERY[i] for i in (3, 4, 5, 6)]),
    ({"epsilons": ["8/255", 0], "models": ["sums"]}, [EVERY[4], EVERY[5], CLEAN]),
    (
        {"epsilons": ["3/255", "2/255"], "models": ["sums"]},
        [("fgsm", "sums", 3), ("noise", None, 3), ("fgsm", "sums", 2), ("noise", None, 2)],
    ),
    ({"epsilons": ["9/255"], "attacks": "aimed"}, [("aimed", "net", 9)]),
]


def made(rows: Iterable[dict[str, Any]]) -> list[Made]:
    """What made each of the rows."""
    return [(row["attack"], row["model"], round(255 * row["epsilon"])) for row in rows]


def plain(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "image": row["image"].tobytes()} for row in rows]


# --------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def stored(several: Path) -> dict[Made, list[dict[str, Any]]]:
    """The rows of each variant, as `datasets` reads them."""
    rows: dict[Made, list[dict[str, Any]]] = {one: [] for one in EVERY}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", several / "cache")
        for row in plain(datasets.load_dataset(str(several / "images"), "all", split="test")):
            rows[made([row])[0]].append(row)
    return rows


@pytest.mark.parametrize("number", range(len(CHOICES)), ids=[str(choice) for choice in CHOICES])
def test_every_layout_gives_the_rows_of_the_attacks_and_models_asked_for(
    several: Path, stored: dict[Made, list[dict[str, Any]]], number: int
) -> None:
    options, expected = CHOICES[number]
    # Which rows these are is decided before it is known whether they are streamed: of some choices they are.
    first, *others = (
        plain(pipeline.load(several / layout, split="test", streaming=streaming, **options))
        for layout in LAYOUTS
        for streaming in ((False, True) if number % 5 == 0 else (False,))
    )
    assert all(rows == first for rows in others)
    assert made(first) == [one for one in expected for _ in range(40)]
    for index, one in enumerate(expected):
        own = first[40 * index : 40 * (index + 1)]
        if one in stored:
            assert own == stored[one]
        else:
            assert {row["prediction"] for row in own} == {row["fooled"] for row in own} == {None}
            # The class that an attack aims at is the same at each epsilon.
            assert [row["target"] for row in own] == [row["target"] for row in stored.get((*one[:2], 8), own)]


@pytest.mark.parametrize(
    ("options", "key", "named"),
    [
        ({"models": "vgg"}, "models", ["'vgg'", "net, sums."]),
        # It only looks: there are no images of it.
        ({"models": ["net", "turned"]}, "models", ["'turned'", "net, sums."]),
        ({"models": []}, "models", ["net, sums."]),
        ({"attacks": "pgd"}, "attacks", ["'pgd'", "fgsm, noise, aimed."]),
        ({"attacks": ["fgsm", "net"]}, "attacks", ["'net'", "fgsm, noise, aimed."]),
        ({"attacks": "aimed", "models": "sums"}, "models, attacks", ["aimed", "sums"]),
        ({"epsilons": [0], "models": "vgg"}, "models", ["'vgg'", "net, sums."]),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_there_names_the_key_and_what_is(
    several: Path, layout: str, options: dict[str, Any], key: str, named: list[str]
) -> None:
    for read in (pipeline.load, pipeline.training_dataset):
        if read is pipeline.training_dataset and "epsilons" in options:
            continue
        with pytest.raises(ConfigError, match=f"^{key}: ") as caught:
            read(several / layout, split="test", **options)
        assert all(text in str(caught.value) for text in named)


def test_other_epsilons_are_only_of_attacks_on_a_ray(several: Path) -> None:
    for read in (pipeline.load, pipeline.training_dataset):
        for options in ({}, {"attacks": ["fgsm", "pgd"]}, {"models": "net"}):
            with pytest.raises(ConfigError, match=r"^epsilons: 3/255 .*\bpgd\b"):
                read(several / "stepped", split="test", epsilons=["3/255"], **options)
    rows = pipeline.load(several / "stepped", ["3/255"], "test", models="sums")
    assert Counter(made(rows)) == {("fgsm", "sums", 3): 40, ("noise", None, 3): 40}
    rows = pipeline.load(several / "stepped", ["8/255"], "test", attacks="pgd")
    assert Counter(made(rows)) == {("pgd", "net", 8): 40}
    data = pipeline.training_dataset(several / "stepped", "test", epsilons=["3/255"], attacks=["fgsm", "noise"])
    assert len(list(data)) == 40


def test_what_an_attack_cannot_give_is_left_out_where_another_has_it(several: Path) -> None:
    for models, expected in (
        (None, {("fgsm", "net", 2): 40, ("fgsm", "sums", 2): 40, ("noise", None, 2): 40}),
        ("net", {("fgsm", "net", 2): 40, ("noise", None, 2): 40}),
    ):
        with pytest.warns(UserWarning, match="^epsilons: left out") as warned:
            rows = pipeline.load(several / "stepped", ["2/255"], "test", models=models)
        assert [str(one.message).count("pgd on net at 2/255") for one in warned] == [1]
        assert warned[0].filename == __file__
        assert Counter(made(rows)) == expected
    with pytest.warns(UserWarning, match="^epsilons: left out") as warned:
        rows = pipeline.load(several / "stepped", ["2/255", 0, "8/255"], "test")
    assert len(warned) == 1
    assert Counter(made(rows)) == dict.fromkeys((*EVERY[:6], ("noise", None, 2), ("pgd", "net", 8)), 40)
    with pytest.warns(UserWarning, match="^epsilons: left out.*pgd on net at 2/255") as warned:
        data = pipeline.training_dataset(several / "stepped", "test", epsilons=["2/255", "8/255"], clean=0)
    assert [
        (variant.attack, variant.level) for variant in data.streams[0].shards.variants if variant.attack == "pgd"
    ] == [("pgd", 8)]
    assert len(list(data)) == 40
    for read in (pipeline.load, pipeline.training_dataset):
        with pytest.raises(ConfigError, match=r"^epsilons: 2/255 is not recorded of attack pgd"):
            read(several / "stepped", epsilons=["2/255"], split="test", attacks=["fgsm", "pgd"])
        # One that nobody has recorded is more likely a slip than a wish.
        with pytest.raises(ConfigError, match=r"^epsilons: 3/255 is not recorded of attack pgd"):
            read(several / "stepped", epsilons=["2/255", "3/255"], split="test")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_model_and_one_attack_can_be_named_too(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    generate_once(write_config(source={"limit": 8}, output={"layout": layout}))
    read = [
        plain(pipeline.load(tmp_path / "out", split="test", **options))
        for options in ({}, {"models": "make"}, {"attacks": ["fgsm"]}, {"models": ["make"], "attacks": "fgsm"})
    ]
    assert len(read[0]) == 24
    assert all(rows == read[0] for rows in read)
    with pytest.raises(ConfigError, match=r"^models: .*'other'; .* make\.$"):
        pipeline.load(tmp_path / "out", split="test", models="other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_manifest_names_and_rows_say_what_there_is(several: Path, tmp_path: Path, layout: str) -> None:
    expected = plain(pipeline.load(several / layout, split="test"))
    copy = tmp_path / "copy"
    shutil.copytree(several / layout, copy)
    (copy / "manifest.json").unlink()
    assert plain(pipeline.load(copy, split="test")) == expected
    assert made(pipeline.load(copy, [0], "test")) == [CLEAN] * 40
    assert made(pipeline.load(copy, ["8/255", 0], "test")) == [one for one in [*EVERY[3:], CLEAN] for _ in range(40)]
    if layout == "images":
        # Names of subsets do not tell which part of them is a model's.
        with pytest.raises(ConfigError, match=r"manifest\.json"):
            pipeline.load(copy, split="test", models="net")
    else:
        assert made(pipeline.load(copy, split="test", models="sums")) == [
            one for one in (CLEAN, EVERY[2], EVERY[4], EVERY[5]) for _ in range(40)
        ]
        with pytest.raises(ConfigError, match=r"^attacks: .*'pgd'"):
            pipeline.load(copy, split="test", attacks="pgd")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_an_object_store_are_chosen_alike(
    out: str, write_config: WriteConfig, tmp_path: Path, layout: str
) -> None:
    config = write_several(write_config, tmp_path, ON_RAYS, source={"limit": 10}, output={"layout": layout})
    generate(config, "--output", out)
    options: dict[str, Any] = {"models": "sums", "attacks": ["fgsm", "noise"], "split": "test"}
    for streaming in (False, True):
        rows = pipeline.load(out, ["8/255", "3/255"], streaming=streaming, **options)
        assert Counter(made(rows)) == {(*one, k): 10 for one in (("fgsm", "sums"), ("noise", None)) for k in (8, 3)}
        with pytest.raises(ConfigError, match=r"^models: .*'vgg'"):
            pipeline.load(out, streaming=streaming, models="vgg")


FROM_HUB = """
import json
import sys

import datasets
import pipeline

datasets.config.USE_PARQUET_EXPORT = False  # it would ask a second host
for repository in sys.argv[1:]:
    for streaming in (False, True):
        options = {"models": "sums", "attacks": ["fgsm", "noise"], "split": "test", "streaming": streaming}
        rows = pipeline.load(repository, ["8/255"], **options)
        print(json.dumps([(row["attack"], row["model"], row["source_index"]) for row in rows]))
    print(len(pipeline.load(repository, [0], split="test")))
"""


@pytest.mark.slow
def test_rows_on_the_hub_are_chosen_alike(several: Path, tmp_path: Path) -> None:
    # What is not asked for is not fetched; where rows say what made them, nor is the manifest.
    fetched = {"images": {"clean", "fgsm-sums-eps-8", "noise-eps-8", "manifest.json"}, "wide": {"wide"}}
    with running_hub() as hub:
        for layout in fetched:
            push(hub, several / layout, to=f"user/{layout}")
        lines = read_back(FROM_HUB, *(f"user/{layout}" for layout in fetched), hub=hub, folder=tmp_path)
        for (layout, subsets), (*chosen, clean) in zip(fetched.items(), (lines[:3], lines[3:]), strict=True):
            indices = pipeline.load(several / layout, [0], "test")["source_index"][:]
            expected = [[*one, index] for one in (["fgsm", "sums"], ["noise", None]) for index in indices]
            assert [json.loads(line) for line in chosen] == [expected, expected]
            assert clean == "40"
            asked = {path.split("/resolve/")[1].split("/")[1] for path in hub.asked("GET", f"user/{layout}/resolve/")}
            assert asked - {"README.md"} == subsets


# --------------------------------------------------------------------------------------------------- drawing

GRID = make_variants(
    {"fgsm": (["a", "b"], [2, 8]), "noise": ([None], [8]), "pgd": (["a"], [4, 8, 16])},
)[1:]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # a: fgsm, noise, pgd; b: fgsm, noise.
        ({}, {"fgsm-a": 1 / 12, "fgsm-b": 1 / 8, "noise": 1 / 6 + 1 / 4, "pgd-a": 1 / 18}),
        # An attack's weight says how often it is drawn among those on its model, and models stay as likely.
        ({"pgd": 2}, {"fgsm-a": 1 / 16, "fgsm-b": 1 / 8, "noise": 1 / 8 + 1 / 4, "pgd-a": 1 / 12}),
        ({"a": 3}, {"fgsm-a": 1 / 8, "fgsm-b": 1 / 16, "noise": 1 / 4 + 1 / 8, "pgd-a": 1 / 12}),
        ({"noise": 0}, {"fgsm-a": 1 / 8, "fgsm-b": 1 / 4, "noise": 0, "pgd-a": 1 / 12}),
        # What nothing is left of is not drawn: not b, whose images of fgsm are gone and whose noise is everybody's.
        ({"fgsm": 0}, {"fgsm-a": 0, "fgsm-b": 0, "noise": 1 / 2, "pgd-a": 1 / 6}),
        ({"a": 0, "b": 0}, {"fgsm-a": 0, "fgsm-b": 0, "noise": 1, "pgd-a": 0}),
        ({"pgd": 1e308, "fgsm": 1e308}, {"fgsm-a": 1 / 8, "fgsm-b": 1 / 4, "noise": 0, "pgd-a": 1 / 12}),
    ],
    ids=str,
)
def test_shares_are_even_over_models_then_attacks_then_epsilons(
    weights: dict[str, float], expected: dict[str, float]
) -> None:
    shares = draw_shares(GRID, weights)
    assert shares.max() == 1
    wanted = np.array([expected[variant.subset.partition("-eps")[0]] for variant in GRID])
    np.testing.assert_allclose(shares / shares.sum(), wanted, rtol=1e-12, atol=1e-300)


def test_an_epsilon_weighs_among_those_of_its_attack() -> None:
    shares = dict(zip((one.subset for one in GRID), draw_shares(GRID, {"8/255": 4, "4/255": 0}), strict=True))
    total = sum(shares.values())
    assert shares["fgsm-a-eps-8"] / shares["fgsm-a-eps-2"] == pytest.approx(4)
    assert shares["fgsm-b-eps-8"] / total == pytest.approx(1 / 4 * 4 / 5)
    assert shares["noise-eps-8"] / total == pytest.approx(1 / 6 + 1 / 4)
    assert shares["pgd-a-eps-4"] == 0
    assert shares["pgd-a-eps-8"] / total == pytest.approx(1 / 6 * 4 / 5)


def test_without_models_noise_is_drawn_alone() -> None:
    noise = make_variants({"noise": ([None], [2, 8])})[1:]
    assert draw_shares(noise, {}).tolist() == [1, 1]
    assert draw_shares(noise, {"2/255": 0.5}).tolist() == [0.5, 1]


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"vgg": 1}, "'vgg'"),
        ({"3/255": 1}, "'3/255'"),
        ({"pgd": -1}, "pgd"),
        ({"pgd": float("inf")}, "pgd"),
        ({"pgd": float("nan")}, "pgd"),
        ({"pgd": "2"}, "pgd"),
        ({"pgd": True}, "pgd"),
        ({"fgsm": 0, "noise": 0, "pgd": 0}, "nothing"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_are_named(weights: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=r"^weights: ") as caught:
        draw_shares(GRID, weights)
    assert named in str(caught.value)
