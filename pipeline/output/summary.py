"""`fgsm inspect`: what a dataset holds, as a table, from the counts alone: no file is opened."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.console import BLUE, ORANGE, UNLIMITED, as_text, cell, html_cell, html_table, make_table
from pipeline.output.folder import OutputFolder, split_of
from pipeline.output.manifest import Manifest, Subset, current_manifest
from pipeline.output.transfer import Transfer, by_epsilon, few_right

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

HEAD = ("split", "subset", "epsilon", "rows", "accuracy", "confidence", "fooled", "size")
# What is said where a terminal is too narrow.
SHORT = {"accuracy": "acc.", "confidence": "conf."}
# Of the bars that show accuracy, where a terminal has room for them.
BAR = 10


@dataclass(frozen=True, repr=False)
class Summary:
    """What a dataset holds: printed as a table, drawn by rich, shown by a notebook. `path` is where it is, if known.

    Per split and variant: rows, accuracy, mean confidence, fooled rows and bytes. Accuracy is over labelled rows;
    `fooled` counts rows predicted right when clean and wrong now, or, in a targeted run, predicted as the target.
    Several models have the transfer matrix: of each, the accuracy on the images, and of those that it gets right when
    clean the share that it loses.
    """

    manifest: Manifest
    path: str | None = None

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the same in HTML, without the transfer matrix."""
        notes = "<br>".join(map(html_cell, _notes(self.manifest)))
        return f"{html_table(_columns(self.manifest.subsets))}<p>{notes}</p>"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["RenderableType"]:
        manifest = self.manifest
        yield _subset_table(manifest.subsets, console, options)
        if len(manifest.spaces) > 1 and (matrix := by_epsilon(manifest.transfer)):
            yield cell("")
            yield cell("Transfer, in percent: what each model gets right, and what it loses of what")
            yield cell("it gets right when clean")
            for (split, level), rows in itertools.groupby(matrix, lambda row: (row[0].split, row[0].level)):
                yield from _transfer_tables(f"{split} {level}/255", list(rows), options.max_width)
        yield cell("")
        yield from map(cell, _notes(manifest))


def inspect(path: str | Path) -> Summary:
    """The summary of a dataset.

    Raises:
        ConfigError: there is none in the folder.
    """
    return Summary(current_manifest(OutputFolder(path)), str(path))


def _subset_table(subsets: Sequence[Subset], console: "Console", options: "ConsoleOptions") -> "Table":
    """A line for each variant of each split; where there is room, with a bar that shows accuracy."""
    from rich.progress_bar import ProgressBar

    columns = _columns(subsets)
    styles = {"accuracy": BLUE, "acc.": BLUE, "fooled": ORANGE}
    table, wide = make_table(columns, 3, styles), options.update(max_width=UNLIMITED)
    natural = console.measure(table, options=wide).maximum
    if natural > options.max_width:  # names of subsets end in their epsilon
        columns = {SHORT.get(head, head): own for head, own in columns.items() if head != "epsilon"}
        table = make_table(columns, 2, styles)
        table.padding = (0, 1, 0, 0)
        return table
    if console.is_terminal and natural + BAR + 2 <= options.max_width and "accuracy" in columns:
        columns[""] = [
            ProgressBar(one.labelled, one.correct, BAR, style=ORANGE, complete_style=BLUE, finished_style=BLUE)
            if one.labelled
            else ""
            for one in subsets
        ]
    return make_table(columns, 3, styles)


def _columns(subsets: Sequence[Subset]) -> dict[str, Sequence[object]]:
    """The cells of the table by the heads of its columns; one without a value is left out."""
    cells = zip(*map(_cells, subsets), strict=True) if subsets else itertools.repeat(())
    return {head: own for head, own in zip(HEAD, cells, strict=False) if not own or set(own) != {"-"}}


def _transfer_tables(title: str, rows: Sequence[Sequence[Transfer]], width: int) -> Iterator["RenderableType"]:
    """The matrix at one epsilon: a line for each attack on each model, a column for each model that looks."""
    made = [row[0].maker for row in rows]
    columns = {asked[0].looking: [*map(_transfer_cell, asked)] for asked in zip(*rows, strict=True)}
    room = width - max(map(len, [title, *made]))
    fit = max(1, room // (2 + max(len("100.0, 100.0"), *map(len, columns))))
    yield cell("")
    for start in range(0, len(columns), fit):  # what does not fit beside the others stands below
        yield make_table({title: made, **dict(list(columns.items())[start : start + fit])})


def _transfer_cell(one: Transfer) -> "Text":
    # Bold is the model that was attacked, orange what loses half.
    style = "bold " * (one.looking == one.model) + ORANGE * ((one.share_lost or 0) >= 0.5)
    return cell(f"{_percent(one.accuracy)}, {_percent(one.share_lost)}", style.strip())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def inspect_json(path: str | Path) -> dict[str, Any]:
    """What `inspect` says, as values for JSON, under the manifest's names.

    Raises:
        ConfigError: there is no dataset in the folder.
    """
    manifest = current_manifest(OutputFolder(path))
    names = ("run_id", "complete", "rows", "skipped_rows", "dataset_classes", "subsets", "transfer", "versions")
    return manifest.model_dump(mode="json", include=set(names))


def _cells(subset: Subset) -> tuple[str, ...]:
    return (
        subset.split,
        subset.subset,
        f"{subset.level}/255" if subset.level else "0",
        f"{subset.rows:,}",
        f"{subset.correct / subset.labelled:.2%}" if subset.labelled else "-",
        f"{subset.confidence_sum / subset.rows:.3f}" if subset.rows else "-",
        f"{subset.fooled:,}" if subset.level else "-",
        "-" if subset.bytes is None else human_bytes(subset.bytes),
    )


def _notes(manifest: Manifest) -> list[str]:
    state = "complete" if manifest.complete else "INCOMPLETE: run generate again to finish it"
    notes = [
        f"run {manifest.run_id}, {state}; {manifest.rows:,} of {manifest.planned} source images, "
        f"{manifest.skipped_rows:,} skipped",
        f"pixel values that did not move: {', '.join(manifest.unmoved())}",
    ]
    if len(manifest.spaces) > 1:
        notes.append(
            f"Answers are those of the attacked model, and of {next(iter(manifest.spaces))} where none was attacked."
        )
        notes += few_right(manifest.transfer)
    if warning := manifest.zero_gradient_warning:
        notes.append(f"WARNING: {warning}")
    if any(subset.bytes is None for subset in manifest.subsets):
        notes.append(f"files: {_split_sizes(manifest)}")
    notes += [f"left out of the source: {left_out}" for left_out in manifest.left_out]
    for row in manifest.skipped[:5]:
        file = f" ({row.file})" if row.file else ""
        notes.append(f"skipped: {row.source_file or row.split} row {row.source_index}{file}: {row.reason}")
    notes += [f"left out of tars: {part}" for part in manifest.members_left_out]
    return notes


def _split_sizes(manifest: Manifest) -> str:
    """The size of each split's files, where those of the epsilons are the same."""
    sizes = Counter[str]()
    for file in manifest.files:
        sizes[split_of(file.path)] += file.bytes
    return ", ".join(f"{split} {human_bytes(sizes[split])}" for split in manifest.split_rows)


def human_bytes(count: float) -> str:
    """A size for people: 1.5 GB, powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
