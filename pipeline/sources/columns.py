"""Columns: which of a table's are image, label and kept, and whether files agree on what they mean."""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError, shortened
from pipeline.sources.base import Labels
from pipeline.sources.huggingface import HuggingFaceConfig


@dataclass(frozen=True)
class Fields:
    """Which columns of a file, or fields of a sample, become what; `image` is None for any image of a tar."""

    image: str | None
    label: str | None
    kept: tuple[str, ...]


def find_columns(
    schemas: Mapping[str, pa.Schema], stated: Mapping[str, Any] | None, config: HuggingFaceConfig, need_labels: bool
) -> tuple[Fields, dict[str, Any]]:
    """The columns of a dataset's files or splits that are used, and their features of `datasets`.

    Args:
        schemas: of the files or splits, by their names.
        stated: the features that the dataset's card states, if it does.
        config: the `source` section.
        need_labels: whether a dataset without a label column is an error.

    Raises:
        ConfigError: a column is not there, does not mean the same in all files, or holds no labels.
    """
    import datasets

    features = {**column_features(next(iter(schemas.values()))), **(stated or {})}
    listing = f"the columns are {', '.join(features)}"
    image = _column_of("image_column", config.image_column, features, datasets.Image)
    if image is None:
        raise ConfigError(f"source.image_column: no column holds images; {listing}.")
    label = _column_of("label_column", config.label_column, features, datasets.ClassLabel)
    if label is None and need_labels:
        raise ConfigError(
            f"source.label_column: no column is a ClassLabel; name one of integers or strings ({listing}), or set "
            "attack.label=prediction."
        )
    for name in config.keep_columns:
        _column_of("keep_columns", name, features, None)
    fields = Fields(image, label, config.keep_columns)
    features = {name: features[name] for name in (image, *([label] if label else []), *fields.kept)}
    _check_types(schemas, features, stated or {}, fields)
    return fields, features


def _check_types(
    schemas: Mapping[str, pa.Schema], features: Mapping[str, Any], stated: Mapping[str, Any], fields: Fields
) -> None:
    """Refuse columns that do not mean the same in each file (a number would be another class), or do not hold images or
    labels."""
    for name, feature in features.items():
        if isinstance(feature, pa.DataType):
            raise ConfigError(f"source: column {name} holds {feature}, of which `datasets` has no type.")
    first = next(iter(schemas))
    for file, other in schemas.items():
        own = column_features(other, features)
        for name in features:
            role = "image" if name == fields.image else "label" if name == fields.label else "kept"
            expected, here = (_meaning(features.get(name), role), _meaning(own.get(name), role))
            # A card may give a meaning to what files hold; but no other one than they state themselves.
            by_card = name in stated and not here.startswith((CLASSES_OF, MISSING))
            if expected != here and not by_card:
                raise ConfigError(
                    f"source: column {name} holds {shortened(here)} in {file} and {shortened(expected)} in "
                    f"{'the card' if name in stated else first}; files and splits of a dataset must agree, so write "
                    "one of them again, or read them as two datasets."
                )
        kind = plain_type(other.field(fields.label).type) if fields.label else pa.int64()
        if not (is_text(kind) or pa.types.is_integer(kind)):
            raise ConfigError(f"source.label_column: {fields.label} holds {kind}; labels are integers or strings.")


def classes_of(feature: Any) -> Sequence[str] | None:
    """The class names that a column's feature states."""
    import datasets

    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def label_indices(
    column: pa.ChunkedArray, classes: Sequence[str] | None, where: str, kind: type[PipelineError]
) -> Labels:
    """Integers or texts as labels, (N,) int64 with -1 for null; an error of that kind for a text that is no class."""
    if is_text(column.type):
        indices = pc.index_in(column, pa.array(classes or (), column.type))
        unknown = column.filter(pc.and_(pc.is_null(indices), pc.is_valid(column)))
        if len(unknown):
            raise kind(f"source.classes: the label {unknown[0].as_py()!r} in {where} is not among them.")
        column = indices
    return pc.fill_null(column.cast(pa.int64()), UNLABELLED).to_numpy()  # type: ignore[no-any-return]


def cast_kept(table: pa.Table, features: Mapping[str, Any]) -> pa.Table:
    """Carried-through columns in the types of their features: texts may be large in one file and not in another."""
    import datasets
    from datasets.table import table_cast

    return table_cast(table, datasets.Features(features).arrow_schema).replace_schema_metadata(None)


def column_features(schema: pa.Schema, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The features of `datasets` that some columns have, all by default; of a type without one, the type itself."""
    import datasets

    told: dict[str, Any] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError):
        told = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    features: dict[str, Any] = {}
    for name in schema.names if names is None else names:
        if (index := schema.get_field_index(name)) < 0:
            continue  # not there, or there twice
        kind = plain_type(schema.field(index).type)
        metadata = {"huggingface": json.dumps({"info": {"features": {name: told.get(name)}}})}
        features[name] = kind
        # What the metadata says may be of a version to come: then the type alone tells.
        for known in (metadata, None) if told.get(name) else (None,):
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
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _column_of(key: str, named: str | None, features: Mapping[str, Any], kind: Any) -> str | None:
    """The column that a key of the config names, else the only one of that kind, None where there is none."""
    if named is not None:
        if named not in features:
            raise ConfigError(f"source.{key}: there is no column {named}; the columns are {', '.join(features)}.")
        return named
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise ConfigError(f"source.{key}: there are several {kind.__name__} columns ({', '.join(found)}); name one.")
    return found[0] if found else None
