"""The clean image beside each image that is shown, from every layout, for every reader."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms.v2 import RandomCrop

import pipeline
from pipeline.read import stream
from tests.conftest import LAYOUTS
from tests.support.ranks import read_in_two_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.15
]

ROWS = 40
COLUMNS = ("source_index", "label", "epsilon", "model", "attack")


def opened(folder: Path, **options: Any) -> Any:
    return pipeline.training_dataset(folder, "test", **options)


@pytest.mark.parametrize("layout", [*LAYOUTS, "stepped"])
@pytest.mark.parametrize(
    "options",
    [
        {"clean": 0},
        {"clean": 0.3, "only": "fooled"},
        {"clean": 0, "epsilons": ["2/255", "3/255"], "attacks": ["fgsm", "noise"]},
        {"clean": 1},
    ],
    ids=str,
)
def test_the_clean_image_is_that_of_the_row_and_the_other_is_drawn_as_ever(
    several: Path, layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)
    monkeypatch.setattr(stream, "BLOCK_VALUES", 4 * 3 * 16 * 16)
    rows = pipeline.load(several / layout, [0], split="test").with_format("numpy")
    clean = {int(row["source_index"]): row["image"].transpose(2, 0, 1) for row in rows}
    pairs = list(opened(several / layout, columns=COLUMNS, pairs=True, **options))
    alone = list(opened(several / layout, columns=COLUMNS, **options))
    assert len(pairs) == ROWS
    for (pair, *columns), (image, *others) in zip(pairs, alone, strict=True):
        assert pair.shape == (2, 3, 16, 16)
        assert pair.dtype == torch.uint8
        assert columns == others
        assert np.array_equal(pair[0], clean[columns[0]])
        assert torch.equal(pair[1], image)
        assert torch.equal(pair[0], pair[1]) == (columns[2] == 0)


def test_without_a_word_of_clean_images_every_pair_has_an_attacked_one(several: Path) -> None:
    data = opened(several / "signs", columns=["epsilon"], pairs=True)
    assert min(epsilon for _, epsilon in data) > 0


def test_an_augmentation_draws_once_for_both(several: Path) -> None:
    augment = RandomCrop(16, padding=6)

    def collate(items: list[Any]) -> Any:
        return default_collate([(augment(pair), *columns) for pair, *columns in items])

    options = {"pairs": True, "epsilons": ["8/255"]}
    differ = 0
    for pairs, _ in DataLoader(opened(several / "wide", **options), batch_size=8, collate_fn=collate):
        clean, attacked = pairs.unbind(1)
        assert (clean.int() - attacked.int()).abs().max() <= 8
        differ += int((clean != attacked).sum())
    assert differ


@pytest.mark.parametrize("layout", ["images", "signs"])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_states_give_the_same_pairs(
    several: Path, layout: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)

    def plain(batches: Any) -> list[bytes]:
        return [pair.numpy().tobytes() for pairs, _ in batches for pair in pairs]

    alone = plain(DataLoader(opened(several / layout, pairs=True), batch_size=8))
    union = read_in_two_ranks(partial(opened, several / layout), plain, workers, pairs=True)
    assert sorted(union) == sorted(alone)
