"""Origins: what is known of the dataset behind a run, for the card: its name, its revision, its licence, and what of
its files was left out.

None of it decides a byte, so none of it is part of the run id. What is not known stays None, and the card says so.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from pipeline.config.schema import MOST_NODES, BoundedLoader


class Origin(BaseModel):
    """The dataset that the images come from.

    `repository` is its id on the Hub and `revision` the commit that was read; `license` is stated as the source
    states it; `credit` names whom to thank, in plain words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    repository: str | None = None
    revision: str | None = None
    license: str | None = None
    credit: str | None = None


UNKNOWN = Origin()
DIGITS = Origin(
    name="Optical Recognition of Handwritten Digits",
    license="cc-by-4.0",
    credit="E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49; "
    "its test part as scikit-learn carries it, enlarged from 8x8 to 64x64 pixels",
)


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


class _CardLoader(BoundedLoader):
    """With room for the names of a hundred thousand classes in each of several columns."""

    most_nodes = 10 * MOST_NODES


def front_matter(card: bytes) -> dict[str, Any] | None:
    """The YAML at the head of a card; None where there is none that can be read."""
    try:
        head: Any = next(iter(yaml.load_all(card.decode(), _CardLoader)))  # a SafeLoader
    except (ValueError, RecursionError, yaml.YAMLError, StopIteration):  # a date that is none is a ValueError
        return None
    return head if isinstance(head, dict) else None
