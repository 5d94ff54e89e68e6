"""Reading for training: every image once an epoch, whoever shares the work, and exactly on from where it stopped."""

import errno
import gc
import json
import math
import os
import pickle
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
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.images import decode_images
from pipeline.output import shards as written
from pipeline.read import dataset, shards, stream
from pipeline.read.dataset import TrainingDataset
from tests.conftest import (
    FACTORY,
    KINDS,
    LAYOUTS,
    WriteConfig,
    generate,
    generate_once,
    let_go,
    loaded_by,
    output_of,
    png_bytes,
    random_pixels,
    shard_path,
    write_parquet,
    write_sealed,
)
from tests.support.hub import Hub, push

# Workers are a matter of correctness here; that they outnumber this machine's cores is none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.15
]

ROWS = 50
SHARD = 20
CHANNELS = {"color": 3, "gray": 1}
OUTPUTS = [f"{color}-{layout}" for color in CHANNELS for layout in LAYOUTS]

# A row of the source and the grey level at which it is shown.
Shown = tuple[int, int]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of OUTPUTS, such as color-images: 50 different images at 2/255 and 8/255 in three
    files, in row groups that do not lie side by side in all subsets."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "victim.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(written, "ROW_GROUP_ROWS", 12)
        patch.setattr(written, "ROW_GROUP_BYTES", 8_000)
        for color, channels in CHANNELS.items():
            # Noise of few colours in every other image, so that its size in bytes depends on the epsilon.
            pixels = random_pixels(ROWS, channels=channels)
            pixels[::2] = pixels[::2] // 128 * 255
            source = write_parquet(folder / color, list(map(png_bytes, pixels)), [i % 3 for i in range(ROWS)])
            for layout in LAYOUTS:
                config = {
                    "source": {"kind": "huggingface", "path": str(source)},
                    "preprocess": {"mode": "RGB" if channels == 3 else "L"},
                    "model": {"kind": "factory", "name": f"{folder}/victim.py:make", "kwargs": {"channels": channels}},
                    "attack": {"epsilons": ["2/255", "8/255"]},
                    "output": {
                        "path": str(folder / f"{color}-{layout}"),
                        **output_of(layout),
                        "images_per_shard": SHARD,
                    },
                    "runtime": {"device": "cpu", "workers": 0, "batch_size": 6},
                }
                (folder / "config.yaml").write_text(yaml.safe_dump(config))
                generate(folder / "config.yaml")
    return folder


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of two or three pieces, and images decoded by fours."""
    monkeypatch.setattr(stream, "WINDOW_ROWS", 15)
    monkeypatch.setattr(stream, "BLOCK_VALUES", 4 * 3 * 16 * 16)


class Known:
    """What each image of an output shows, by its pixels: the row as it is stored and the level."""

    def __init__(self, folder: Path, levels: Sequence[int]) -> None:
        self.shown: dict[bytes, set[Shown]] = {}
        self.labels: list[int] = []
        for level in levels:
            rows = pipeline.load(folder, [f"{level}/255"] if level else [0], split="test").with_format("numpy")
            self.labels = rows["label"][:].tolist()
            for index, image in enumerate(rows["image"]):
                image = image[:, :, None] if image.ndim == 2 else image
                key = np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes()
                self.shown.setdefault(key, set()).add((index, level))

    def of(self, rows: Any) -> list[Shown]:
        """What was read, row by row, from a dataset or a loader; labels are checked."""
        found = []
        for images, labels in rows:
            assert images.dtype == torch.uint8
            single = images.ndim == 3
            for image, label in zip([images] if single else images, [labels] if single else labels, strict=True):
                ((index, level),) = self.shown[image.numpy().tobytes()]
                assert label == self.labels[index]
                found.append((index, level))
        return found


@pytest.fixture(scope="module")
def known(outputs: Path) -> Known:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", outputs / "cache")
        return Known(outputs / "color-images", (0, 2, 3, 8))


def opened(folder: Path, **options: Any) -> TrainingDataset:
    return pipeline.training_dataset(folder, "test", **options)


def indices(shown: Sequence[Shown]) -> list[int]:
    return [index for index, _ in shown]


# ------------------------------------------------------------------------------------------- what an epoch holds


def test_row_groups_of_the_test_data_differ_between_subsets(outputs: Path) -> None:
    def ends(subset: str) -> list[int]:
        footer = pq.read_metadata(shard_path(outputs / "color-images" / subset, "test-00000-of-00003.parquet"))
        return [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]

    assert ends("clean") != ends("eps-8")
    pieces = opened(outputs / "color-images").streams[0].shards.pieces
    assert len(pieces) > 4
    assert any(stop - start > 1 for piece in pieces for start, stop in piece.groups.values())


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("epsilons", [None, ["3/255", "2/255"]], ids=["recorded", "other"])
@pytest.mark.usefixtures("small_windows")
def test_every_image_comes_once_and_is_exact(outputs: Path, name: str, epsilons: Any) -> None:
    there = Known(outputs / name, (0, 2, 3, 8))
    data = opened(outputs / name, epsilons=epsilons)
    assert data.classes == ("cat", "dog", "eel")
    assert data.shape == (3 if name.startswith("color") else 1, 16, 16)
    assert len(data) == data.rows == ROWS
    shown = there.of(data)
    assert sorted(indices(shown)) == list(range(ROWS))
    assert {level for _, level in shown} == {0, 2, 8 if epsilons is None else 3}
    image, label = next(iter(data))
    assert image.shape == data.shape
    assert type(label) is int
    # All layouts draw alike.
    other = outputs / f"{name.partition('-')[0]}-signs"
    ordered = [there.of(opened(folder, epsilons=epsilons, shuffle=False)) for folder in (outputs / name, other)]
    assert ordered[0] == ordered[1]
    assert indices(ordered[0]) == list(range(ROWS))
    assert sorted(ordered[0]) == sorted(shown)


@pytest.mark.parametrize("name", ["color-images", "color-signs", "color-signs-bits", "color-wide"])
@pytest.mark.parametrize("clean", [0, 1])
def test_all_clean_and_none(outputs: Path, known: Known, name: str, clean: int) -> None:
    data = opened(outputs / name, clean=clean)
    shown = known.of(data)
    assert sorted(indices(shown)) == list(range(ROWS))
    assert {level for _, level in shown} == ({0} if clean else {2, 8})
    # What is never drawn is not read.
    read = set(data.streams[0].shards.columns)
    every = {
        "color-images": [("clean", "image")] if clean else [("eps-2", "image"), ("eps-8", "image")],
        "color-signs": [("signs", "image")] if clean else [("signs", "image"), ("signs", "sign")],
        "color-signs-bits": [("signs", "image")] if clean else [("signs", "image"), ("signs", "sign")],
        "color-wide": [("wide", "image")] if clean else [("wide", "eps_2"), ("wide", "eps_8")],
    }
    assert read == set(every[name])


def test_draws_are_those_of_the_ratio_and_all_epsilons_are_as_likely(outputs: Path) -> None:
    data = opened(outputs / "color-signs", epsilons=["2/255", "3/255", "8/255"], clean=0.25)
    levels = Counter(
        data.streams[0].shards.variants[index].level
        for epoch in range(200)
        for piece in data.streams[0].shards.pieces
        for index in data.streams[0]._drawn(epoch, piece).tolist()
    )
    total = 200 * ROWS
    assert sorted(levels) == [0, 2, 3, 8]
    for count in levels.values():
        assert abs(count / total - 0.25) < 5 * math.sqrt(0.25 * 0.75 / total)


@pytest.mark.usefixtures("small_windows")
def test_an_epoch_has_an_order_and_draws_of_its_own(outputs: Path, known: Known) -> None:
    data = opened(outputs / "color-images")
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(known.of(data))
    assert epochs[0] == epochs[2]
    assert indices(epochs[0]) != indices(epochs[1])
    assert sorted(epochs[0]) != sorted(epochs[1])
    other = known.of(opened(outputs / "color-images", seed=1))
    assert indices(epochs[0]) != indices(other)
    assert sorted(epochs[0]) != sorted(other)


def test_draws_of_a_piece_are_those_of_its_rows(outputs: Path) -> None:
    # A shard in pieces draws as it would in one.
    data = opened(outputs / "color-images")
    by_shard: dict[int, list[int]] = {}
    for piece in data.streams[0].shards.pieces:
        by_shard.setdefault(piece.shard, []).extend(data.streams[0]._drawn(3, piece).tolist())
    for shard, levels in by_shard.items():
        whole = shards.Piece("", shard, 0, len(levels), 0, {})
        assert data.streams[0]._drawn(3, whole).tolist() == levels


@pytest.mark.usefixtures("small_windows")
def test_rows_mix_within_a_window_and_windows_come_in_any_order(outputs: Path, known: Known) -> None:
    data = opened(outputs / "color-images")
    shown = indices(known.of(data))
    begin = 0
    places = []
    for window in data.streams[0]._windows(0):
        rows = [piece.shard * SHARD + row for piece in window for row in range(piece.start, piece.start + piece.rows)]
        here = shown[begin : begin + len(rows)]
        assert sorted(here) == sorted(rows)
        assert here != rows
        places.append(rows[0])
        begin += len(rows)
    assert len(places) >= 3
    assert places != sorted(places)


# --------------------------------------------------------------------------------------------- sharing the work


@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 9))
def test_stretches_fit_together(rows: int, world: int, workers: int) -> None:
    taken: list[int] = []
    sizes = []
    for rank in range(world):
        mine = dataset.share(0, rows, rank, world)
        sizes.append(mine[1] - mine[0])
        parts = [range(*dataset.share(*mine, worker, workers)) for worker in range(workers)]
        taken += [row for part in parts for row in part]
        lengths = list(map(len, parts))
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1
    assert taken == list(range(rows))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("name", "world", "workers"),
    [
        *(("color-images", 1, 2), ("color-images", 7, 0), ("color-images", 5, 3)),
        *(("color-signs", 2, 0), ("color-signs", 3, 2), ("color-signs", 60, 0)),
    ],
)
@pytest.mark.usefixtures("small_windows")
def test_consumers_share_an_epoch(outputs: Path, known: Known, name: str, world: int, workers: int) -> None:
    alone = opened(outputs / name)
    alone.set_epoch(4)
    union: list[Shown] = []
    for rank in range(world):
        data = opened(outputs / name, rank=rank, world_size=world)
        data.set_epoch(4)
        mine = known.of(DataLoader(data, batch_size=4, num_workers=workers))
        assert len(mine) == len(data)
        assert len(data) - ROWS // world in (0, 1)
        union += mine
    # More consumers than row groups or even rows: nothing twice, nothing lost, and the same draws.
    assert sorted(union) == sorted(known.of(alone))


@pytest.mark.parametrize(("world", "workers", "batch_size"), [(2, 2, 7), (3, 0, 4), (3, 2, 5)])
def test_every_rank_has_the_steps_that_ddp_is_told(outputs: Path, world: int, workers: int, batch_size: int) -> None:
    for rank in range(world):
        data = opened(outputs / "color-signs", rank=rank, world_size=world)
        loader = DataLoader(data, batch_size=batch_size, num_workers=workers)
        assert sum(1 for _ in loader) >= data.rows // (world * batch_size) > 0


@pytest.mark.usefixtures("small_windows")
def test_a_consumer_reads_every_column_of_a_piece_once_and_only_its_own(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[Any, ...]] = Counter()
    table = shards.Shards._table

    def counting(self: Any, piece: Any, subset: str, columns: list[str]) -> Any:
        read.update((piece.file, piece.start, subset, column) for column in columns)
        return table(self, piece, subset, columns)

    monkeypatch.setattr(shards.Shards, "_table", counting)
    list(opened(outputs / "color-images"))
    assert set(read.values()) == {1}
    whole = len(read)
    read.clear()
    list(opened(outputs / "color-images", rank=0, world_size=4))
    assert 0 < len(read) <= whole / 2
    assert set(read.values()) == {1}


def test_a_window_holds_no_more_than_its_bytes(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(outputs / "color-images")
    largest = max(piece.bytes for piece in data.streams[0].shards.pieces)
    assert largest > 5_000
    monkeypatch.setattr(stream, "WINDOW_BYTES", 2 * largest)
    for window in data.streams[0]._windows(0):
        assert sum(piece.bytes for piece in window) <= 3 * largest


@pytest.mark.usefixtures("processes")
def test_workers_are_given_paths_and_not_images(outputs: Path, known: Known) -> None:
    data = opened(outputs / "color-images")
    data.set_epoch(2)
    assert len(pickle.dumps(data)) < 10_000
    loader = DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="forkserver")
    shown = sorted(known.of(loader))
    data.set_epoch(2)
    assert shown == sorted(known.of(data))


def test_workers_that_stay_hear_of_the_next_epoch(outputs: Path, known: Known) -> None:
    data = opened(outputs / "color-images")
    loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True)
    alone = opened(outputs / "color-images")
    for epoch in (0, 1):
        data.set_epoch(epoch)
        alone.set_epoch(epoch)
        assert sorted(known.of(loader)) == sorted(known.of(alone))


def _rank(rank: int, store: str, folder: Path, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = opened(folder)
    loader = DataLoader(data, batch_size=8, num_workers=1, multiprocessing_context="fork")
    results.put(
        (
            rank,
            len(data),
            [*data.place, *data._consumer()[2:]],
            [image.numpy().tobytes() for images, _ in loader for image in images],
        )
    )
    torch.distributed.destroy_process_group()


def test_ranks_are_those_of_torch_distributed(outputs: Path, tmp_path: Path, known: Known) -> None:
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = (str(tmp_path / "store"), outputs / "color-images", results)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    got = {rank: rest for rank, *rest in (results.get() for _ in processes)}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [got[rank][:2] for rank in range(2)] == [[25, [0, 2, 0, 1]], [25, [1, 2, 0, 1]]]
    union = [next(iter(known.shown[image])) for rank in range(2) for image in got[rank][2]]
    assert sorted(union) == sorted(known.of(opened(outputs / "color-images")))


# ------------------------------------------------------------------------------------------------- going on


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every picture that is decoded in this process."""
    calls: list[int] = []

    def counting(data: Sequence[bytes], *arguments: Any) -> Any:
        calls.extend(map(len, data))
        return decode_images(data, *arguments)

    monkeypatch.setattr(shards, "decode_images", counting)
    return calls


