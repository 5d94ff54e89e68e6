"""Sections of a config, made without the rest of it."""

from typing import Any

from pipeline.config.load import section_class


def section(key: str, **values: Any) -> Any:
    """The `source`, `model` or `attack`, of the kind that the values name."""
    return section_class(key, values)(**values)
