"""`fgsm inspect`: what a dataset holds, as a table, from the counts alone: no file is opened."""

import itertools
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.redaction import printable
from pipeline.output.folder import OutputFolder, split_of
from pipeline.output.manifest import Manifest, Subset, current_manifest
from pipeline.output.transfer import Transfer, by_epsilon, few_right

# Of a terminal.
WIDTH = 80
HEAD = ("split", "subset", "epsilon", "rows", "accuracy", "confidence", "fooled", "size")
SHORT = {"accuracy": "acc.", "confidence": "conf."}


def inspect(path: str | Path) -> str:
    """The table of a dataset.

    Raises:
        ConfigError: there is none in the folder.
    """
    return summary_table(current_manifest(OutputFolder(path)))


def summary_table(manifest: Manifest) -> str:
    """Per split and variant: rows, accuracy, mean confidence, fooled rows and bytes.

    Accuracy is over labelled rows; `fooled` counts rows predicted right when clean and wrong now, or, in a
    targeted run, predicted as the target. Several models have the transfer matrix: of each, the accuracy on the images,
    and of those that it gets right when clean the share that it loses.
    """
    lines = _subset_table(manifest.subsets)
    if len(manifest.spaces) > 1 and (matrix := by_epsilon(manifest.transfer)):
        lines += [
            "",
            "Transfer, in percent: what each model gets right, and what it loses of what",
            "it gets right when clean",
        ]
        for (split, level), rows in itertools.groupby(matrix, _split_and_level):
            lines += ["", *_transfer_block(f"{split} {level}/255", list(rows))]
    return "\n".join([*lines, "", *_notes(manifest)])


def _subset_table(subsets: Sequence[Subset]) -> list[str]:
    """A line for each variant of each split. A column without a value is left out.

    Where lines would be longer than WIDTH, so is `epsilon`, in which the names of subsets end; if that is not enough,
    the columns stand closer under shorter heads.
    """
    columns = {
        head: [head, *cells]
        for head, *cells in zip(HEAD, *map(_cells, subsets), strict=True)
        if not cells or set(cells) != {"-"}
    }
    lines = _aligned([*zip(*columns.values(), strict=True)], 3)
    if len(lines[0]) > WIDTH:
        del columns["epsilon"]
        lines = _aligned([*zip(*columns.values(), strict=True)], 2)
    if len(lines[0]) > WIDTH:
        closer = [[SHORT.get(head, head), *cells] for head, *cells in columns.values()]
        lines = _aligned([*zip(*closer, strict=True)], 2, gap=1)
    return lines


def _aligned(rows: Sequence[Sequence[str]], left: int, gap: int = 2) -> list[str]:
    """Lines of columns, the first ones to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = (gap * " ").join(f"{{:{'<' if index < left else '>'}{width}}}" for index, width in enumerate(widths))
    return [line.format(*row).rstrip() for row in rows]


def _split_and_level(row: Sequence[Transfer]) -> tuple[str, int]:
    return row[0].split, row[0].level


def _transfer_block(title: str, rows: Sequence[Sequence[Transfer]]) -> list[str]:
    """The matrix at one epsilon: a line for each attack on each model, a column for each model that looks.

    Where the columns do not fit on a line, the rest of them stands below.
    """
    made = [row[0].maker for row in rows]
    columns = [
        [cells[0].looking, *(f"{_percent(cell.accuracy)}, {_percent(cell.share_lost)}" for cell in cells)]
        for cells in zip(*rows, strict=True)
    ]
    lines, shown = [], [[title, *made]]
    for column in columns:
        if len(shown) > 1 and len(_aligned([*zip(*shown, column, strict=True)], 1)[0]) > WIDTH:
            lines += _aligned([*zip(*shown, strict=True)], 1)
            shown = shown[:1]
        shown.append(column)
    return lines + _aligned([*zip(*shown, strict=True)], 1)


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
        textwrap.fill(f"not moved of the pixel values: {', '.join(manifest.unmoved())}", WIDTH),
    ]
    if len(manifest.spaces) > 1:
        notes.append(f"The model that was attacked looks at its images; {next(iter(manifest.spaces))} at all others.")
        notes += few_right(manifest.transfer)
    if warning := manifest.zero_gradient_warning:
        notes.append(f"WARNING: {warning}")
    if any(subset.bytes is None for subset in manifest.subsets):
        notes.append(f"files: {_split_sizes(manifest)}")
    notes += [printable(f"left out of the source: {left_out}") for left_out in manifest.left_out]
    for row in manifest.skipped[:5]:
        file = f" ({row.file})" if row.file else ""
        notes.append(printable(f"skipped: {row.source_file or row.split} row {row.source_index}{file}: {row.reason}"))
    notes += [printable(f"left out of tars: {part}") for part in manifest.members_left_out]
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