@pytest.mark.parametrize(
    ("name", "workers", "taken"),
    [
        *(("color-images", 0, 1), ("color-images", 2, 5), ("color-images", 3, 0)),
        *(("color-signs", 0, 5), ("color-signs", 2, 0), ("color-signs", 3, 1)),
    ],
)
@pytest.mark.usefixtures("small_windows")
def test_a_stateful_loader_goes_on_where_it_stopped(
    outputs: Path, known: Known, name: str, workers: int, taken: int
) -> None:
    def loader() -> Any:
        data = opened(outputs / name)
        data.set_epoch(6)
        return StatefulDataLoader(data, batch_size=4, num_workers=workers)

    first = loader()
    rows = iter(first)
    before = known.of(islice(rows, taken))
    state = json.loads(json.dumps(first.state_dict())) if workers == 0 else first.state_dict()
    after = known.of(rows)
    assert sorted(indices(before + after)) == list(range(ROWS))
    again = loader()
    again.load_state_dict(state)
    assert known.of(again) == after
    # And the next epoch begins at its beginning.
    again.dataset.set_epoch(7)
    fresh = opened(outputs / name)
    fresh.set_epoch(7)
    assert sorted(known.of(again)) == sorted(known.of(fresh))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_an_epoch_s_end_leads_to_the_next(outputs: Path, known: Known, workers: int) -> None:
    data = opened(outputs / "color-images")
    loader: Any = StatefulDataLoader(data, batch_size=4, num_workers=workers)
    list(loader)
    state = loader.state_dict()
    data.set_epoch(1)
    expected = known.of(loader)
    assert len(expected) == ROWS
    resumed = opened(outputs / "color-images")
    resumed.set_epoch(1)
    loader = StatefulDataLoader(resumed, batch_size=4, num_workers=workers)
    loader.load_state_dict(state)
    assert known.of(loader) == expected


