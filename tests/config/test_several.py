"""Several models and attacks in a config: both forms of each, and what is refused."""

import json
from typing import Any

import pytest

from pipeline.config.load import load_config, parse_config
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError

DIGITS = {"kind": "digits"}
FGSM = {"epsilons": ["8/255"]}


def parsed(**keys: Any) -> Config:
    sections = {"source": DIGITS, "model": DIGITS, "attack": FGSM, "output": {"path": "out"}, **keys}
    return parse_config({key: value for key, value in sections.items() if value is not None})


def several(models: Any = None, attacks: Any = None) -> Config:
    models, attacks = models or {"a": DIGITS, "b": DIGITS}, attacks or {"fgsm": FGSM}
    return parsed(model=None, models=models, attack=None, attacks=attacks)


def test_the_short_forms_mean_one_of_each() -> None:
    short = parsed(model={"kind": "torchvision", "name": "resnet18"})
    assert [*short.all_models] == ["resnet18"]
    assert [*short.all_attacks] == ["fgsm"]
    long = several({"resnet18": {"kind": "torchvision", "name": "resnet18"}})
    assert long.all_models == short.all_models
    assert long.all_attacks == short.all_attacks
    assert long.variants == short.variants
    assert (short.key("model", "resnet18"), long.key("model", "resnet18")) == ("model", "models.resnet18")


@pytest.mark.parametrize(
    ("attacks", "subsets"),
    [
        ({"fgsm": FGSM}, ["a-eps-8", "b-eps-8"]),
        ({"fgsm": {**FGSM, "models": ["b"]}}, ["eps-8"]),
        ({"fgsm": FGSM, "n": {**FGSM, "kind": "noise"}}, ["fgsm-a-eps-8", "fgsm-b-eps-8", "n-eps-8"]),
        ({"n": {"epsilons": ["2/255", "8/255"], "kind": "noise"}}, ["eps-2", "eps-8"]),
        ({"x": {**FGSM, "models": ["a"]}, "y": {**FGSM, "models": ["a"]}}, ["x-eps-8", "y-eps-8"]),
    ],
)
def test_a_part_that_a_run_has_one_of_is_left_out_of_a_subset_s_name(attacks: Any, subsets: list[str]) -> None:
    assert [variant.subset for variant in several(attacks=attacks).variants] == ["clean", *subsets]


def test_noise_is_written_once_and_of_no_model() -> None:
    clean, noise = several(attacks={"noise": {**FGSM, "kind": "noise"}}).variants
    assert (noise.attack, noise.model, clean.model) == ("noise", None, None)


@pytest.mark.parametrize(
    ("attacks", "needed"),
    [
        ({"fgsm": FGSM}, True),
        ({"fgsm": {**FGSM, "label": "prediction"}}, False),
        ({"fgsm": {**FGSM, "label": "prediction"}, "noise": {**FGSM, "kind": "noise"}}, False),
        ({"fgsm": {**FGSM, "label": "prediction"}, "again": FGSM}, True),
        ({"noise": {**FGSM, "kind": "noise"}}, True),
    ],
)
def test_labels_are_needed_unless_no_attack_follows_them(attacks: Any, needed: bool) -> None:
    assert several(attacks=attacks).needs_labels == needed


def test_a_config_is_read_again_from_what_is_written_of_it() -> None:
    attacks = {"f": FGSM, "n": {**FGSM, "kind": "noise"}, "p": {**FGSM, "kind": "pgd", "steps": 3, "models": ["b"]}}
    config = several(attacks=attacks)
    assert parse_config(json.loads(config.model_dump_json())) == config
    assert parse_config(json.loads(parsed().model_dump_json())) == parsed()


def test_parts_of_several_are_set_by_their_ids(tmp_path: Any) -> None:
    raw = {"source": DIGITS, "models": {"a": DIGITS}, "attacks": {"f": FGSM}, "output": {"path": "out"}}
    (tmp_path / "config.yaml").write_text(json.dumps(raw))
    overrides = ["models.a.weights=null", "models.b={kind: digits}", "attacks.f.epsilons=[4/255]"]
    config = load_config(str(tmp_path / "config.yaml"), overrides)
    assert config.all_models["a"].weights is None
    assert [*config.all_models] == ["a", "b"]
    assert config.all_attacks["f"].levels == (4,)


@pytest.mark.parametrize("key", ["models", "attacks"])
def test_paths_are_relative_to_the_config_s_folder(key: str, tmp_path: Any) -> None:
    own = {"kind": "factory", "name": "own.py:make"} if key == "models" else {**FGSM, "kind": "own.py:make"}
    raw = {"source": DIGITS, "models": {"a": DIGITS}, "attacks": {"f": FGSM}, "output": {"path": "out"}}
    (tmp_path / "config.yaml").write_text(json.dumps({**raw, key: {"x": own}}))
    config = load_config(str(tmp_path / "config.yaml"))
    code = config.all_models["x"].own_code if key == "models" else config.all_attacks["x"].own_code
    assert code == str(tmp_path / "own.py:make")


