"""Epochs follow each other by themselves, and each is whole, however the dataset is read and whatever came before."""

import copy
import gc
import pickle
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline
from pipeline.core.errors import PipelineError
from pipeline.read import epochs
from pipeline.read.dataset import TrainingDataset
from tests.conftest import let_go

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.15
]

ROWS = 11
# Images of an epoch with their labels, in any order.
Rows = tuple[tuple[bytes, int], ...]


def rows_of(read: Iterable[Any]) -> Rows:
    """What was read from a dataset or from a loader."""
    found = []
    for images, labels in read:
        single = images.ndim == 3
        for image, label in zip([images] if single else images, [labels] if single else labels, strict=True):
            found.append((image.numpy().tobytes(), int(label)))
    return tuple(sorted(found))


@pytest.fixture
def data(finished: Path) -> TrainingDataset:
    return pipeline.training_dataset(finished, "test")


@pytest.fixture(scope="module")
def known(finished: Path) -> dict[Rows, int]:
    """The epochs by what they hold: each image once, in a draw of the epoch's own."""
    alone = pipeline.training_dataset(finished, "test")
    found = {}
    for epoch in range(12):
        alone.set_epoch(epoch)
        found[rows_of(alone)] = epoch
    assert {len(rows) for rows in found} == {ROWS}
    assert len(found) == 12
    return found


WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "workers": {"num_workers": 2},
    "more workers": {"num_workers": 3, "prefetch_factor": 1},
    "workers that stay": {"num_workers": 2, "persistent_workers": True},
    "forkserver": {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "forkserver"},
}


def pairs(chosen: set[tuple[Any, Any]], *values: Iterable[Any]) -> list[Any]:
    """All combinations; those that are not chosen are slow, as each starts processes several times."""
    return [pytest.param(*each, marks=[] if each in chosen else pytest.mark.slow) for each in product(*values)]


@pytest.mark.parametrize(
    ("way", "kind"),
    pairs(
        {("alone", DataLoader), ("workers", DataLoader), ("workers that stay", StatefulDataLoader)},
        *(WAYS, (DataLoader, StatefulDataLoader)),
    ),
)
@pytest.mark.usefixtures("processes")
def test_each_iteration_is_of_the_next_epoch(
    data: TrainingDataset, known: dict[Rows, int], kind: Any, way: str
) -> None:
    loader = kind(data, batch_size=2, **WAYS[way])
    assert [known[rows_of(loader)] for _ in range(2)] == [0, 1]
    # One that is left early is one, too.
    next(iter(loader))
    gc.collect()
    assert known[rows_of(loader)] == 3
    data.set_epoch(1)
    assert [known[rows_of(loader)] for _ in range(2)] == [1, 2]
    for epoch in (5, 5, 0):
        data.set_epoch(epoch)
        assert known[rows_of(loader)] == epoch


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_workers_that_import_everything_anew_count_alike(
    data: TrainingDataset, known: dict[Rows, int], kind: Any
) -> None:
    next(iter(data))
    for epoch in (1, 2):
        loader = kind(data, batch_size=2, num_workers=2, multiprocessing_context="spawn")
        assert known[rows_of(loader)] == epoch


def test_readers_of_all_sorts_take_turns(data: TrainingDataset, known: dict[Rows, int]) -> None:
    next(iter(data))
    found = []
    for workers in (2, 3, 0, 2, 1):
        # The same seed in every epoch says nothing of which it is.
        torch.manual_seed(0)
        found.append(known[rows_of(DataLoader(data, batch_size=2, num_workers=workers))])
    assert found == [1, 2, 3, 4, 5]
    assert known[rows_of(data)] == 6


def test_iterations_at_the_same_time_are_each_of_one_epoch(data: TrainingDataset, known: dict[Rows, int]) -> None:
    loaders = [DataLoader(data, batch_size=2, num_workers=2) for _ in range(3)]
    for _ in range(2):
        batches = zip(*loaders, strict=True)
        for rows in zip(*batches, strict=True):
            assert rows_of(rows) in known


def _sleep_in(late: int, worker: int) -> None:
    if worker == late:
        time.sleep(60)


