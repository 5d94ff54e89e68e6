"""Several datasets read as one: each row once an epoch of its dataset, in the shares asked for, whoever reads."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline
from pipeline.core.errors import ConfigError
from pipeline.read import stream
from pipeline.read.dataset import TrainingDataset, counts_before
from tests.conftest import WriteConfig, generate_once, png_bytes, random_pixels, write_parquet

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.15
]

# Of `several` and of `finished`.
ROWS = (40, 11)
# Which of the two datasets a row is of, its row in the source, and the image's bytes.
Row = tuple[int, int, bytes]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)
    monkeypatch.setattr(stream, "BLOCK_VALUES", 4 * 3 * 16 * 16)


@pytest.fixture
def folders(several: Path, finished: Path) -> list[Path]:
    return [several / "wide", finished]


def opened(folders: Sequence[Path], **options: Any) -> TrainingDataset:
    """All images are attacked, so that the model tells the dataset."""
    return pipeline.training_dataset(
        folders, "test", clean=0, attacks="fgsm", columns=["model", "source_index"], **options
    )


def plain(read: Any) -> list[Row]:
    """What was read, from a dataset or a loader."""
    found = []
    for images, models, rows in read:
        items = zip(images, models, rows.tolist(), strict=True) if images.ndim == 4 else [(images, models, rows)]
        found += [(int(model not in ("net", "sums")), row, image.numpy().tobytes()) for image, model, row in items]
    return found


def of(number: int, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row[0] == number]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.data())
def test_positions_are_spread_out_evenly(parts: list[int], data: st.DataObject) -> None:
    total = sum(parts)
    position = data.draw(st.integers(0, total - 1))
    here, after = counts_before(parts, position), counts_before(parts, position + 1)
    assert sum(here) == position
    assert sorted(more - less for less, more in zip(here, after, strict=True)) == [0] * (len(parts) - 1) + [1]
    assert counts_before(parts, total) == parts
    for part, count in zip(parts, here, strict=True):
        assert abs(count - position * part / total) <= (len(parts) + 1) / 2


def test_without_weights_an_epoch_has_every_image_of_each_once(folders: list[Path]) -> None:
    data, alone = opened(folders), opened(folders[:1])
    assert (data.rows, data.parts, len(data)) == (51, ROWS, 51)
    assert data.classes == alone.classes
    epochs = [plain(data) for _ in range(2)]
    for rows in epochs:
        for number, count in enumerate(ROWS):
            assert sorted(row for _, row, _ in of(number, rows)) == list(range(count))
            here = [sum(row[0] == number for row in rows[first : first + 10]) for first in range(0, 50, 10)]
            assert all(abs(found - 10 * count / 51) < 2 for found in here)
        # The first dataset is read as it is alone.
        assert of(0, rows) == plain(alone)
    assert of(1, epochs[0]) != of(1, epochs[1])


@pytest.mark.parametrize("weights", [[1, 3], [0.9, 0.1], [2, 2]])
def test_with_weights_each_goes_through_its_rows_at_its_own_pace(folders: list[Path], weights: list[float]) -> None:
    data = opened(folders, weights=weights)
    assert data.rows == 51
    epochs = [plain(data) for _ in range(9)]
    for number, (weight, count) in enumerate(zip(weights, ROWS, strict=True)):
        part = 51 * weight / sum(weights)
        assert abs(data.parts[number] - part) <= 0.5
        assert {len(of(number, rows)) for rows in epochs} == {data.parts[number]}
        rows = [row for _, row, _ in of(number, [row for rows in epochs for row in rows])]
        assert len(rows) > count
        for first in range(0, len(rows) - count, count):
            assert sorted(rows[first : first + count]) == list(range(count))
    # An epoch can be asked for.
    data.set_epoch(5)
    assert plain(data) == epochs[5]


@pytest.mark.parametrize("weights", [None, [1, 3]])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_states_share_an_epoch(folders: list[Path], workers: int, weights: Any) -> None:
    alone = opened(folders, weights=weights)
    alone.set_epoch(3)
    union: list[Row] = []
    for rank in range(2):
        loaders: list[Any] = []
        for _ in range(2):
            data = opened(folders, weights=weights, rank=rank, world_size=2)
            data.set_epoch(3)
            loaders.append(StatefulDataLoader(data, batch_size=4, num_workers=workers))
        batches = iter(loaders[0])
        before = plain(list(islice(batches, 3)))
        loaders[1].load_state_dict(loaders[0].state_dict())
        rest = plain(list(batches))
        assert plain(loaders[1]) == rest
        assert len(before + rest) == len(loaders[0].dataset) == 26 - rank
        union += before + rest
        # And the next epoch follows.
        after = opened(folders, weights=weights, rank=rank, world_size=2)
        after.set_epoch(4)
        assert sorted(plain(loaders[1])) == sorted(plain(after))
    assert sorted(union) == sorted(plain(alone))


def test_two_runs_of_one_source_differ_in_order_and_draws(folders: list[Path]) -> None:
    data = pipeline.training_dataset([folders[0]] * 2, "test", columns=["source_index", "epsilon"])
    rows = [(row, epsilon) for _, row, epsilon in data]
    assert Counter(row for row, _ in rows) == dict.fromkeys(range(40), 2)
    first, second = ([(row, epsilon) for _, row, epsilon in part.read(0, 40)] for part in data.streams)
    assert first != second
    assert sorted(first) != sorted(second)


def test_pairs_and_only_hold_in_each(folders: list[Path]) -> None:
    data = pipeline.training_dataset(folders, "test", pairs=True, weights={"fgsm": 2}, only="fooled")
    (pairs, labels) = next(iter(DataLoader(data, batch_size=51)))
    assert pairs.shape == (51, 2, 3, 16, 16)
    assert labels.dtype == torch.int64


def test_a_state_of_other_weights_or_datasets_is_refused(folders: list[Path]) -> None:
    data = opened(folders, weights=[1, 3])
    state = data.state_dict()
    opened(folders, weights=[2, 6]).load_state_dict(state)
    for other in (opened(folders), opened(folders[:1]), opened(folders[::-1], weights=[3, 1])):
        with pytest.raises(ConfigError, match=r"^state: "):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 0], [0, 0], [1, -2], [1, math.inf], [1, math.nan], [True, 1], [1, "2"], [1, 1e-9], [], "13", 2, 0, True],
    ids=str,
)
def test_weights_that_cannot_be_are_one_sentence(folders: list[Path], weights: Any) -> None:
    with pytest.raises(ConfigError, match=r"^weights: .*\.$"):
        opened(folders, weights=weights)


def test_weights_are_checked_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.read.training.manifest_folder", None)
    with pytest.raises(ConfigError, match=r"^weights: "):
        pipeline.training_dataset(["user/one", "user/two"], weights=[1])


def test_no_dataset_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^path_or_repo: .*\.$"):
        opened([])


def test_datasets_of_other_classes_or_shapes_are_one_sentence(
    folders: list[Path], tmp_path: Path, write_config: WriteConfig
) -> None:
    images = [png_bytes(pixels) for pixels in random_pixels(4, side=20)]
    write_parquet(tmp_path / "large", images, [0, 1, 2, 0])
    other = datasets.ClassLabel(names=["cat", "dog", "emu"])
    write_parquet(tmp_path / "named", images, None, label=(other, [0, 1, 2, 0]))
    for name, named in (("large", "shape"), ("named", "classes")):
        output = {"path": str(tmp_path / f"out-{name}")}
        generate_once(write_config(source={"path": str(tmp_path / name)}, output=output))
        with pytest.raises(ConfigError, match=f"^path_or_repo: {named} .*{folders[0]}.*{output['path']}"):
            opened([*folders, Path(output["path"])])