def test_without_workers_the_dataset_s_own_state_will_do(outputs: Path, known: Known, decoded: list[int]) -> None:
    data = opened(outputs / "color-images")
    data.set_epoch(2)
    rows = iter(DataLoader(data, batch_size=4))
    list(islice(rows, 3))
    state = json.loads(json.dumps(data.state_dict()))
    assert (state["epoch"], state["rows"]) == (2, 12)
    after = known.of(rows)
    decoded.clear()
    again = opened(outputs / "color-images")
    again.load_state_dict(state)
    again.set_epoch(2)  # as a loop over epochs does
    assert known.of(DataLoader(again, batch_size=4)) == after
    assert len(decoded) == ROWS - 12
    assert again.state_dict()["rows"] == ROWS
    assert len(known.of(again)) == ROWS


@pytest.mark.usefixtures("small_windows")
def test_what_is_skipped_is_not_decoded(outputs: Path, decoded: list[int]) -> None:
    data = opened(outputs / "color-images")
    state = {**data.state_dict(), "rows": 44}
    data.load_state_dict(state)
    assert len(list(data)) == len(decoded) == ROWS - 44
    # A state is for one iteration, and for its epoch.
    assert len(list(data)) == ROWS
    data.load_state_dict({**state, "epoch": 3})
    data.set_epoch(4)
    assert len(list(data)) == ROWS


