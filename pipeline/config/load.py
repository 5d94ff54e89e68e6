"""Load: YAML into a checked config.

`load_config` is the way in: a file or the name of a shipped config, then `--set` overrides.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import ValidationError, create_model

from pipeline.config.kinds import KINDS, OWN_ATTACK, OWN_ATTACK_SECTION
from pipeline.config.reference import all_keys, kind_sections, nearest
from pipeline.config.schema import AttackConfig, Config, ModelConfig, SourceConfig
from pipeline.config.section import Section
from pipeline.core.errors import ConfigError, first_line, shortened
from pipeline.core.redaction import find_secret, printable
from pipeline.core.variants import plain_id

# How deep a config may go: far deeper than any needs.
MOST_DEPTH = 50
# Characters of a value that a message quotes, and of a message that quotes.
MOST_QUOTED, MOST_SAID = 200, 500

# What all kinds of a section have.
BASES: dict[str, type[Section]] = {"source": SourceConfig, "model": ModelConfig, "attack": AttackConfig}

AnySection = TypeVar("AnySection", bound=Section)


def packaged_configs() -> Path:
    """The folder of shipped configs: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def load_config(
    name: str, overrides: Sequence[str] = (), *, output: str | None = None, limit: int | None = None
) -> Config:
    """Read a config file, or a shipped config by its name, and apply overrides.

    Relative input paths in a file are relative to that file's folder; in a shipped config and in
    overrides to the working directory, as is `output.path` everywhere.

    Args:
        name: a path to a YAML file, or the stem of a file in `configs/`.
        overrides: `key=value`, dotted keys, YAML values; later ones win.
        output: overrides `output.path`.
        limit: overrides `source.limit`.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or a key or value is not allowed.
    """
    path = Path(name)
    shipped = packaged_configs() / f"{name}.yaml"
    if path.is_file():
        raw = _anchor_inputs(_read_yaml(path), path.resolve().parent)
    elif shipped.is_file():
        raw = _read_yaml(shipped)
    else:
        names = ", ".join(sorted(file.stem for file in packaged_configs().glob("*.yaml")))
        raise ConfigError(f"There is no config file {name}, and no shipped config of that name (shipped: {names}).")
    for text in overrides:
        override(raw, text)
    # What is still relative came from an override or a shipped config. Absolute paths let `verify --recompute`
    # find the model again from any folder.
    return as_config(raw, output=output, limit=limit)


def as_config(
    config: Config | Mapping[str, Any] | str | Path, *, output: str | Path | None = None, limit: int | None = None
) -> Config:
    """Check a config, however it is given.

    Args:
        config: a file or the name of a shipped config, as `load_config`; a mapping of the same keys, in which relative
            input paths are relative to the working directory; or one that was checked already.

    The overrides and errors are those of `load_config`.
    """
    path = None if output is None else str(output)
    if isinstance(config, str | Path):
        return load_config(str(config), output=path, limit=limit)
    if isinstance(config, Config):
        # What nobody set stays unset: sizes that were not asked for are those of the weights.
        config = config.model_dump(mode="json", exclude_unset=True)
    if not isinstance(config, Mapping):
        raise ConfigError(f"A config is a file's name, a mapping or a Config, and not a {type(config).__name__}.")
    # A copy, as keys are set below; a `Path` is as good as its text.
    raw = _anchor_inputs(_plain(config), Path.cwd())
    if path is not None:
        _override_value(raw, "output.path", path)
    if limit is not None:
        _override_value(raw, "source.limit", int(limit))
    return parse_config(raw)


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of what YAML could have said."""
    if depth > MOST_DEPTH:
        raise ConfigError(f"The config is nested too deep; {MOST_DEPTH} levels are more than any needs.")
    if isinstance(value, Mapping):
        return {name: _plain(inside, depth + 1) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside, depth + 1) for inside in value]
    return str(value) if isinstance(value, Path) else value


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Check a config that is already a mapping.

    Raises:
        ConfigError: a key or value is not allowed; one sentence that names the first such key.
    """
    try:
        # Before anything else is checked, as a message quotes what it refuses.
        if secret := find_secret(raw):
            raise ConfigError(
                f"{printable(secret)} holds a credential, and a config is written into manifest.json, which is "
                "published; remove it, and log in with `hf auth login` or set HF_TOKEN or what the storage's client "
                "reads."
            )
        _check_recordable(raw)
        if "evaluators" in raw:
            raise ConfigError(_without_evaluators(raw))
        values: dict[str, Any] = dict(raw)
        for key, where, section in _sections(raw):
            checked = _checked(section_class(key, section), _without_empty(key, section), where)
            values |= {where[0]: checked} if len(where) == 1 else {where[0]: {**values[where[0]], where[1]: checked}}
        return _checked(Config, values, ())
    except RecursionError:
        raise ConfigError(f"The config is nested more than {MOST_DEPTH} levels deep.") from None


