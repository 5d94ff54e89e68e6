"""What every key means: docs/config.md, `fgsm config` and the JSON schema follow from the sections."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config.load import packaged_configs
from pipeline.config.reference import all_keys, json_schema, kind_sections, markdown
from tests.conftest import REPOSITORY, fgsm

PAGE = REPOSITORY / "docs/config.md"
SCHEMA = json_schema()


def properties(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All properties of a JSON schema, wherever they stand."""
    if isinstance(schema, dict):
        for name, inside in schema.get("properties", {}).items():
            yield f"{path}.{name}", inside
        for name, inside in schema.items():
            yield from properties(inside, f"{path}.{name}")


def test_every_key_has_a_description() -> None:
    assert len(dict(properties(SCHEMA))) > 80
    # A section has that of its definition.
    bare = [path for path, schema in properties(SCHEMA) if not (schema.get("description") or "$ref" in schema)]
    assert bare == []
    assert [key.name for key in all_keys() if not (key.meaning or key.name.endswith(".kind"))] == []


def test_the_page_is_current() -> None:
    # Not with ==, whose explanation would hide the command.
    current = PAGE.read_text() == markdown()
    assert current, "docs/config.md is not what the sections say; make it anew: fgsm config > docs/config.md"


def test_what_is_printed_without_a_key_is_the_page() -> None:
    assert fgsm("config").stdout == PAGE.read_text()


@pytest.mark.parametrize("path", sorted(packaged_configs().glob("*.yaml")), ids=lambda path: path.stem)
def test_an_editor_finds_nothing_wrong_with_shipped_configs(path: Any) -> None:
    schema = json.loads(fgsm("config", "--schema").stdout)
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.mark.parametrize(
    "section",
    [
        {"attack": {"epsilon": ["8/255"]}},
        {"attack": {"kind": "pdg", "epsilons": ["8/255"]}},
        {"attack": {"epsilons": ["8/255"], "steps": 3}},
        {"attack": {"kind": "noise", "epsilons": ["8/255"], "label": "dataset"}},
        {"source": {"kind": "digits", "path": "x"}},
        {"runtime": {"batch_size": 0}},
        {"models": {"a": {"kind": "factory"}}},
    ],
)
def test_an_editor_finds_what_is_wrong(section: dict[str, Any]) -> None:
    config = {
        "source": {"kind": "digits", "split": "test"},
        "model": {"kind": "digits"},
        "attack": {"kind": "a.py:Attack", "epsilons": ["8/255", 0.1], "kwargs": {"a": 1}},
        "output": {"path": "out"},
    }
    jsonschema.validate(config, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, **section}, SCHEMA)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("attack.epsilons", ["attack.epsilons: list of text or numbers, required"]),
        ("models.vit.weights", ["model.weights: text, may be left out"]),
        ("attacks.one.steps", ["attack.steps", "kind bim, pgd, mifgsm"]),
        ("source.path", ["kind huggingface", "kind imagefolder", "kind torchvision"]),
        ("model.kind", list(kind_sections()["model"])),
        ("runtime.batch_size", ["default 256"]),
        ("runtime", ["runtime.seed", "runtime.ray"]),
    ],
)
def test_a_key_is_explained(key: str, said: list[str]) -> None:
    result = fgsm("config", key)
    assert result.exit_code == 0
    assert [word for word in said if word not in result.stdout] == []


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("attack.epsilon", "attack.epsilons"),
        ("epsilons", "attack.epsilons"),
        ("batchsize", "runtime.batch_size"),
        ("modle", "model"),
        ("zzz", "runtime"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(key: str, meant: str) -> None:
    result = fgsm("config", key)
    assert result.exit_code == 2
    assert key in result.stderr
    assert meant in result.stderr