@pytest.mark.parametrize("stay", [False, True])
def test_a_state_that_does_not_reach_the_workers_is_refused_when_they_read(
    outputs: Path, stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After an error a loader waits for each of its workers, for 5 seconds as it is.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    data = opened(outputs / "color-images")
    list(islice(DataLoader(data, batch_size=4), 3))
    state = data.state_dict()
    loader = DataLoader(data, batch_size=4, num_workers=2, persistent_workers=stay)
    assert sum(1 for _ in loader) == 14
    data.load_state_dict(state)
    for _ in range(2):  # nor is it forgotten
        with pytest.raises(ConfigError, match=r"\bstate: .*\bStatefulDataLoader\b") as caught:
            list(loader)
        let_go(caught)
    data.set_epoch(1)
    assert sum(1 for _ in loader) == 14
    # Their iterators would wait in another test.
    del caught, loader
    gc.collect()


def test_a_state_of_something_else_is_refused(outputs: Path) -> None:
    data = opened(outputs / "color-images")
    state = data.state_dict()
    others: list[dict[str, Any]] = [{"epsilons": ["2/255"]}, {"clean": 0.4}, {"seed": 1}, {"shuffle": False}]
    for options in others:
        with pytest.raises(ConfigError, match=r"^state: .*\bseed\b"):
            opened(outputs / "color-images", **options).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"^state: .*\bseed\b"):
        opened(outputs / "color-signs").load_state_dict(state)
    with pytest.raises(ConfigError, match=r"^state: .* 0 of 1 with 1 .* 1 of 2 with 1 "):
        opened(outputs / "color-images", rank=1, world_size=2).load_state_dict(state)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epsilons": ["8"]}, r"epsilons: 8 .* 8/255\.$"),
        ({"epsilons": [0.001]}, r"epsilons: 0\.001 .*1/255"),
        ({"epsilons": ["large"]}, "epsilons: 'large' .*k/255"),
        ({"epsilons": ["8/255", 0.032]}, r"epsilons: 8/255 and 0\.032 .* 8/255;"),
        ({"epsilons": []}, r"epsilons: .*\[\]; .*'8/255'"),
        ({"epsilons": ["8/255", 0]}, "epsilons: 0 .*`clean`"),
        ({"clean": 1.5}, "clean: .*1.5;"),
        ({"clean": -0.1}, "clean: .*-0.1;"),
        ({"clean": math.nan}, "clean: .*nan;"),
        ({"clean": True}, "clean: .*True;"),
        ({"seed": -1}, "seed: .*-1;"),
        ({"seed": 0.5}, "seed: .*0.5;"),
        ({"rank": 2, "world_size": 2}, "rank, world_size: .* 2 of 2;"),
        ({"rank": 0}, "rank, world_size: .* 0 of None;"),
        ({"split": "train"}, r"split: FOLDER .*'train'; .* test\.$"),
    ],
)
def test_what_cannot_be_is_one_sentence(outputs: Path, options: dict[str, Any], named: str) -> None:
    folder = outputs / "color-images"
    with pytest.raises(ConfigError, match=f"^{named.replace('FOLDER', str(folder))}"):
        pipeline.training_dataset(folder, **{"split": "test", **options})


