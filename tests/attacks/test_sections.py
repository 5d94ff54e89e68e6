"""The `attack` section of each kind: what follows from an epsilon, what is refused, and what decides the bytes."""

from typing import Any

import pytest

from pipeline.config.kinds import ATTACKS
from pipeline.config.load import parse_config
from pipeline.core.errors import ConfigError
from tests.support.configs import section

ITERATIVE = ("bim", "pgd", "mifgsm")


def whole(**attack: Any) -> dict[str, Any]:
    """A config with an attack."""
    return {
        "source": {"kind": "digits"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": ["8/255"], **attack},
        "output": {"path": "out"},
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # min(k + 4, 1.25 k), rounded up, and one grey level.
        ("bim", {1: (2, 1), 2: (3, 1), 4: (5, 1), 8: (10, 1), 16: (20, 1), 20: (24, 1), 64: (68, 1), 255: (259, 1)}),
        # 10, and k / 4 in whole grey levels, a half to the even one.
        ("pgd", {1: (10, 1), 4: (10, 1), 6: (10, 2), 8: (10, 2), 10: (10, 2), 14: (10, 4), 16: (10, 4), 255: (10, 64)}),
        # 10, and k / 10.
        ("mifgsm", {1: (10, 1), 8: (10, 1), 15: (10, 2), 16: (10, 2), 25: (10, 2), 26: (10, 3), 255: (10, 26)}),
    ],
)
def test_steps_follow_from_the_epsilon(kind: str, expected: dict[int, tuple[int, int]]) -> None:
    attack = section("attack", kind=kind, epsilons=[f"{level}/255" for level in expected])
    assert attack.schedule == expected
    assert attack.arguments["schedule"] == expected


def test_steps_as_they_are_set() -> None:
    for kind in ITERATIVE:
        attack = section("attack", kind=kind, epsilons=["4/255", "16/255"], steps=7, step="3/255")
        assert attack.schedule == {4: (7, 3), 16: (7, 3)}
    # The length of a step follows from how many there are.
    assert section("attack", kind="pgd", epsilons=["16/255"], steps=20).schedule == {16: (20, 2)}
    assert section("attack", kind="mifgsm", epsilons=["16/255"], steps=4).schedule == {16: (4, 4)}
    assert section("attack", kind="mifgsm", epsilons=["16/255"], decay=0.5).arguments["decay"] == 0.5


@pytest.mark.parametrize(
    ("step", "rounding", "level"),
    [
        ("2/255", "down", 2),
        (0.0078431373, "down", 2),
        ("0.0109", "down", 2),
        ("0.0109", "nearest", 3),
        (1, "down", 255),
    ],
)
def test_a_step_is_stored_as_an_epsilon_is(step: str | float, rounding: str, level: int) -> None:
    attack = section("attack", kind="pgd", epsilons=["1"], step=step, rounding=rounding)
    assert attack.schedule == {255: (10, level)}


@pytest.mark.parametrize("kind", ITERATIVE)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("steps", value) for value in (0, -1, 1001, 2.5, True, "10", float("inf"))),
        *(
            ("step", value)
            for value in (0, 0.001, 8, "8", "9/255", "2/254", "x", "0/255", True, float("nan"), float("inf"))
        ),
        ("size", 1),
    ],
)
def test_steps_that_cannot_be(kind: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^attack\.{key}\b(?!.*epsilons: )"):
        parse_config(whole(kind=kind, **{key: value}))


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf"), 1e39, True, "1"])
def test_decays_that_cannot_be(decay: Any) -> None:
    with pytest.raises(ConfigError, match=r"^attack\.decay\b"):
        parse_config(whole(kind="mifgsm", decay=decay))


@pytest.mark.parametrize("kind", ["fgsm", "noise", "bim", "pgd"])
def test_decay_is_of_momentum_alone(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^attack\.decay .* {kind}\b"):
        parse_config(whole(kind=kind, decay=0.5))


@pytest.mark.parametrize(("key", "value"), [("label", "dataset"), ("label", "prediction"), ("target", 3)])
def test_noise_has_no_loss(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^attack\.{key}: "):
        parse_config(whole(kind="noise", **{key: value}))
    assert parse_config(whole(kind="noise", **{key: None})) == parse_config(whole(kind="noise"))


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_dump_parses_back_to_an_equal_config(kind: str) -> None:
    config = parse_config(whole(kind=kind))
    assert parse_config(config.model_dump(mode="json")) == config


def test_what_decides_the_bytes_is_in_the_identity() -> None:
    epsilons = ["4/255", "8/255"]
    attacks: list[dict[str, Any]] = [
        *({"kind": kind} for kind in ATTACKS),
        *({"kind": kind, **setting} for kind in ITERATIVE for setting in ({"steps": 4}, {"step": "3/255"})),
        {"kind": "mifgsm", "decay": 0.5},
    ]
    identities = [str(section("attack", epsilons=epsilons, **attack).identity) for attack in attacks]
    assert len(set(identities)) == len(attacks)


def test_what_makes_the_same_bytes_is_the_same_run() -> None:
    default = section("attack", kind="pgd", epsilons=["8/255"]).identity
    assert section("attack", kind="pgd", epsilons=["8/255"], steps=10, step="2/255").identity == default
    assert section("attack", kind="pgd", epsilons=["8/255"], step=0.0078431373).identity == default
