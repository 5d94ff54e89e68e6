"""Streams many small images through a run and prints how much memory it takes on the way.

The source is written first: Parquet files of 8x8 images, as many as asked for. The run reads them as a stream; at every
quarter of the images the peak memory of the process is printed, which must not grow: the exit code is 1 where the last
is more than 5% above the first. At the end the time to list all receipts, and to find out that nothing is left to do.
"""

import argparse
import io
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import pipeline.flow
from pipeline.config.load import parse_config
from pipeline.engine.progress import Progress
from pipeline.flow import generate
from pipeline.output.folder import OutputFolder, read_receipts

FACTORY = """
from torch import nn


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
"""


def write_source(folder: Path, images: int, files: int) -> None:
    """Parquet files of random 8x8 images in three classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = images // files
    folder.mkdir(parents=True)
    for index in range(files):
        table = pa.table(
            {"image": list(random_cells(rows, index)), "label": [row % 3 for row in range(rows)]},
            schema=features.arrow_schema,
        )
        pq.write_table(table, folder / f"train-{index:05d}-of-{files:05d}.parquet", row_group_size=100)


def random_cells(count: int, seed: int) -> Iterator[dict[str, bytes | None]]:
    """Image cells as `datasets` stores them."""
    for pixels in np.random.RandomState(seed).randint(0, 256, (count, 8, 8, 3)).astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield {"bytes": buffer.getvalue(), "path": None}


class Watched(Progress):
    """Progress that prints the peak memory at every quarter, and keeps it in `peaks`, in MiB."""

    peaks: ClassVar[list[float]] = []

    def update(self, *counts: object) -> None:
        before = self.done
        super().update(*counts)  # type: ignore[arg-type]
        for quarter in range(1, 5):
            if before < quarter * images / 4 <= self.done:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                self.peaks.append(peak)
                print(f"{25 * quarter:3d}%  peak RSS {peak:7.1f} MiB  {self.rate:7.1f} images/s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=200)
    options = parser.parse_args()
    images = options.images
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_source(root / "source", images, options.files)
        (root / "victim.py").write_text(FACTORY)
        config = parse_config(
            {
                "source": {"kind": "huggingface", "path": str(root / "source"), "streaming": True},
                "model": {"kind": "factory", "name": f"{root}/victim.py:make"},
                "attack": {"epsilons": ["8/255"]},
                "output": {"path": str(root / "out")},
                "runtime": {"device": "cpu", "compile": False},
            }
        )
        pipeline.flow.Progress = Watched  # type: ignore[attr-defined]
        started = time.monotonic()
        manifest = generate(config)
        print(f"{manifest.rows:,} images in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        count = len(read_receipts(OutputFolder(root / "out"))[0])
        print(f"{count} receipts listed and read in {time.monotonic() - started:.2f} s")
        started = time.monotonic()
        generate(config)
        print(f"nothing left to do, found out in {time.monotonic() - started:.1f} s")
    first, *_, last = Watched.peaks
    if last > 1.05 * first:
        sys.exit(
            f"Memory grows: the peak was {first:.1f} MiB after a quarter of the images, and {last:.1f} MiB at the end."
        )