def test_folders_that_are_none_of_ours_are_one_sentence(image_parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f" {tmp_path / 'nowhere'}"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=rf"^{image_parquet} .*manifest\.json"):
        opened(image_parquet)


def test_unlabelled_images_are_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(**KINDS["unlabelled"](tmp_path)))
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'out'}: 5 .* 20 .*'test' .*label"):
        opened(tmp_path / "out")


def test_a_split_without_images_is_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    write_sealed(tmp_path / "out/manifest.json", {**manifest, "complete": False, "subsets": [], "files": []})
    with pytest.raises(ConfigError, match=rf"^split: {tmp_path / 'out'} .*'test' .*fgsm generate"):
        opened(tmp_path / "out")


def test_a_file_that_is_listed_in_one_subset_only_is_one_sentence(outputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(outputs / "color-images", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    name = shard_path(folder, "eps-8/test-00001-of-00003.parquet").name
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != f"eps-8/{name}"]
    write_sealed(folder / "manifest.json", manifest)
    with pytest.raises(PipelineError, match=rf"^manifest\.json .*{folder}/eps-8/{name}; .*fgsm verify"):
        opened(folder)


def test_an_epoch_below_0_is_one_sentence(outputs: Path) -> None:
    data = opened(outputs / "color-images")
    with pytest.raises(ConfigError, match=r"^epoch: .*-1;"):
        data.set_epoch(-1)


def test_a_seed_of_numpy_is_that_number(outputs: Path, known: Known) -> None:
    data, other = (opened(outputs / "color-images", seed=seed) for seed in (np.int64(3), 3))
    assert known.of(data) == known.of(other)
    assert data.digest == other.digest


def test_missing_and_altered_files_are_one_sentence(outputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(outputs / "color-images", folder)
    file = shard_path(folder, "eps-8/test-00001-of-00003.parquet")
    content = file.read_bytes()
    file.unlink()
    missing = pytest.raises(PipelineError, match=rf"^{file} .*{os.strerror(errno.ENOENT)}")
    with missing, pytest.warns(UserWarning, match=rf"^{folder} .*\b2 of 3 "):
        opened(folder)
    file.write_bytes(content[:-100])
    with pytest.raises(PipelineError, match=rf"^{file} .*\bsize\b"):
        opened(folder)
    file.write_bytes(content[:-100] + bytes(100))
    with pytest.raises(PipelineError, match=rf"^{file} .*manifest\.json"):
        opened(folder)
    # Other epsilons can still be read.
    assert len(list(opened(folder, epsilons=["2/255"]))) == ROWS
    file.write_bytes(content)
    data = opened(folder)
    file.unlink()
    with pytest.raises(PipelineError, match=rf"^{file} .*fgsm verify"):
        list(data)


@pytest.mark.parametrize(
    ("name", "column", "damage"),
    [
        ("color-images", "image", "cut"),
        ("color-images", "image", "other"),
        ("color-signs", "sign", "cut"),
        ("gray-signs", "sign", "value"),
        ("color-signs-bits", "sign", "short"),
    ],
)
def test_damaged_pictures_are_one_sentence(outputs: Path, tmp_path: Path, name: str, column: str, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(outputs / name, folder)
    subset = "signs" if "signs" in name else "eps-2"
    file = shard_path(folder / subset, "test-00002-of-00003.parquet")
    rows = pq.ParquetFile(file).read().to_pylist()
    field = "positive" if damage == "short" else "bytes"
    good = rows[0][column][field]
    rows[0][column][field] = {
        "cut": good[:30],
        "short": good[:-1],
        "other": png_bytes(random_pixels(1)[0]),  # not in the dataset's format
        "value": png_bytes(np.full((16, 16, 1), 3, dtype=np.uint8)),
    }[damage]
    table = pq.ParquetFile(file).schema_arrow
    pq.write_table(pa.Table.from_pylist(rows, schema=table), file)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == f"{subset}/{file.name}":
            entry["bytes"] = file.stat().st_size
    write_sealed(folder / "manifest.json", manifest)
    data = opened(folder, epsilons=["2/255"], clean=0)
    with pytest.raises(PipelineError, match=r"picture .*fgsm verify"):
        list(data)


# ------------------------------------------------------------------------------------------------- from the Hub


def downloads(hub: Hub) -> list[str]:
    """The files that were downloaded, by their names."""
    return [path.split("/resolve/")[1].split("/", 1)[1] for path in hub.asked("GET", "/resolve/")]


def test_a_hub_id_will_do(outputs: Path, known: Known, hub: Hub) -> None:
    push(hub, outputs / "color-images", ignore=".run")
    data = opened(Path("user/name"), epsilons=["2/255"], clean=0.5)
    assert sorted(known.of(data)) == sorted(known.of(opened(outputs / "color-images", epsilons=["2/255"])))
    # Only what is needed was fetched, and once.
    folders = Counter(name.split("/")[0] for name in downloads(hub))
    assert folders == {"manifest.json": 1, "clean": 3, "eps-2": 3}
    opened(Path("user/name"), epsilons=["2/255"])
    assert len(downloads(hub)) == 7


def test_hub_errors_are_one_sentence(outputs: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(ConfigError, match=r"^user/name .*manifest\.json"):
        opened(Path("user/name"))
    with pytest.raises(ConfigError, match=r" user/other, .*hf auth login"):
        opened(Path("user/other"))
    push(hub, outputs / "color-images", ignore="eps-8")
    with pytest.raises(PipelineError, match=r"/eps-8/\S+ .*manifest\.json"):
        opened(Path("user/name"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r" user/third, .*: ") as caught:
        opened(Path("user/third"))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- importing


@pytest.mark.slow
def test_training_loads_neither_attack_nor_victim_nor_datasets() -> None:
    loaded = loaded_by("from pipeline import training_dataset")
    own = {name for name in loaded if name.startswith("pipeline.")}
    assert {name.split(".")[1] for name in own} == {"core", "config", "layouts", "output", "read"}
    assert not {"datasets", "torchvision", "huggingface_hub"} & loaded
    assert "training_dataset" in pipeline.__all__
