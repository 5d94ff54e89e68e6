"""What comes with an image on request, the same from every layout, for every reader."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import pipeline
from pipeline.core.errors import ConfigError
from pipeline.read import stream
from pipeline.read.dataset import TrainingDataset
from tests.conftest import LAYOUTS
from tests.support.ranks import read_in_two_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.15
]

ROWS = 40
COLUMNS = ("source_index", "label", "epsilon", "fooled", "model", "attack")


def opened(folder: Path, **options: Any) -> TrainingDataset:
    return pipeline.training_dataset(folder, "test", **options)


def plain(read: Iterable[Any]) -> list[tuple[Any, ...]]:
    """What a loader gave, row by row, with the image's bytes."""
    rows = []
    for images, *columns in read:
        values = [column.tolist() if isinstance(column, torch.Tensor) else column for column in columns]
        rows += list(zip((image.numpy().tobytes() for image in images), *values, strict=True))
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("only", [None, "fooled"])
def test_columns_are_those_of_the_very_image(
    several: Path, layout: str, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)
    stored = {}
    for row in pipeline.load(several / layout, split="test").with_format("numpy"):
        key = np.ascontiguousarray(row["image"].transpose(2, 0, 1)).tobytes()
        made = row["attack"] or "", row["model"] or ""
        stored[key, int(row["source_index"]), *made] = int(row["label"]), float(row["epsilon"]), bool(row["fooled"])
    data = opened(several / layout, columns=COLUMNS, clean=0.2, only=only)
    assert data.columns == COLUMNS
    images, *columns = next(iter(DataLoader(data, batch_size=ROWS)))
    assert images.dtype == torch.uint8
    assert [column.dtype for column in columns[:4]] == [torch.int64, torch.int64, torch.float64, torch.bool]
    data.set_epoch(0)
    rows = plain(DataLoader(data, batch_size=7))
    assert sorted(row[1] for row in rows) == list(range(ROWS))
    for image, index, label, epsilon, fooled, model, attack in rows:
        there = stored[image, index, attack, model]
        assert (label, fooled) == (there[0], there[2])
        assert epsilon == pytest.approx(there[1])
    assert {row[6] for row in rows} >= {"", "fgsm"}
    # They change nothing of what is drawn.
    assert [row[0] for row in rows] == [
        row[0] for row in plain(DataLoader(opened(several / layout, clean=0.2, only=only)))
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_states_give_the_same_columns(
    several: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)
    folder = several / "wide"
    alone = plain(DataLoader(opened(folder, columns=COLUMNS), batch_size=8))
    union = read_in_two_ranks(partial(opened, folder), plain, workers, columns=COLUMNS)
    assert sorted(union) == sorted(alone)


def test_a_file_is_opened_once_for_all_columns_of_a_piece(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Counter[Path] = Counter()
    data, real = opened(several / "images", columns=COLUMNS), pq.ParquetFile

    def counting(path: Path, **options: Any) -> Any:
        found[path] += 1
        return real(path, **options)

    monkeypatch.setattr(pq, "ParquetFile", counting)
    list(data)
    pieces = Counter(piece.file for piece in data.streams[0].shards.pieces)
    assert found
    assert all(count <= pieces[path.name] for path, count in found.items())


def test_a_state_fits_other_columns(several: Path) -> None:
    data = opened(several / "signs", columns=["attack"])
    before = list(islice(data, 10))
    other = opened(several / "signs")
    other.load_state_dict(data.state_dict())
    assert len(before) + len(list(other)) == ROWS


@pytest.mark.parametrize(
    "options",
    [
        {"columns": ["label", "prediction"]},
        {"columns": "label"},
        {"columns": []},
        {"columns": ["fooled"], "epsilons": ["3/255"], "attacks": ["fgsm"]},
    ],
    ids=str,
)
def test_columns_that_cannot_be_are_one_sentence(several: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^columns: .*\.$"):
        opened(several / "signs", **options)


def test_what_is_not_shown_need_not_be_recorded(several: Path) -> None:
    data = opened(several / "signs", columns=["fooled", "epsilon"], epsilons=["3/255"], attacks=["fgsm"], clean=1)
    assert {tuple(row[1:]) for row in data} == {(False, 0.0)}
