"""What training draws of several attacks and models: in which proportion, among which, and the same in every layout."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.read import shards, stream
from pipeline.read.dataset import TrainingDataset
from tests.conftest import LAYOUTS, manifest, write_sealed
from tests.support.hub import Hub, push

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.15
]

ROWS = 40
# The place of a row as it is stored, and what made the image that is shown.
Shown = tuple[int, str | None, str | None, int]


def opened(folder: Path, **options: Any) -> TrainingDataset:
    return pipeline.training_dataset(folder, "test", **options)


class Known:
    """What each image of a dataset is, by its pixels."""

    def __init__(self, folder: Path) -> None:
        self.rows = pipeline.load(folder, split="test").to_list()
        self.shown: dict[bytes, set[Shown]] = {}
        images = pipeline.load(folder, split="test").with_format("numpy")["image"]
        for number, (row, image) in enumerate(zip(self.rows, images, strict=True)):
            shown = number % ROWS, row["attack"], row["model"], round(255 * row["epsilon"])
            self.shown.setdefault(np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes(), set()).add(shown)

    def of(self, rows: Any) -> list[Shown]:
        """What was read, row by row, from a dataset or a loader; labels are checked."""
        found = []
        for images, labels in rows:
            single = images.ndim == 3
            for image, label in zip([images] if single else images, [labels] if single else labels, strict=True):
                (shown,) = self.shown[image.numpy().tobytes()]
                assert label == self.rows[shown[0]]["label"]
                found.append(shown)
        return found

    def flags(self, data: TrainingDataset, name: str) -> NDArray[np.bool_]:
        """(ROWS, V): whether a column is true of a row in each of the variants that are drawn; never of clean."""
        flags = np.zeros((ROWS, len(data.streams[0].shards.variants)), dtype=np.bool_)
        variants = [(one.attack, one.model, one.level) for one in data.streams[0].shards.variants]
        for number, row in enumerate(self.rows):
            made = row["attack"], row["model"], round(255 * row["epsilon"])
            if row["attack"] and made in variants:
                flags[number % ROWS, variants.index(made)] = row[name]
        return flags


@pytest.fixture(scope="module")
def known(several: Path) -> Known:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", several / "cache")
        return Known(several / "images")


def drawn(data: TrainingDataset, epochs: int) -> NDArray[np.int64]:
    """(epochs, ROWS): which variant is drawn for each row, in the order in which rows are stored."""
    read, flags = dict[tuple[str, int], Any](), data.streams[0].shards.flags

    def once(piece: shards.Piece, only: Any) -> Any:
        """What is read of the files is the same in each epoch."""
        place = piece.file, piece.start
        if place not in read:
            read[place] = flags(piece, only)
        return read[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.streams[0].shards, "flags", once)
        return np.array(
            [
                np.concatenate([data.streams[0]._drawn(epoch, piece) for piece in data.streams[0].shards.pieces])
                for epoch in range(epochs)
            ]
        )


def assert_drawn(data: TrainingDataset, counts: NDArray[np.int64], expected: Sequence[float]) -> None:
    """Whether draws of each variant are as many as expected: chi-square, at a bound that a right generator passes by
    with less than one chance in a million."""
    wanted = np.array(expected)
    assert not counts[wanted == 0].any()
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    assert wanted.min() > 20
    free = len(wanted) - 1
    assert ((counts - wanted) ** 2 / wanted).sum() < free + 10 * np.sqrt(2 * free), (
        data.streams[0].shards.variants,
        counts,
    )


def names(data: TrainingDataset) -> list[str]:
    return [variant.subset for variant in data.streams[0].shards.variants]


# ------------------------------------------------------------------------------------------- as it was before


def test_of_one_attack_on_one_model_epochs_are_what_they_were(finished: Path) -> None:
    """Recorded when an epsilon was all that was drawn."""
    index: dict[bytes, tuple[int, int]] = {}
    for level in (0, 3, 8):
        rows = pipeline.load(finished, [f"{level}/255"] if level else [0], "test").with_format("numpy")["image"]
        index |= {np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes(): (i, level) for i, image in enumerate(rows)}
    options: list[dict[str, Any]] = [{}, {"epsilons": ["8/255", "3/255"], "clean": 0.25, "seed": 3}]
    epochs = []
    for each in options:
        data = opened(finished, **each)
        data.set_epoch(2)
        epochs.append([index[image.numpy().tobytes()] for image, _ in data])
    assert epochs == [
        [(1, 8), (9, 0), (4, 0), (3, 0), (10, 0), (2, 0), (7, 0), (0, 0), (6, 0), (5, 8), (8, 8)],
        [(4, 0), (0, 0), (1, 8), (3, 8), (5, 0), (7, 3), (9, 0), (10, 8), (6, 8), (8, 3), (2, 0)],
    ]


# ------------------------------------------------------------------------------------------- what an epoch holds

MIXES: list[dict[str, Any]] = [
    {},
    {"models": "sums"},
    {"attacks": ["fgsm", "aimed"], "clean": 0},
    {"weights": {"noise": 0, "net": 2, "8/255": 0.5}, "clean": 0.1},
    {"only": "fooled", "clean": 0.1},
    {"only": "correct", "attacks": ["fgsm", "noise"], "weights": {"noise": 0.5}, "clean": 0.1},
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_every_image_comes_once_and_alike_in_every_layout(several: Path, known: Known, mix: dict[str, Any]) -> None:
    epochs = []
    for layout in LAYOUTS:
        data = opened(several / layout, **mix)
        stored = opened(several / layout, **mix, shuffle=False)
        for one in (data, stored):
            one.set_epoch(1)
        shown = known.of(data)
        assert sorted(row for row, *_ in shown) == list(range(ROWS))
        epochs.append(known.of(stored))
        assert sorted(map(str, shown)) == sorted(map(str, epochs[-1]))
    assert all(epoch == epochs[0] for epoch in epochs)
    assert [row for row, *_ in epochs[0]] == list(range(ROWS))
    made = {(attack, model) for _, attack, model, _ in epochs[0]} - {(None, None)}
    if "models" in mix:
        assert made == {("fgsm", "sums"), ("noise", None)}
    if mix.get("clean") == 0:
        assert made == {("fgsm", "net"), ("fgsm", "sums"), ("aimed", "net")}
        # No clean image is drawn, and none of noise.
        assert len(opened(several / "wide", **mix).streams[0].shards.columns) == 5


def test_draws_are_even_over_models_then_attacks_then_epsilons(several: Path) -> None:
    data = opened(several / "signs", clean=0.25)
    expected = {
        "clean": 1 / 4,
        **dict.fromkeys(["fgsm-net-eps-2", "fgsm-net-eps-8"], 3 / 4 * 1 / 2 * 1 / 3 * 1 / 2),
        **dict.fromkeys(["fgsm-sums-eps-2", "fgsm-sums-eps-8"], 3 / 4 * 1 / 2 * 1 / 2 * 1 / 2),
        "noise-eps-8": 3 / 4 * 1 / 2 * (1 / 3 + 1 / 2),
        "aimed-net-eps-8": 3 / 4 * 1 / 2 * 1 / 3,
    }
    counts = np.bincount(drawn(data, 300).ravel(), minlength=7)
    assert_drawn(data, counts, [300 * ROWS * expected[name] for name in names(data)])


def test_draws_follow_weights_and_what_weighs_nothing_is_not_read(several: Path) -> None:
    data = opened(several / "images", clean=0, weights={"noise": 0, "aimed": 3, "sums": 0.5, "2/255": 4})
    expected = {
        "clean": 0,
        "fgsm-net-eps-2": 2 / 3 * 1 / 4 * 4 / 5,
        "fgsm-net-eps-8": 2 / 3 * 1 / 4 * 1 / 5,
        "fgsm-sums-eps-2": 1 / 3 * 4 / 5,
        "fgsm-sums-eps-8": 1 / 3 * 1 / 5,
        "aimed-net-eps-8": 2 / 3 * 3 / 4,
    }
    assert set(names(data)) == set(expected)
    assert {picture.subset for picture in data.streams[0].shards.columns} == set(expected) - {"clean"}
    counts = np.bincount(drawn(data, 300).ravel(), minlength=6)
    assert_drawn(data, counts, [300 * ROWS * expected[name] for name in names(data)])


# ------------------------------------------------------------------------------------------- only some of a row's


@pytest.mark.parametrize("only", ["fooled", "correct"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_draws_are_among_what_fooled_or_did_not_in_the_same_proportion(
    several: Path, known: Known, layout: str, only: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline.read.training"):
        data = opened(several / layout, clean=0.25, only=only, weights={"noise": 3})
    flags = known.flags(data, only)
    none = ~flags.any(axis=1)
    assert 0 < none.sum() < ROWS
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{none.sum()} of {ROWS} " in line
    assert only in line
    variants = drawn(data, 60)
    attacked = variants > 0
    assert flags[np.nonzero(attacked)[1], variants[attacked]].all()
    assert not attacked[:, none].any()
    # Each row's own proportion, summed.
    shares = data.streams[0].draws.shares * flags[~none]
    expected = 60 * 0.75 * (shares / shares.sum(axis=1, keepdims=True)).sum(axis=0)
    expected[0] = 60 * ROWS - expected.sum()
    often = expected > 20
    counts = np.bincount(variants.ravel(), minlength=len(data.streams[0].shards.variants))
    assert often.sum() > 3
    assert_drawn(data, counts[often], expected[often])


def test_clean_stays_the_share_of_clean_images_where_there_is_an_attacked_one(several: Path, known: Known) -> None:
    rest = opened(several / "images", clean=0.25)
    data = opened(several / "images", clean=0.25, only="correct")
    some = known.flags(data, "correct").any(axis=1)
    # The same lots say which rows are shown clean.
    assert ((drawn(data, 20) == 0) == ((drawn(rest, 20) == 0) | ~some)).all()


def test_its_columns_are_read_only_where_it_is_asked_for(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    table = shards.Shards._table

    def counting(self: Any, piece: Any, subset: str, columns: list[str]) -> Any:
        read.update(columns)
        return table(self, piece, subset, columns)

    monkeypatch.setattr(shards.Shards, "_table", counting)
    list(opened(several / "images"))
    assert set(read) == {"image.bytes", "label"}
    data = opened(several / "images", only="fooled")
    read.clear()
    list(data)
    # Once for each piece and variant.
    assert read["fooled"] == len(data.streams[0].shards.pieces) * (len(data.streams[0].shards.variants) - 1)


def test_all_clean_asks_nothing_of_rows(several: Path, known: Known, caplog: pytest.LogCaptureFixture) -> None:
    data = opened(several / "images", clean=1, only="fooled")
    assert {made for _, *made_of, _ in known.of(data) for made in made_of} == {None}
    assert data.streams[0].shards.subsets == ("clean",)
    assert not caplog.records


def test_rows_that_lost_an_attack_are_one_sentence(several: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(several / "signs", folder)
    file = sorted((folder / "signs").iterdir())[1]
    rows = pq.ParquetFile(file).read().to_pylist()
    rows[3]["attacks"].pop()
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.ParquetFile(file).schema_arrow), file)
    content = manifest(folder)
    for entry in content["files"]:
        if entry["path"] == f"signs/{file.name}":
            entry["bytes"] = file.stat().st_size
    write_sealed(folder / "manifest.json", content)
    with pytest.raises(PipelineError, match=rf"{file.name} .*fgsm verify"):
        opened(folder, only="fooled")


# ------------------------------------------------------------------------------------------- sharing and going on

MIX: dict[str, Any] = {"only": "correct", "weights": {"noise": 2}, "clean": 0.2}


@pytest.mark.parametrize("layout", ["images", "signs"])
def test_consumers_share_an_epoch(several: Path, known: Known, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)
    alone = opened(several / layout, **MIX)
    alone.set_epoch(4)
    union: list[Shown] = []
    for rank in range(3):
        data = opened(several / layout, rank=rank, world_size=3, **MIX)
        data.set_epoch(4)
        union += known.of(DataLoader(data, batch_size=4, num_workers=2 * (rank == 0)))
    assert sorted(map(str, union)) == sorted(map(str, known.of(alone)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_where_it_stopped(
    several: Path, known: Known, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)

    def loader() -> Any:
        data = opened(several / "images", **MIX)
        data.set_epoch(6)
        return StatefulDataLoader(data, batch_size=4, num_workers=workers)

    first = loader()
    rows = iter(first)
    before = known.of(islice(rows, 4))
    state = json.loads(json.dumps(first.state_dict())) if workers == 0 else first.state_dict()
    after = known.of(rows)
    assert sorted(row for row, *_ in before + after) == list(range(ROWS))
    again = loader()
    again.load_state_dict(state)
    assert known.of(again) == after


def test_a_state_of_another_mix_is_refused(several: Path) -> None:
    state = opened(several / "images", clean=0.4).state_dict()
    others: list[dict[str, Any]] = [
        {"models": "net"},
        {"attacks": ["fgsm"]},
        {"weights": {"fgsm": 2}},
        {"only": "fooled"},
        {"only": "correct"},
    ]
    for options in others:
        with pytest.raises(ConfigError, match=r"^state: .*\bseed\b"):
            opened(several / "images", clean=0.4, **options).load_state_dict(state)
    opened(several / "images", clean=0.4, weights={"fgsm": 1}).load_state_dict(state)


# ------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "key", "named"),
    [
        ({"models": "vgg"}, "models", "net, sums"),
        ({"attacks": ["pgd"]}, "attacks", "fgsm, noise, aimed"),
        ({"weights": {"pgd": 2}}, "weights", "'pgd'"),
        ({"weights": {"sums": 2}, "models": "net"}, "weights", "'sums'"),
        ({"weights": {"4/255": 2}}, "weights", "'4/255'"),
        ({"weights": {"fgsm": -0.1}}, "weights", "fgsm"),
        ({"weights": {"fgsm": float("nan")}}, "weights", "fgsm"),
        ({"weights": {"2/255": 0, "8/255": 0}}, "weights", "nothing"),
        ({"only": "wrong"}, "only", "'wrong'"),
        ({"only": "fooled", "epsilons": ["8/255", "3/255"]}, "only", "3/255"),
    ],
    ids=str,
)
def test_what_cannot_be_names_the_key(several: Path, options: dict[str, Any], key: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: ") as caught:
        opened(several / "images", **options)
    assert named in str(caught.value)


# ------------------------------------------------------------------------------------------- from the Hub


def test_only_what_is_chosen_is_fetched_from_the_hub(several: Path, known: Known, hub: Hub) -> None:
    push(hub, several / "images")
    mix: dict[str, Any] = {"models": "sums", "weights": {"noise": 0}, "only": "correct"}
    shown = known.of(opened(Path("user/name"), **mix))
    assert shown == known.of(opened(several / "images", **mix))
    asked = Counter(path.split("/resolve/")[1].split("/")[1] for path in hub.asked("GET", "/resolve/"))
    assert asked == {"manifest.json": 1, "clean": 3, "fgsm-sums-eps-2": 3, "fgsm-sums-eps-8": 3}
