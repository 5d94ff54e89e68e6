"""Origins: what is known of the dataset behind a run, for the card: its name, its revision, its licence, and what of
its files was left out.

None of it decides a byte, so none of it is part of the run id. What is not known stays None, and the card says so.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import MOST_NODES, BoundedLoader

# Names of files that are kept for each reason to leave files out.
FIRST_NAMES = 5


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


class LeftOut(BaseModel):
    """What of a source is no row of it, for one reason: how many files, folders or members of a tar, and the first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str
    count: int = Field(ge=1, lt=2**63)
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return f"{self.reason} ({self.count:,}): {', '.join(self.first)}{f' and {more:,} more' if more > 0 else ''}"


class Tally:
    """Counts what is left out of a source."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._first: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        self._counts[reason] += 1
        if len(self._first[reason]) < FIRST_NAMES:
            self._first[reason].append(name)

    def left_out(self) -> tuple[LeftOut, ...]:
        """What was counted, in the order in which reasons came up."""
        return tuple(
            LeftOut(reason=reason, count=count, first=tuple(self._first[reason]))
            for reason, count in self._counts.items()
        )


def sum_left_out(parts: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """What several parts of a source leave out, by reason, with as many names as one of them may have."""
    counts: defaultdict[str, int] = defaultdict(int)
    first: defaultdict[str, list[str]] = defaultdict(list)
    for part in parts:
        counts[part.reason] += part.count
        first[part.reason] += part.first[: FIRST_NAMES - len(first[part.reason])]
    return tuple(LeftOut(reason=why, count=count, first=tuple(first[why])) for why, count in counts.items())


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
