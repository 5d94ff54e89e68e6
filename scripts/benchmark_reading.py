"""Measure how fast a dataset is read for training, beside the ways that its user would otherwise take.

    fgsm generate cifar10.yaml --output out/images
    fgsm generate cifar10.yaml --output out/signs --set output.layout=signs
    fgsm generate cifar10.yaml --output out/bits --set output.layout=signs --set output.sign_format=bits
    python scripts/benchmark_reading.py out/images out/signs out/bits --json reading.json

Every reader gives an epoch of uint8 tensors and labels, in random order, through an ordinary DataLoader:

- `images`, `signs` and `bits`: `pipeline.training_dataset` of either layout; at the one epsilon that the others read
  too, where signs must decode two pictures for every image, or one with bits beside it, and mixed: half clean, half at
  any recorded epsilon;
- `datasets`: plain `datasets`, map-style, with a transform to tensors;
- `streaming`: its streaming mode, with a shuffle buffer;
- `image folder`: torchvision's ImageFolder of the same encoded images in files of their own.

Rates are those from the first batch to the last, medians over rounds that each begin with another reader. What came
before is the start, of the epoch and of the workers; what comes after counts for nothing (a shuffled stream of
`datasets` 5.2 sleeps for five seconds at its end). `others` is how many cores the machine spent on something else
meanwhile: rates count on an idle machine only. Rows per core-second, over all processes of a reader and the whole
epoch, suffer less from that.
"""

import json
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from benchmark import busy_cores, machine, steady, table
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from pipeline import training_dataset
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.variants import Variant
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import require_manifest

# Images that the streaming mode shuffles among.
SHUFFLE_BUFFER = 1_000
OURS = "training_dataset"

Row = dict[str, Any]
# A loader for an epoch, from its number, and the number of workers.
Open = Callable[[int, int], Iterable[Any]]


@dataclass(frozen=True)
class Epoch:
    """One epoch of one reader."""

    rows: int
    rows_per_s: float
    rows_per_core_s: float
    start_s: float
    others_cores: float


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) uint8."""
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def rows_to_tensors(rows: Mapping[str, Any]) -> dict[str, Any]:
    """A transform of `datasets`, of several rows at once."""
    return {"image": [to_tensor(image) for image in rows["image"]], "label": rows["label"]}


def row_to_tensors(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of one row of a stream."""
    return {"image": to_tensor(row["image"]), "label": row["label"]}


def readers(
    images: Path, signs: Sequence[Path], split: str, variant: Variant, files: Path, batch_size: int
) -> dict[str, Open]:
    """All readers, by name.

    Args:
        images: an output of layout images.
        signs: outputs of layout signs, of the same source images.
        split: what is read of them.
        variant: what all read.
        files: a folder of class folders with the same images.
        batch_size: rows of a batch.
    """
    epsilon = f"{variant.level}/255"
    stored = datasets.load_dataset(str(images), variant.subset, split=split).select_columns(["image", "label"])
    mapped = stored.with_transform(rows_to_tensors)
    streamed = datasets.load_dataset(str(images), variant.subset, split=split, streaming=True)
    streamed = streamed.select_columns(["image", "label"])
    folder = ImageFolder(str(files), transform=to_tensor)
    ours = {}
    for path in (images, *signs):
        ours[f"{OURS}, {path.name}, at {epsilon}"] = training_dataset(path, split, epsilons=[epsilon], clean=0)
        ours[f"{OURS}, {path.name}, mixed"] = training_dataset(path, split)

    def open_ours(name: str, epoch: int, workers: int) -> Iterable[Any]:
        ours[name].set_epoch(epoch)
        return DataLoader(ours[name], batch_size, num_workers=workers)

    def open_map_style(data: Any, epoch: int, workers: int) -> Iterable[Any]:
        order = torch.Generator().manual_seed(epoch)
        return DataLoader(data, batch_size, shuffle=True, generator=order, num_workers=workers)

    def open_stream(epoch: int, workers: int) -> Iterable[Any]:
        shuffled = streamed.shuffle(seed=epoch, buffer_size=SHUFFLE_BUFFER).map(row_to_tensors)
        return DataLoader(shuffled, batch_size, num_workers=workers)

    return {
        **{name: partial(open_ours, name) for name in ours},
        "datasets": partial(open_map_style, mapped),
        "datasets, streaming": open_stream,
        "image folder": partial(open_map_style, folder),
    }


def write_files(images: Path, split: str, subset: str, folder: Path) -> int:
    """The encoded images of one subset as an image folder; how many there are."""
    count = 0
    for file in sorted((images / subset).glob(f"{split}-*.parquet")):
        table = pq.ParquetFile(file).read(columns=["image.bytes", "label"])
        labels = table.column("label").to_pylist()
        for image, label in zip(table.column("image").to_pylist(), labels, strict=True):
            data = image["bytes"]
            suffix = "webp" if data[:4] == b"RIFF" else "png"
            path = folder / f"{label:05d}" / f"{count:08d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            count += 1
    return count