PGD = {**FGSM, "kind": "pgd"}


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"models": {"a": DIGITS}}, "model and models: "),
        ({"attacks": {"f": FGSM}}, "attack and attacks: "),
        ({"model": None}, "model "),
        ({"attack": None}, "attack "),
        ({"model": None, "models": {"a b": DIGITS}}, "models: .*'a b'"),
        ({"model": None, "models": {"9a": DIGITS}}, "models: .*'9a'"),
        ({"model": None, "models": {"a": DIGITS, "A": DIGITS}}, "models: .* a and A "),
        ({"model": None, "models": {True: DIGITS}}, "models: .* True "),
        ({"model": None, "models": {"a": DIGITS, "b": {**DIGITS, "title": "a"}}}, "models: .*'a'"),
        ({"attack": None, "attacks": {1: FGSM}}, "attacks: .* 1 "),
        (
            {"attack": None, "attacks": {"m": {**FGSM, "kind": "noise"}, "n": {**FGSM, "kind": "noise"}}},
            "attacks: m and n .* noise",
        ),
        (
            {
                **{"model": None, "models": {"b_c": DIGITS, "c": DIGITS}},
                **{"attack": None, "attacks": {"a": {**FGSM, "models": ["b_c"]}, "a_B": {**FGSM, "models": ["c"]}}},
            },
            "attacks: .* a .* b_c .* a_B .* c ",
        ),
        ({"model": None, "models": {"a": {"kind": "timm"}}}, "models.a.name "),
        ({"model": None, "models": {"a": {**DIGITS, "wieghts": 1}}}, "models.a.wieghts "),
        ({"model": None, "models": {"a": 3}}, "models.a .*mapping"),
        ({"model": None, "models": [DIGITS]}, "models .*mapping"),
        ({"attack": {**FGSM, "models": ["b"]}}, "attack.models: .* 'b'"),
        ({"attack": {**FGSM, "models": ["digits"] * 2}}, "attack.models .*digits"),
        ({"attack": {**FGSM, "models": []}}, "attack.models"),
        ({"attack": {**FGSM, "kind": "noise", "models": ["digits"]}}, "attack.models"),
        ({"attack": {**FGSM, "kind": "noise", "target": "random"}}, "attack.target"),
        ({"attack": {**PGD, "step": "9/255"}}, "attack.step"),
        ({"attack": {**PGD, "steps": 0}}, "attack.steps"),
        ({"attack": None, "attacks": {"p": {**PGD, "steps": 0}}}, "attacks.p.steps"),
        ({"attack": None, "attacks": {"p": {**FGSM, "kind": "bmi"}}}, "attacks.p.kind"),
        (
            {
                **{"model": None, "models": {"b_c": DIGITS, "c": DIGITS}},
                **{"attack": None, "attacks": {"a": {**FGSM, "models": ["b_c"]}, "a_b": {**FGSM, "models": ["c"]}}},
            },
            "attacks: .* a .* b_c .* a_b .* c ",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_key(keys: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError, match=f"^{start}"):
        parsed(**keys)


def test_an_id_cannot_stand_twice(tmp_path: Any) -> None:
    (tmp_path / "config.yaml").write_text("models: {a: {kind: digits}, a: {kind: digits}}")
    with pytest.raises(ConfigError, match=r"/config\.yaml .*\bkey a\b"):
        load_config(str(tmp_path / "config.yaml"))


def test_evaluators_are_told_the_lines_that_say_the_same_now() -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(evaluators=[{"id": "other", "kind": "timm", "name": "vit"}])
    lines = "models: {digits: {kind: digits}, other: {kind: timm, name: vit}}, and in attack models: [digits]"
    assert lines in str(refused.value)
    # The first model looks at clean images: that is the one that was attacked, whatever the others are called.
    with pytest.raises(ConfigError) as refused:
        parsed(evaluators=[{"id": "a", **DIGITS}])
    assert "models: {digits: {kind: digits}, a: {kind: digits}}" in str(refused.value)


def test_a_credential_within_a_model_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as refused:
        several({"a": {"kind": "timm", "name": "vit", "kwargs": {"token": "hf_" + "a" * 30}}})
    assert "models.a.kwargs.token" in str(refused.value)
    assert "aaa" not in str(refused.value)
    # Names of classes are no secrets, whatever they are called.
    several({"a": {**DIGITS, "label_map": {"password": 0}}})
