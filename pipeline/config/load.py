"""Load: YAML into a checked config.

`load_config` is the way in: a file or the name of a shipped config, then `--set` overrides.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from pipeline.config.kinds import KINDS, base_section, check, config_class, section_class
from pipeline.config.schema import Config
from pipeline.config.section import Section
from pipeline.core.errors import ConfigError, first_line, shortened
from pipeline.core.redaction import printable

# How deep a config may go: far deeper than any needs.
MOST_DEPTH = 50
# Characters of a value that a message quotes, and of a message that quotes.
MOST_QUOTED, MOST_SAID = 200, 500


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
    for override in overrides:
        _override(raw, override)
    # What is still relative came from an override or a shipped config. Absolute paths let `verify --recompute`
    # find the model again from any folder.
    raw = _anchor_inputs(raw, Path.cwd())
    if output is not None:
        _override_value(raw, "output.path", output)
    if limit is not None:
        _override_value(raw, "source.limit", limit)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Check a config that is already a mapping.

    Raises:
        ConfigError: a key or value is not allowed; one sentence that names the first such key.
    """
    try:
        _check_recordable(raw)
        kind = config_class(raw)
        try:
            return check(raw, kind)
        except ValidationError as error:
            raise ConfigError(printable(_sentence(error, kind))) from None
    except RecursionError:
        raise ConfigError(f"The config is nested too deep; {MOST_DEPTH} levels are more than any needs.") from None


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


class BoundedLoader(yaml.SafeLoader):
    """YAML of a bounded depth and without aliases: nine lines of aliases to aliases are a billion values."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias, *name; write out what it stands for")
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
                raise yaml.YAMLError(f"the key {key.value} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """A YAML text as values.

    Raises:
        ValueError: it is none; the message says why.
    """
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
    evaluators = raw.get("evaluators")
    sections = [(key, raw.get(key)) for key in ("source", "model", "attack")]
    sections += [("evaluators", other) for other in (evaluators if isinstance(evaluators, list) else ())]
    for key, values in sections:
        if isinstance(values, dict):
            section_class(key, values).anchor(values, folder)
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {_quoted(override)}: write it as key=value, for example --set runtime.batch_size=64.")
    try:
        value = _parse_yaml(text)
    except ValueError:
        raise ConfigError(f"--set {_quoted(override)}: {_quoted(repr(text))} is not a YAML value.") from None
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


def _sentence(error: ValidationError, config: type[Config]) -> str:
    """The first problem of a failed validation, as one sentence that names the key."""
    problem = error.errors(include_url=False)[0]
    # The config is sections of keys, and a list of sections; deeper parts of a location are branches of unions.
    deep = 3 if problem["loc"][:1] == ("evaluators",) else 2
    loc = [_quoted(str(part)) for part in problem["loc"][:deep]]
    location = ".".join(loc)
    kind, got = problem["type"], _quoted(repr(problem.get("input")))
    message = _quoted(problem["msg"].removeprefix("Value error, "), MOST_SAID)
    if kind == "extra_forbidden":
        return f"{location} is an unknown key{_known_keys(_section(config, problem['loc'][: deep - 1]), loc[-1])}"
    if kind == "missing":
        section = _section(config, problem["loc"][: deep - 1])
        of_all = loc[0] not in KINDS or len(loc) < deep or loc[-1] in base_section(loc[0]).model_fields
        return f"{location} is missing{' from the config' if of_all else f': kind {_kind(section)} needs it'}."
    if kind == "literal_error":
        return f"{location}: got {got}; allowed: {problem['ctx']['expected']}."
    if kind in ("model_type", "dict_type"):
        return f"{location} must be a mapping of keys (got {got})."
    if kind == "tuple_type":
        return f"{location} must be a list (got {got})."
    if kind == "value_error":
        # A section's own checks begin their message with the key.
        return f"{location}{'.' if len(loc) == deep - 1 else ': '}{message}." if loc else f"{message}."
    return f"{location}: {message} (got {got})."


def _section(config: type[Config], location: Sequence[Any]) -> type[Section]:
    """The section at a location such as source, or evaluators.0."""
    section: Any = config
    for part in location:
        if isinstance(part, int):
            section = get_args(section)[part]
        elif part in section.model_fields:
            section = section.model_fields[part].annotation
    return section  # type: ignore[no-any-return]


def _kind(section: type[Section]) -> str | None:
    """The one kind that a section is of; None of others."""
    kinds = get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()
    return kinds[0] if len(kinds) == 1 else None


def _known_keys(section: type[Section], key: str) -> str:
    """What a message says after an unknown key: what was meant, or what there is."""
    if near := get_close_matches(key, section.model_fields, n=1):
        return f"; did you mean {near[0]}?"
    kind = _kind(section)
    return f"{f' with kind {kind}' if kind else ''}; known keys: {', '.join(section.model_fields)}."