def section_class(key: str, values: Any) -> type[Section]:
    """The section that a kind of source, model or attack has. If the values name none, it is one that refuses them."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if key == "attack" and kind is None:
        kind = "fgsm"
    if not isinstance(kind, str):
        return _no_kind(key)
    if key == "attack" and ":" in kind:
        return resolve_name(OWN_ATTACK_SECTION)  # type: ignore[no-any-return]
    return resolve_name(KINDS[key][kind].section) if kind in KINDS[key] else _no_kind(key)


@cache
def _no_kind(key: str) -> type[Section]:
    kinds = (*KINDS[key], *([OWN_ATTACK] if key == "attack" else []))
    known: Any = (Literal[kinds], ...)
    return create_model("NoKind", __base__=BASES[key], kind=known)


def _without_empty(key: str, values: Any) -> Any:
    """A section without keys of other kinds that hold nothing: `--set model.name=` takes away what a file says."""
    known = section_class(key, values).model_fields
    if not isinstance(values, Mapping) or known.keys() >= values.keys():
        return values
    others = {field for section in kind_sections()[key].values() for field in section.model_fields}
    return {
        name: value
        for name, value in values.items()
        if name in known or name not in others or not (value is None or value is False or value in ([], (), {}))
    }


def _check_recordable(value: Any, key: str = "the config") -> None:
    """Refuse what JSON, of which the manifest is, cannot record, and a path that can be none."""
    if isinstance(value, Mapping):
        for name, inside in value.items():
            _check_recordable(name, key)
            _check_recordable(inside, str(name) if key == "the config" else f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for inside in value:
            _check_recordable(inside, key)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{_quoted(key)}: a whole number has more than 64 bits.")
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(
            f"{_quoted(key)}: {_quoted(value)} holds a character that no path may have or that is no UTF-8; rename it."
        )


def _sections(raw: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], Any]]:
    """The sections that have kinds: of each what it is, its location, and its values, not yet checked."""
    found: list[tuple[str, tuple[str, ...], Any]] = [
        (key, (key,), raw[key]) for key in ("source", "model", "attack") if raw.get(key) is not None
    ]
    for key in ("model", "attack"):
        several = raw.get(f"{key}s")
        for name, section in several.items() if isinstance(several, Mapping) else ():
            if not isinstance(name, str):
                raise ConfigError(f"{key}s: the id {name!r} is not text; put it in quotes.")
            found.append((key, (f"{key}s", name), section))
    return found


def _checked(section: type[AnySection], values: Any, where: tuple[str, ...]) -> AnySection:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(printable(_sentence(error, section, where))) from None


def _without_evaluators(raw: Mapping[str, Any]) -> str:
    """What a config of an earlier version is told, which has `evaluators`: the lines that say the same now."""
    model, others = raw.get("model"), raw["evaluators"]
    named = [other for other in others if isinstance(other, Mapping)] if isinstance(others, list | tuple) else []
    models: dict[str, Any] = {}
    if isinstance(model, Mapping):
        models[plain_id(str(model.get("name") or model.get("kind")))] = dict(model)
    attacking = [*models]
    models |= {str(other.get("id")): {key: other[key] for key in other if key != "id"} for other in named}
    # In this order, as the first model looks at clean images.
    lines = yaml.safe_dump({"models": models}, default_flow_style=True, sort_keys=False, width=10_000).strip()[1:-1]
    return (
        "evaluators is no key any more: a model that no attack names looks on. In place of model and evaluators write "
        f"{_quoted(lines, MOST_SAID)}, and in attack models: [{', '.join(attacking)}]."
    )


class BoundedLoader(yaml.SafeLoader):
    """YAML of a bounded depth and without aliases: nine lines of aliases to aliases are a billion values."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains an alias, *name; write its value instead")
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Loader(BoundedLoader):
    """A config's YAML: no key stands twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.YAMLError(f"the key {key.value} appears twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """A YAML text as values; a ValueError says why it is none."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    # Dates, numbers and keys that cannot be: PyYAML passes on what Python says of them.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, LookupError) as error:
        raise ValueError(first_line(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ConfigError(f"{path} is not valid YAML: {_quoted(str(error))}.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of sections such as source, model and attack.")
    return raw


def _anchor_inputs(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make relative input paths of a config file relative to its folder."""
    for key, _, values in _sections(raw):
        if isinstance(values, dict):
            section_class(key, values).anchor(values, folder)
    return raw


def override(raw: dict[str, Any], assignment: str) -> None:
    """Set a key of a config that is not yet checked: `key=value`, a dotted key and a YAML value.

    Raises:
        ConfigError: it is none, or sets a key within what is no section.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"--set {_quoted(assignment)}: write it as key=value, for example --set runtime.batch_size=64."
        )
    try:
        value = _parse_yaml(text)
    except ValueError:
        raise ConfigError(f"--set {_quoted(assignment)}: {_quoted(repr(text))} is not a YAML value.") from None
    _override_value(raw, key, value)


def _override_value(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if raw.get(section) is None:
            raw[section] = {}
        if not isinstance(raw[section], dict):
            raise ConfigError(f"--set {_quoted(key)}: {_quoted(section)} is not a section.")
        raw = raw[section]
    raw[last] = value


def _quoted(text: str, most: int = MOST_QUOTED) -> str:
    """What a message quotes, on one line and not too long for it."""
    return shortened(printable(" ".join(text.split())), most)


def _sentence(error: ValidationError, section: type[Section], where: tuple[str, ...]) -> str:
    """The first problem of a failed validation, as one sentence that names the key.

    A wrong kind comes first, as other kinds have other keys; then an unknown key, as what is missing is often the key
    that it was meant to be. `where` is the section's location in the config, empty for the whole config.
    """
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda one: (one["loc"] != ("kind",), one["type"] != "extra_forbidden"))
    kind, got = problem["type"], _quoted(repr(problem.get("input")))
    # Deeper parts of a location are branches of unions, but for an unknown key, which is the last part.
    inside = problem["loc"][: None if kind == "extra_forbidden" else 1 if where else 2]
    loc = [_quoted(str(part)) for part in (*where, *inside)]
    location = ".".join(loc)
    message = _quoted(problem["msg"].removeprefix("Value error, "), MOST_SAID)
    if kind == "extra_forbidden":
        return f"{location} is an unknown key{_known_keys(_inner(section, inside[:-1]), loc[-1], where)}"
    if kind == "missing":
        of_all = not where or inside[0] in BASES[where[0].removesuffix("s")].model_fields
        return f"{location} is missing{' from the config' if of_all else f': kind {_kind(section)} needs it'}."
    if kind == "literal_error":
        return f"{location}: got {got}; allowed: {problem['ctx']['expected']}."
    if kind in ("model_type", "dict_type"):
        return f"{location} must be a mapping of keys (got {got})."
    if kind == "tuple_type":
        return f"{location} must be a list (got {got})."
    if kind == "value_error":
        # A section's own checks begin their message with the key.
        separator = "." if not (where and inside) and len(inside) < 2 else ": "
        return f"{location}{separator}{message}." if loc else f"{message}."
    return f"{location}: {message} (got {got})."


def _inner(section: type[Section], location: Sequence[Any]) -> type[Section]:
    """The section at a location within one, such as output within the config."""
    for part in location:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return section


def _kind(section: type[Section]) -> str | None:
    """The one kind that a section is of; None of others."""
    kinds = get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()
    return kinds[0] if len(kinds) == 1 else None


def _known_keys(section: type[Section], key: str, where: tuple[str, ...]) -> str:
    """What a message says after an unknown key: what was meant, or what there is; `where` as in `_sentence`."""
    kinds = kind_sections()[where[0].removesuffix("s")] if where else {}
    others = [name for name, other in kinds.items() if key in other.model_fields]
    if near := None if others else nearest(key, section.model_fields):
        return f"; did you mean {near}?"
    if section is Config:
        # A key without its section: epsilons for attack.epsilons.
        below = {known.name.rpartition(".")[2]: known.name for known in reversed(all_keys())}
        if near := nearest(key, below):
            return f"; did you mean {below[near]}?"
    kind = _kind(section)
    hint = f" Kind {' or '.join(others)} has it." if others else ""
    return f"{f' with kind {kind}' if kind else ''}; known keys: {', '.join(section.model_fields)}.{hint}"
