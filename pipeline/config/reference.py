"""Reference: what every key of the config means, for `fgsm config`, docs/config.md, messages and editors.

All of it follows from the sections: a field's type, its default and the text below it.
"""

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pkgutil import resolve_name
from typing import Any, NamedTuple, Union

from pydantic import Field, create_model

from pipeline.config.kinds import KINDS, OWN_ATTACK, OWN_ATTACK_SECTION
from pipeline.config.schema import Config
from pipeline.config.section import Section
from pipeline.core.errors import ConfigError

HEAD = """# Config reference

Every key of a config file. `fgsm config KEY` explains one of them, such as `fgsm config attack.epsilons`. `fgsm init`
writes a config to start from.

An editor completes keys and shows their descriptions if it knows the config's schema. Write it once:

```sh
fgsm config --schema > fgsm.schema.json
```

Editors that use the YAML language server (VS Code with the extension "YAML" by Red Hat, Neovim, Helix, Emacs) find it
by a line at the top of the config:

```yaml
# yaml-language-server: $schema=fgsm.schema.json
```

A key that is left out has its default. An unknown key is an error. Relative paths are relative to the folder of the
config file. Only `output.path`, and paths in `--set`, are relative to the working directory.
"""
# The sections that have kinds, with the section of each kind.
Sections = Mapping[str, type[Section]]


class Key(NamedTuple):
    """A key: its dotted name, its type and default in words, its meaning, and the kinds of its section that read it."""

    name: str
    type: str
    default: str
    meaning: str
    kinds: tuple[str, ...]


@cache
def kind_sections() -> Mapping[str, Sections]:
    """The sections of all kinds of `source`, `model` and `attack`."""
    found = {key: {name: resolve_name(kind.section) for name, kind in kinds.items()} for key, kinds in KINDS.items()}
    found["attack"][OWN_ATTACK] = resolve_name(OWN_ATTACK_SECTION)
    return found


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, those of a section together. What kinds define differently stands there once for each."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for name, field in Config.model_fields.items():
        default = "required" if field.is_required() or name in ("model", "attack") else "-"
        found[name, "section", default, _one_line(field.description)] = []
        sections, section = kind_sections().get(name, {}), field.annotation
        # `models` and `attacks` are neither: by id they hold sections of the same kinds.
        if not sections and inspect.isclass(section) and issubclass(section, Section):
            sections = {"": section}
        for kind, section in sections.items():
            for said in _described(name, section):
                found.setdefault(said, []).append(kind)
    return tuple(Key(*said, tuple(filter(None, kinds))) for said, kinds in found.items())


def _described(prefix: str, section: type[Section]) -> Iterable[tuple[str, str, str, str]]:
    """Name, type, default and meaning of the keys of a section and of those within it."""
    schema = section.model_json_schema()
    for name, field in schema["properties"].items():
        key, meaning = f"{prefix}.{name}", _one_line(field.get("description"))
        inner = section.model_fields[name].annotation
        if inspect.isclass(inner) and issubclass(inner, Section):
            yield key, "section", "-", meaning
            yield from _described(key, inner)
        elif name == "kind":
            yield key, "text", "fgsm" if prefix == "attack" else "required", ""
        else:
            default = "required" if name in schema.get("required", ()) else _value(field.get("default"))
            yield key, _type(field), default, meaning


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _value(value: Any) -> str:
    """A default as YAML has it, - for none."""
    return "-" if value in (None, []) else str(value).lower() if isinstance(value, bool) else str(value)


