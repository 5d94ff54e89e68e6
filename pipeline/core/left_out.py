"""What of a source is not in the output: rows that cannot be decoded, and what is no row, counted by reason."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Names of files that are kept for each reason to leave files out.
FIRST_NAMES = 5


@dataclass(frozen=True)
class Skipped:
    """A source row that could not be decoded; `position` is its row in the shard, `file` the image's name."""

    # Receipts hold it.
    __pydantic_config__ = ConfigDict(extra="forbid")

    position: Annotated[int, Field(ge=0, lt=2**63)]
    source_index: Annotated[int, Field(ge=0, lt=2**63)]
    reason: str
    file: str | None = None


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
        self._counts: Counter[str] = Counter()
        self._first: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, *names: str, count: int = 1) -> None:
        """Count so many for a reason; `names` are the first of them."""
        self._counts[reason] += count
        self._first[reason] += names[: FIRST_NAMES - len(self._first[reason])]

    def left_out(self) -> tuple[LeftOut, ...]:
        """What was counted, in the order in which reasons came up."""
        return tuple(
            LeftOut(reason=reason, count=count, first=tuple(self._first[reason]))
            for reason, count in self._counts.items()
        )


def sum_left_out(parts: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """What several parts of a source leave out, by reason, with as many names as one of them may have."""
    tally = Tally()
    for part in parts:
        tally.add(part.reason, *part.first, count=part.count)
    return tally.left_out()
