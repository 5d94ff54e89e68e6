"""Origins: what the files of a dataset say of where it comes from: its revision on the Hub, the licence in its card."""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import BoundedLoader


def revision_of(cached: Iterable[Mapping[str, str]]) -> str | None:
    """The commit of a dataset of the Hub, which `datasets` keeps its Arrow files under; None where there is none."""
    for file in cached:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", folder):
            return folder
    return None


def card_license(card: Path) -> str | None:
    """The licence in the YAML of a dataset card; None where there is no card or it names none."""
    try:
        front = front_matter(card.read_bytes())
    except OSError:
        return None
    stated = front.get("license") if front else None
    names = stated if isinstance(stated, list) else [stated]
    return ", ".join(name for name in names if isinstance(name, str)) or None


@functools.lru_cache(maxsize=4)
def front_matter(card: bytes) -> dict[str, Any] | None:
    """The YAML at the head of a card; None where there is none that can be read. Not to be changed: it is kept."""
    try:
        head: Any = next(iter(yaml.load_all(card.decode(), BoundedLoader)))  # a SafeLoader
    except (ValueError, RecursionError, yaml.YAMLError, StopIteration):  # a date that is none is a ValueError
        return None
    return head if isinstance(head, dict) else None
