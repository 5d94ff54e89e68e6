"""`fgsm inspect`: what a dataset holds, as a table, from the counts alone: no file is opened."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.redaction import printable
from pipeline.output.folder import OutputFolder, split_of
from pipeline.output.manifest import Manifest, Subset, current_manifest
from pipeline.output.transfer import Transfer, by_epsilon

HEAD = ("split", "subset", "epsilon", "rows", "accuracy", "confidence", "fooled", "size")


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
    lines = _aligned([HEAD, *map(_cells, manifest.subsets)])
    if len(manifest.spaces) > 1 and (matrix := by_epsilon(manifest.transfer)):
        head = ("split", "images of", "epsilon", *(f"{name}: right, lost" for name in manifest.spaces))
        lines += ["", "Transfer: what each model gets right, and what it loses of what it gets right when clean"]
        lines += _aligned([head, *map(_transfer_cells, matrix)])
    return "\n".join([*lines, "", *_notes(manifest)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, the first three to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{'<' if index < 3 else '>'}{width}}}" for index, width in enumerate(widths))
    return [line.format(*row).rstrip() for row in rows]


def _transfer_cells(row: Sequence[Transfer]) -> tuple[str, ...]:
    first = row[0]
    made = f"{first.attack} on {first.model}" if first.model else first.attack
    answers = (f"{_percent(cell.accuracy)}, {_percent(cell.share_lost)}" for cell in row)
    return (first.split, made, f"{first.level}/255", *answers)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


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
        f"not moved: {_unmoved(manifest)} of the pixel values",
    ]
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


def _unmoved(manifest: Manifest) -> str:
    """The share of pixel values that each attack leaves as they are: at one epsilon if that is the same at each."""
    shares = {variant: f"{share:.2%}" for variant, share in manifest.zero_shares().items()}
    if len(set(shares.values())) == 1:
        return next(iter(shares.values()))
    return ", ".join(f"{share} ({variant.subset})" for variant, share in shares.items())


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
