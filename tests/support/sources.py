"""Sources of all kinds: made, opened, and all their rows."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import ConfigError
from pipeline.core.images import Opener
from pipeline.core.plan import Plan, make_plan, stream_plan
from pipeline.engine.decode import read_image
from pipeline.sources.base import Source
from pipeline.sources.registry import open_source
from tests.conftest import CLASSES, png_bytes
from tests.support.configs import section


def plan_for(source: Source, *, most: int = 1000, batch_size: int = 100) -> Plan:
    """A plan over its rows in their own order."""
    if files := source.files(most):
        return stream_plan(files, batch_size=batch_size)
    counts = {split: rows or 0 for split, rows in source.splits.items()}
    return make_plan(counts, shuffle=False, seed=0, limit=None, images_per_shard=most, batch_size=batch_size)


def tables_of(source: Source) -> dict[str, pa.Table]:
    """The rows of each split."""
    tables: dict[str, list[pa.Table]] = {split: [] for split in source.splits}
    plan = plan_for(source)
    for shard, table, _ in source.tables(plan, plan.shards):
        tables[shard.split].append(table.rename_columns(["image", "label", *source.kept]))
    return {split: pa.concat_tables(own) for split, own in tables.items()}


def openers_of(source: Source, split: str) -> list[Opener]:
    """What opens the image of each row."""
    return [partial(source.open, cell) for cell in tables_of(source)[split]["image"].to_pylist()]


def first_values(source: Source, split: str) -> list[int]:
    """The first pixel's first value of every row."""
    cells = tables_of(source)[split]["image"].to_pylist()
    return [int(read_image(partial(source.open, cell), PreprocessConfig(), 10**6)[0, 0, 0]) for cell in cells]


INT, TEXT = datasets.Value("int64"), datasets.Value("string")


def shade(value: int, side: int = 4) -> bytes:
    """A PNG whose pixels all have this value."""
    return png_bytes(np.full((side, side, 3), value, np.uint8))


SHADES = [shade(10 * row) for row in range(6)]
LABELS = [0, 1, 2, 2, 1, 0]


def open_kind(kind: Any, path: str | Path | None = None, *, need_labels: bool = True, **keys: Any) -> Source:
    config = section("source", kind=kind, **({} if path is None else {"path": str(path)}), **keys)
    return open_source(config, need_labels=need_labels)


hub = partial(open_kind, "huggingface")
folders = partial(open_kind, "imagefolder")
vision = partial(open_kind, "torchvision")


def refuse(opening: Callable[[], Source], sentence: str) -> None:
    """Opening fails with one sentence that matches."""
    with pytest.raises(ConfigError, match=sentence) as error:
        opening()
    assert "\n" not in str(error.value)


def labels(source: Source) -> dict[str, list[int]]:
    return {split: own.tolist() for split, own in source.labels.items()}


def write_folders(root: Path, images: dict[str, Sequence[int]], suffix: str = ".png") -> Path:
    """A class folder for each name, with an image of each shade."""
    for name, values in images.items():
        (root / name).mkdir(parents=True)
        for index, value in enumerate(values):
            Image.new("RGB", (4, 4), (value, 0, 0)).save(root / name / f"{index}{suffix}")
    return root


def names(source: Source) -> dict[str, list[str | None]]:
    """The file of every row."""
    return {
        split: [source.name_of(cell) for cell in table["image"].to_pylist()]
        for split, table in tables_of(source).items()
    }


def left_out(source: Source) -> list[tuple[int, tuple[str, ...]]]:
    return [(kind.count, kind.first) for kind in source.left_out]


def put_image(path: Path, kind: str | None = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, kind)


def write_rows(
    folder: Path, features: dict[str, Any], rows: dict[str, Sequence[Any]], name: str = "train-00000-of-00001.parquet"
) -> Path:
    """A Parquet file as the Hub holds it, cell by cell: `datasets` itself would embed files that a path names."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=datasets.Features(features).arrow_schema), folder / name)
    return folder


def pets(values: Sequence[int] = LABELS, names: Sequence[str] = CLASSES) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [{"bytes": SHADES[row], "path": None} for row in range(len(values))]
    return datasets.Dataset.from_dict({"image": images, "label": list(values)}, features=features)


CELLS = [{"bytes": data, "path": None} for data in SHADES]
MIXED: dict[str, tuple[Any, Sequence[Any]]] = {
    "image": (datasets.Image(), CELLS),
    "depth": (datasets.Image(), CELLS[::-1]),
    "cell": ({"bytes": datasets.Value("binary"), "path": TEXT}, CELLS),
    "data": (datasets.Value("binary"), SHADES),
    "large": (datasets.Value("large_binary"), SHADES),
    "label": (datasets.ClassLabel(names=list(CLASSES)), LABELS),
    "coarse": (datasets.ClassLabel(names=["fish", "mammal"]), [1, 1, 0, 0, 1, 1]),
    "number": (datasets.Value("uint8"), [3, 0, 1, 2, 4, 200]),
    "name": (TEXT, ["dog", "cat", "cat", "eel", "dog", "dog"]),
    "long_name": (datasets.Value("large_string"), ["dog", "cat", "cat", "eel", "dog", "dog"]),
    "score": (datasets.Value("float32"), [0.5, 1, 2, 3, 4, 5]),
    "flag": (datasets.Value("bool"), [True, False] * 3),
    "holes": (INT, [0, None, 2, -1, 1, 0]),
    "name_holes": (TEXT, ["dog", None, "cat", "cat", "dog", None]),
    "below": (INT, [0, 1, -2, 0, 0, 0]),
    "class_holes": (datasets.ClassLabel(names=list(CLASSES)), [0, -1, None, 2, 1, 0]),
}


def write_columns(folder: Path, *names: str) -> Path:
    """A dataset with these columns of the table above."""
    return write_rows(folder, {name: MIXED[name][0] for name in names}, {name: MIXED[name][1] for name in names})