def _type(schema: Mapping[str, Any]) -> str:
    """The type that a JSON schema describes, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return " or ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema['items']).replace('number', 'numbers')}"
    words = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping"}
    return words.get(schema["type"], str(schema["type"]))


def nearest(key: str, names: Iterable[str]) -> str | None:
    """The name that a misspelt or shortened key stands for; None where none is near."""
    names = list(names)
    return next(iter([*(name for name in names if name.startswith(key)), *get_close_matches(key, names, n=1)]), None)


def explain(name: str) -> str:
    """What a key means, as text: `attack.epsilons` or `models.vit.weights`. Of a section its keys are listed.

    Raises:
        ConfigError: there is no such key; the message names the nearest.
    """
    first, *rest = name.split(".")
    if first in ("models", "attacks") and len(rest) > 1:  # an id comes first
        first, rest = first.removesuffix("s"), rest[1:]
    dotted = ".".join([first, *rest])
    keys = [key for key in all_keys() if key.name == dotted]
    if not keys:
        whole = [key.name for key in all_keys()]
        last = {key.rpartition(".")[2]: key for key in whole}
        near = nearest(dotted, whole) or last.get(nearest(dotted, last) or "")
        hint = f"did you mean {near}?" if near else f"the sections are {', '.join(Config.model_fields)}."
        raise ConfigError(f"{name} is no key of the config; {hint}")
    inside = dict.fromkeys(key.name for key in all_keys() if key.name.rpartition(".")[0] == dotted)
    return "\n\n".join(map(_explained, keys)) + "".join(f"\n  {name}" for name in inside)


def meaning(name: str, kind: str = "") -> str:
    """What a key means with a kind of its section; empty where that kind does not have it."""
    section, _, last = name.partition(".")
    if last == "kind":
        return dict(_kinds_of(section)).get(kind, "")
    return next((key.meaning for key in all_keys() if key.name == name and (not key.kinds or kind in key.kinds)), "")


def _explained(key: Key) -> str:
    default = {"required": "required", "-": "may be left out"}.get(key.default, f"default {key.default}")
    section, _, last = key.name.partition(".")
    meaning = "\n".join(f"  {kind}: {said}" for kind, said in _kinds_of(section)) if last == "kind" else key.meaning
    head = f"{key.name}: {key.type.replace('`', '')}, {default}"
    everyone = len(key.kinds) in (0, len(kind_sections().get(section, ())))
    return f"{head}\n{meaning.replace('`', '')}" + ("" if everyone else f"\nRead by kind {', '.join(key.kinds)}.")


def _kinds_of(section: str) -> Iterable[tuple[str, str]]:
    """The kinds of a section, and what each is."""
    for kind, of_kind in kind_sections()[section].items():
        yield kind, _one_line(of_kind.model_fields["kind"].description)


def markdown() -> str:
    """The page docs/config.md."""
    parts = [HEAD]
    for name in Config.model_fields:
        (section,) = (key for key in all_keys() if key.name == name)
        parts.append(f"\n## {name}\n\n{section.meaning}{' Required.' if section.default == 'required' else ''}\n")
        kinds = kind_sections().get(name)
        if kinds:
            parts.append(_table(("kind", "what it is"), ((f"`{kind}`", said) for kind, said in _kinds_of(name))))
        own = [key for key in all_keys() if key.name.startswith(f"{name}.") and not key.name.endswith(".kind")]
        head = ("key", "type", "default", "meaning", *(["read by"] if kinds else []))
        if own:
            parts.append(_table(head, (_row(key, len(kinds or ())) for key in own)))
    return "".join(parts)


def _row(key: Key, kinds: int) -> tuple[str, ...]:
    default = key.default if key.default in ("required", "-") else f"`{key.default}`"
    read_by = "every kind" if len(key.kinds) == kinds else ", ".join(f"`{kind}`" for kind in key.kinds)
    return (f"`{key.name}`", key.type, default, key.meaning, *([read_by] if kinds else []))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors."""
    fields: dict[str, Any] = {}
    for name, sections in kind_sections().items():
        one: Any = Union[tuple(sections.values())]  # noqa: UP007 (of a tuple)
        said = {key: Config.model_fields[key].description for key in (name, f"{name}s") if key in Config.model_fields}
        fields[name] = (
            (one, Field(description=said[name]))
            if name == "source"
            else (one | None, Field(None, description=said[name]))
        )
        if f"{name}s" in said:
            fields[f"{name}s"] = (dict[str, one], Field({}, description=said[f"{name}s"]))
    made: Any = create_model("Config", __base__=Config, **fields)
    schema: dict[str, Any] = made.model_json_schema()
    for definition in schema["$defs"].values():
        kind = definition["properties"].get("kind", {}).get("const")
        if kind and kind != "fgsm":  # which a section without a kind is of
            definition["required"] = sorted({*definition.get("required", ()), "kind"})
    return schema