def test_a_worker_that_had_not_begun_when_the_loop_was_left_is_not_behind(
    data: TrainingDataset, known: dict[Rows, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    next(iter(DataLoader(data, batch_size=2, num_workers=2, worker_init_fn=partial(_sleep_in, 1))))
    gc.collect()
    assert known[rows_of(DataLoader(data, batch_size=2, num_workers=2))] == 1


class Repeated(IterableDataset[Any]):
    """Reads a dataset several times, as an endless stream does; in one worker, or in all."""

    def __init__(self, data: TrainingDataset, times: int, worker: int | None = None) -> None:
        self.data, self.times, self.worker = data, times, worker

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        for _ in range(self.times):
            if self.worker is None or (info and info.id == self.worker):
                yield from self.data


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_several_epochs(data: TrainingDataset, known: dict[Rows, int], workers: int) -> None:
    # So many that workers whose shares differ by a row drift apart.
    stream = DataLoader(Repeated(data, 12), batch_size=1, num_workers=workers, prefetch_factor=1 if workers else None)
    assert rows_of(stream) == tuple(sorted(row for rows in known for row in rows))


def test_a_worker_that_waits_for_another_in_vain_says_so(
    data: TrainingDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs, "WAIT_SECONDS", 0.1)
    with pytest.raises(PipelineError, match=r"PipelineError: Worker 0\b") as caught:
        list(DataLoader(Repeated(data, 1, worker=1), num_workers=2))
    let_go(caught)


@pytest.mark.parametrize("of", ["copy", "pickle"])
def test_a_copy_counts_for_itself(data: TrainingDataset, known: dict[Rows, int], of: str) -> None:
    assert known[rows_of(data)] == 0
    other = copy.deepcopy(data) if of == "copy" else pickle.loads(pickle.dumps(data))
    loader = DataLoader(other, batch_size=2, num_workers=2, persistent_workers=True)
    assert [known[rows_of(loader)] for _ in range(2)] == [1, 2]
    other.set_epoch(7)
    assert known[rows_of(loader)] == 7
    assert known[rows_of(data)] == 1


# ------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("way", "taken"),
    pairs(
        {("alone", 0), ("alone", 3), ("alone", None), ("workers that stay", None)},
        *(("alone", "workers", "workers that stay"), (0, 3, None)),
    ),
)
def test_after_a_resumed_epoch_comes_the_next(
    finished: Path, known: dict[Rows, int], way: str, taken: int | None
) -> None:
    def loader(epoch: int | None) -> Any:
        data = pipeline.training_dataset(finished, "test")
        if epoch is not None:
            data.set_epoch(epoch)
        return StatefulDataLoader(data, batch_size=2, **WAYS[way])

    first = loader(3)
    rows = iter(first)
    before = list(islice(rows, taken))
    state = first.state_dict()
    after = rows_of(rows)
    for set_to, following in ((None, [4, 5]), (3, [4, 5]), (4, [4, 5]), (8, [8, 9])):
        again = loader(set_to)
        again.load_state_dict(state)
        if taken is None:
            # Of the epoch that was over nothing comes.
            assert len(before) >= 6
        else:
            assert rows_of(again) == after
        assert [known[rows_of(again)] for _ in range(2)] == following


def test_after_the_dataset_s_own_state_comes_the_next_epoch(data: TrainingDataset, known: dict[Rows, int]) -> None:
    data.set_epoch(4)
    list(islice(data, 3))
    state = data.state_dict()
    assert (state["epoch"], state["rows"]) == (4, 3)
    for epoch in (None, 2):
        if epoch is not None:
            data.set_epoch(epoch)
        data.load_state_dict(state)
        assert len(list(data)) == ROWS - 3
        assert known[rows_of(data)] == (5 if epoch is None else epoch)


# ------------------------------------------------------------------------------------------------- ranks


def _rank(rank: int, store: str, data: TrainingDataset, options: dict[str, Any], results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loader = DataLoader(data, batch_size=2, **options)
    found = [rows_of(loader) for _ in range(2)]
    data.set_epoch(7)
    results.put((rank, [*found, rows_of(loader), rows_of(loader)]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["alone", "workers", "workers that stay"])
def test_ranks_that_were_given_one_dataset_count_alike(
    data: TrainingDataset, known: dict[Rows, int], tmp_path: Path, way: str
) -> None:
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    data.set_epoch(2)
    arguments = (str(tmp_path / "store"), data, WAYS[way], results)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    whole = [tuple(sorted(one + other)) for one, other in zip(found[0], found[1], strict=True)]
    assert [known[rows] for rows in whole] == [2, 3, 7, 8]
