"""Columns: which of a table's are image, label and kept, and whether files agree on what they mean."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.sources import HuggingFaceConfig
from pipeline.core.errors import ConfigError, shortened


@dataclass(frozen=True)
class Columns:
    """Which columns of a table become what, and the features of `datasets` that they have."""

    image: str
    label: str | None
    kept: tuple[str, ...]
    features: Mapping[str, Any]


def find_columns(
    schemas: Mapping[str, pa.Schema], stated: Mapping[str, Any] | None, config: HuggingFaceConfig, need_labels: bool
) -> Columns:
    """The columns of a dataset's files that are used; they must mean the same in each file.

    Args:
        schemas: of the files, by their names.
        stated: the features that the dataset's card states, if it does.
        config: the `source` section.
        need_labels: whether a dataset without a label column is an error.

    Raises:
        ConfigError: a column is not there, or differs between two files: the same numbers would mean other classes.
    """
    first, schema = next(iter(schemas.items()))
    features = {**column_features(schema), **(stated or {})}
    image = find_image_column(features, config)
    label = find_label_column(features, config, need_labels)
    check_kept(features, config)
    used = dict.fromkeys((image, *([label] if label else []), *config.keep_columns))
    for name in used:
        if isinstance(features[name], pa.DataType):
            raise ConfigError(f"source: column {name} holds {features[name]}, of which `datasets` has no type.")
    for file, other in schemas.items():
        own = column_features(other, used)
        for name in used:
            role = "image" if name == image else "label" if name == label else "kept"
            expected, here = (_meaning(features.get(name), role), _meaning(own.get(name), role))
            # A card may give a meaning to what files hold; but no other one than they state themselves.
            by_card = name in (stated or {}) and not here.startswith((CLASSES_OF, MISSING))
            if expected != here and not by_card:
                raise ConfigError(
                    f"source: column {name} holds {shortened(here)} in {file} and {shortened(expected)} in "
                    f"{'the card' if name in (stated or {}) else first}; the files of a dataset must agree, so write "
                    "one of them anew, or read them as two datasets."
                )
    return Columns(image, label, config.keep_columns, {name: features[name] for name in used})


def check_kept(features: Mapping[str, Any], config: HuggingFaceConfig) -> None:
    for name in config.keep_columns:
        if name not in features:
            raise ConfigError(f"source.keep_columns: there is no column {name}; {column_listing(features)}.")


def column_features(schema: pa.Schema, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The features of `datasets` that some columns have, all by default; of a type without one, the type itself."""
    import datasets

    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        told = None
    features: dict[str, Any] = {}
    for name in schema.names if names is None else names:
        if (index := schema.get_field_index(name)) < 0:
            continue  # not there, or there twice
        kind = plain_type(schema.field(index).type)
        stated = told.get(name) if isinstance(told, dict) else None
        metadata = {"huggingface": json.dumps({"info": {"features": {name: stated}}})}
        features[name] = kind
        # What the metadata says may be of a version to come: then the type alone tells.
        for known in ([metadata] if stated else []) + [None]:
            with contextlib.suppress(Exception):  # the library has an error of its own for each case
                features[name] = datasets.Features.from_arrow_schema(pa.schema([(name, kind)], known))[name]
                break
    return features


# How the two meanings begin that a card does not replace.
CLASSES_OF, MISSING = "the classes ", "nothing, as it is missing,"


def _meaning(feature: Any, role: str) -> str:
    """What a column holds, in words that are the same where it means the same."""
    import datasets

    if feature is None:
        return MISSING
    if isinstance(feature, datasets.ClassLabel):
        return f"{CLASSES_OF}{', '.join(feature.names or ())}"
    if role == "image" and not isinstance(feature, datasets.Value):
        return "structs of an image"
    kind = str(getattr(feature, "dtype", "")) if isinstance(feature, datasets.Value) else str(feature)
    if role == "label" and re.fullmatch(r"u?int\d+", kind):
        return "integers"
    return kind.replace("large_", "")


def plain_type(kind: pa.DataType) -> pa.DataType:
    """An Arrow type without dictionaries and views, which other libraries write for texts that repeat."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def column_listing(names: Iterable[str]) -> str:
    return f"the columns are {', '.join(names)}"


def _only(features: Mapping[str, Any], key: str, kind: Callable[[Any], bool], what: str) -> str | None:
    """The only column of that kind, None where there is none; several are an error."""
    found = [name for name, feature in features.items() if kind(feature)]
    if len(found) > 1:
        raise ConfigError(f"source.{key}: there are several {what} columns ({', '.join(found)}); name one.")
    return found[0] if found else None


def _named(features: Mapping[str, Any], key: str, name: str) -> str:
    """A column that the config names.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in features:
        raise ConfigError(f"source.{key}: there is no column {name}; {column_listing(features)}.")
    return name


def find_image_column(features: Mapping[str, Any], config: HuggingFaceConfig) -> str:
    import datasets

    if config.image_column is not None:
        return _named(features, "image_column", config.image_column)
    found = _only(features, "image_column", lambda feature: isinstance(feature, datasets.Image), "image")
    if found is None:
        raise ConfigError(f"source.image_column: no column holds images; {column_listing(features)}.")
    return found


def find_label_column(features: Mapping[str, Any], config: HuggingFaceConfig, need_labels: bool) -> str | None:
    import datasets

    if config.label_column is not None:
        return _named(features, "label_column", config.label_column)
    found = _only(features, "label_column", lambda feature: isinstance(feature, datasets.ClassLabel), "ClassLabel")
    if found is None and need_labels:
        raise ConfigError(
            "source.label_column: no column is a ClassLabel; name one of integers or strings "
            f"({column_listing(features)}), or set attack.label=prediction."
        )
    return found
