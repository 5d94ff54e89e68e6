"""Findings: what verification saw, and how it is told."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.errors import listing
from pipeline.layouts.base import FILE

# Shards that cannot be read, after which the others are not tried: a store that fails takes half a minute for each.
MOST_UNREAD = 5
# Problems listed in full; the rest are counted.
LISTED = 20


@dataclass
class Findings:
    """What verification saw. `problems` are sentences; `damaged` names the shards to write again; `others` are files in
    the dataset's folders that are not of it, and that no reader takes for a part of it."""

    problems: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)
    missing: int = 0
    shards: int = 0
    rows: int = 0
    skipped: int = 0
    outside_ball: int = 0
    unread: int = 0
    recomputed: int = 0
    mismatches: int = 0
    near_ties: int = 0
    near_tie_signs: int = 0
    last_digits: int = 0
    changes: set[str] = field(default_factory=set)
    compared: int = 0

    def damage(self, shard: str, problem: str) -> None:
        self.damaged.add(shard)
        self.problems.append(problem)

    def cannot_read(self, shard: str, reason: str) -> None:
        self.unread += 1
        self.problems.append(
            f"{shard} cannot be read now ({reason.rstrip('.')}), so it was neither checked nor dropped; fix the disk, "
            "its permissions or the store, and verify again."
        )


class DamageError(Exception):
    """Ends the check of one shard; the message is the problem."""


class UnreadError(Exception):
    """Ends the check of one shard, of which nothing can be said; the message is the reason."""


def refuse_rows(name: str, wrong: NDArray[np.bool_], what: str, table: pa.Table) -> None:
    """Refuse the rows of a file where `wrong`, (M,) bool, says so; `what` names them in the plural.

    Raises:
        DamageError: there are some; it names the first.
    """
    if wrong.any():
        first = table.slice(int(wrong.argmax()), 1)
        file = f" of {first.column(FILE)[0]}" if FILE in table.column_names else ""
        row = f"row {first.column('source_index')[0]}{file}"
        raise DamageError(f"{name} has {int(wrong.sum())} {what}; the first is {row}.")


def column_of(table: pa.Table, name: str, null: Any) -> NDArray[Any]:
    """A column as NumPy, with a stand-in for null."""
    values: NDArray[Any] = table.column(name).fill_null(null).to_numpy()
    return values


def _environment(findings: Findings) -> str:
    """In what environment predictions were compared, and what that changed."""
    if findings.changes:
        where = f"another environment than the recorded one ({'; '.join(sorted(findings.changes))})"
    elif findings.last_digits or findings.near_ties or findings.near_tie_signs:
        where = "another environment than the recorded one, though all that is recorded of it is the same"
    else:
        return "the recorded environment, exactly"
    return (
        f"{where}: {findings.last_digits:,} confidences differ in their last digits, with {findings.near_ties:,} near "
        f"ties that fell otherwise, and {findings.near_tie_signs:,} signs of gradients that are rounding"
    )


def describe(findings: Findings, recompute: bool, source: bool = False) -> str:
    """What was checked, in a few lines."""
    lines = [
        f"{findings.shards:,} shards and {findings.rows:,} rows checked; {findings.skipped:,} source rows were skipped",
        f"{findings.outside_ball:,} images outside their epsilon ball",
    ]
    if recompute:
        lines.append(
            f"{findings.recomputed:,} predictions re-derived from the stored pixels, {findings.mismatches:,} differ; "
            f"compared in {_environment(findings)}"
        )
    if source:
        lines.append(f"{findings.compared:,} source rows compared with the source")
    if findings.unread:
        lines.append(f"{findings.unread:,} shards cannot be read now")
    if findings.others:
        lines.append(f"not of this dataset, and left alone: {listing(findings.others)}")
    lines.append(f"{len(findings.problems):,} problems in {len(findings.damaged):,} shards")
    return "\n".join(lines)


def as_values(findings: Findings) -> dict[str, Any]:
    """Findings as values for JSON, under their names."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in asdict(findings).items()}


def damage_report(findings: Findings) -> list[str]:
    """The problems as lines, the first ones in full."""
    rest = len(findings.problems) - LISTED
    return findings.problems[:LISTED] + ([f"and {rest} more."] if rest > 0 else [])