def measure(open_epoch: Callable[[], Iterable[Any]]) -> Epoch:
    """Read an epoch through a loader; the rate is that from the first batch to the last.

    Raises:
        PipelineError: there is one batch only.
    """
    (total_before, _), own_before = busy_cores(), _own_seconds()
    launched = time.perf_counter()
    marks, rows = [], 0
    for batch in open_epoch():
        rows += len(batch["label"] if isinstance(batch, dict) else batch[1])
        marks.append((time.perf_counter(), rows))
    over = time.perf_counter()
    if len(marks) < 2:
        raise PipelineError("A rate needs at least two batches; lower --batch-size.")
    rate, start = steady(marks, launched)
    own = _own_seconds() - own_before
    others = busy_cores()[0] - total_before - own
    return Epoch(rows, rate, rows / own, start, max(0.0, others / (over - launched)))


def _own_seconds() -> float:
    """Seconds of a core that this process and its ended workers took."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def summarise(name: str, workers: int, epochs: Sequence[Epoch]) -> Row:
    """The rounds of a reader in one row of the JSON file."""
    rates = [epoch.rows_per_s for epoch in epochs]
    return {
        "reader": name,
        "workers": workers,
        "rows_per_s": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "rows_per_core_s": statistics.median(epoch.rows_per_core_s for epoch in epochs),
        "start_s": statistics.median(epoch.start_s for epoch in epochs),
        "others_cores": statistics.median(epoch.others_cores for epoch in epochs),
        "rounds": [asdict(epoch) for epoch in epochs],
    }


def compare(rows: Sequence[Row]) -> list[Row]:
    """Add to each row of ours its ratio to the fastest of the others with as many workers, and to plain `datasets`."""
    compared = []
    for row in rows:
        if row["reader"].startswith(OURS):
            others = {
                other["reader"]: other["rows_per_s"]
                for other in rows
                if other["workers"] == row["workers"] and not other["reader"].startswith(OURS)
            }
            row = row | {
                "x_fastest": row["rows_per_s"] / max(others.values()),
                "x_datasets": row["rows_per_s"] / others["datasets"],
            }
        compared.append(row)
    return compared


def describe(rows: Sequence[Row]) -> str:
    """The table, for a person."""
    header = [
        "reader",
        "workers",
        "rows/s",
        "min..max",
        "x fastest other",
        "x datasets",
        "rows/core-s",
        "start",
        "others",
    ]
    lines = []
    for row in rows:
        line = [row["reader"], str(row["workers"]), f"{row['rows_per_s']:,.0f}"]
        line += [f"{row['slowest']:,.0f}..{row['fastest']:,.0f}"]
        line += [f"{row[ratio]:.2f}" if ratio in row else "-" for ratio in ("x_fastest", "x_datasets")]
        line += [f"{row['rows_per_core_s']:,.0f}", f"{row['start_s']:.2f} s", f"{row['others_cores']:.1f} cores"]
        lines.append(line)
    return table(header, lines)


def main(
    images: Annotated[Path, typer.Argument(help="An output of layout images.")],
    signs: Annotated[list[Path], typer.Argument(help="Outputs of layout signs of the same source images.")],
    split: Annotated[str, typer.Option(help="What is read of them.")] = "test",
    workers: Annotated[list[int] | None, typer.Option(help="Of the DataLoader (default: 0 and 2).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Epochs of each reader.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Read the same images in every way, in one run."""
    datasets.disable_progress_bars()
    try:
        manifest = require_manifest(OutputFolder(images))
        if manifest.resolved.output.layout != "images":
            raise ConfigError(f"{images} is not of layout images; name that one first.")
        variant = manifest.variants[-1]
        with tempfile.TemporaryDirectory(prefix="fgsm-reading-") as scratch:
            datasets.config.HF_DATASETS_CACHE = Path(scratch, "datasets")
            count = write_files(images, split, variant.subset, Path(scratch, "files"))
            opened = readers(images, signs, split, variant, Path(scratch, "files"), batch_size)
            cases = [(name, number) for number in (workers or [0, 2]) for name in opened]
            known: dict[tuple[str, int], list[Epoch]] = {case: [] for case in cases}
            for turn in range(rounds):
                start = turn % len(cases)
                for name, number in [*cases[start:], *cases[:start]]:
                    epoch = measure(partial(opened[name], turn, number))
                    if epoch.rows != count:
                        raise PipelineError(f"{name} gave {epoch.rows:,} rows, and there are {count:,}.")
                    known[name, number].append(epoch)
                    typer.echo(f"round {turn + 1}: {name}, {number} workers: {epoch.rows_per_s:,.0f} rows/s", err=True)
    except PipelineError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    rows = compare([summarise(name, number, epochs) for (name, number), epochs in known.items()])
    title = f"{count:,} images of shape {'x'.join(map(str, manifest.shape))}, batch {batch_size}, rounds: {rounds}"
    typer.echo(f"{title}\n\n{describe(rows)}")
    if json_path is not None:
        report = {"command": shlex.join(sys.argv), "machine": machine(), "title": title, "readers": rows}
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
