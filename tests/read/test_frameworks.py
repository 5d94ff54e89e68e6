"""Training with Lightning and accelerate as people write it: epochs differ, and each has every image once."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline
from pipeline.core.errors import ConfigError
from pipeline.read.dataset import TrainingDataset
from tests.conftest import WriteConfig, generate_once

pytestmark = [
    pytest.mark.slow,  # they import for seconds, and start processes
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.15
]

ROWS = 40
BATCH = 10
# Images of an epoch with their labels, in any order.
Rows = tuple[tuple[str, int], ...]
WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "workers": {"num_workers": 2},
    "workers that stay": {"num_workers": 2, "persistent_workers": True},
}


def rows_of(batch: Any) -> Rows:
    """Short, so that a pipe holds those of a whole run."""
    images, labels = batch
    keys = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in images]
    return tuple(zip(keys, labels.tolist(), strict=True))


def opened(folder: Path, **options: Any) -> TrainingDataset:
    return pipeline.training_dataset(folder, "test", **options)


@pytest.fixture
def folder(write_config: WriteConfig, tmp_path: Path) -> Path:
    generate_once(write_config())
    return tmp_path / "out"


@pytest.fixture
def known(folder: Path) -> dict[Rows, int]:
    """The epochs by what they hold: each image once, in a draw of the epoch's own."""
    alone = opened(folder)
    found = {}
    for epoch in range(8):
        alone.set_epoch(epoch)
        (batch,) = DataLoader(alone, batch_size=ROWS)
        found[tuple(sorted(rows_of(batch)))] = epoch
    assert {len(rows) for rows in found} == {ROWS}
    assert len(found) == 8
    return found


# ------------------------------------------------------------------------------------------------- Lightning


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a `Trainer` on the CPU that writes and shows nothing."""
    with warnings.catch_warnings():
        # Those of Lightning itself, of what these tests do not use.
        warnings.simplefilter("ignore")
        import lightning

        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        yield partial(lightning.Trainer, accelerator="cpu", default_root_dir=tmp_path, **quiet)


def recorder(record: Callable[[int, Rows], Any]) -> Any:
    """A LightningModule that tells the epoch and what is in each batch."""
    import lightning

    class Net(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            del index
            record(self.current_epoch, rows_of(batch))
            return self.layer(torch.ones(1, 1)).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Net()


@pytest.mark.parametrize("way", WAYS)
def test_lightning_sees_an_epoch_after_the_other(
    folder: Path, known: dict[Rows, int], trainer: Callable[..., Any], way: str
) -> None:
    seen: dict[int, list[Any]] = {}
    loader = DataLoader(opened(folder), batch_size=BATCH, **WAYS[way])
    trainer(max_epochs=3, enable_checkpointing=False).fit(
        recorder(lambda epoch, rows: seen.setdefault(epoch, []).extend(rows)), loader
    )
    assert {epoch: known[tuple(sorted(rows))] for epoch, rows in seen.items()} == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("way", WAYS)
def test_lightning_goes_on_from_a_checkpoint_with_a_stateful_loader(
    folder: Path, known: dict[Rows, int], trainer: Callable[..., Any], way: str, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    seen: dict[int, list[Any]] = {}

    def fit(steps: int, **options: Any) -> None:
        """Train until so many steps have been made, and be stopped in the next."""
        made: list[int] = []

        def record(epoch: int, rows: Rows) -> None:
            if len(made) == steps:
                raise InterruptedError
            made.append(epoch)
            seen.setdefault(epoch, []).extend(rows)

        loader = StatefulDataLoader(opened(folder), batch_size=BATCH, **WAYS[way])
        saving = ModelCheckpoint(tmp_path, "half", every_n_train_steps=6)
        trainer(max_epochs=3, callbacks=[saving]).fit(recorder(record), loader, **options)

    # In the middle of the second of three epochs of four steps.
    with pytest.raises(InterruptedError):
        fit(6)
    fit(6, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert {epoch: known[tuple(sorted(rows))] for epoch, rows in seen.items()} == {0: 0, 1: 1, 2: 2}


def test_lightning_ranks_share_an_epoch(folder: Path, known: dict[Rows, int], trainer: Callable[..., Any]) -> None:
    results = torch.multiprocessing.get_context("fork").SimpleQueue()
    data = opened(folder)
    net = recorder(lambda epoch, rows: results.put((epoch, rows)))
    loader = DataLoader(data, batch_size=BATCH, num_workers=1, persistent_workers=True)
    fit = trainer(max_epochs=3, strategy="ddp_fork", devices=2, enable_checkpointing=False)
    fit.fit(net, loader)
    seen: dict[int, list[Any]] = {}
    for _ in range(3 * ROWS // BATCH):
        epoch, rows = results.get()
        seen.setdefault(epoch, []).extend(rows)
    assert {epoch: known[tuple(sorted(rows))] for epoch, rows in seen.items()} == {0: 0, 1: 1, 2: 2}


# ------------------------------------------------------------------------------------------------- accelerate


@pytest.fixture
def accelerate() -> Iterator[Any]:
    import accelerate

    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("way", WAYS)
def test_accelerate_in_one_process(folder: Path, known: dict[Rows, int], accelerate: Any, way: str) -> None:
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(opened(folder), batch_size=BATCH, **WAYS[way]))
    seen = [tuple(sorted(row for batch in loader for row in rows_of(batch))) for _ in range(3)]
    assert [known[rows] for rows in seen] == [0, 1, 2]


def _train(prepared: bool, dispatch: bool | None, folder: Path, workers: int, results: Any) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    try:
        opened(folder)
    except ConfigError as error:
        results.put((-1, str(error)))
    place = (0, 1) if prepared else (accelerator.process_index, accelerator.num_processes)
    data = opened(folder, rank=place[0], world_size=place[1])
    loader = DataLoader(data, batch_size=BATCH, num_workers=workers)
    if prepared:
        loader = accelerator.prepare(loader)
    for epoch in range(3):
        for batch in loader:
            results.put((epoch, rows_of(batch)))


@pytest.mark.parametrize(
    ("prepared", "dispatch", "workers"),
    [(True, None, 0), (True, None, 2), (True, False, 0), (True, False, 2), (False, None, 0), (False, None, 2)],
)
def test_accelerate_in_two_processes(
    folder: Path, known: dict[Rows, int], accelerate: Any, prepared: bool, dispatch: bool | None, workers: int
) -> None:
    results = torch.multiprocessing.get_context("fork").SimpleQueue()
    accelerate.debug_launcher(_train, (prepared, dispatch, folder, workers, results), num_processes=2)
    seen: dict[int, list[Any]] = {}
    errors = []
    while not results.empty():
        epoch, rows = results.get()
        if epoch < 0:
            errors.append(rows)
        else:
            seen.setdefault(epoch, []).extend(rows)
    assert {epoch: known[tuple(sorted(rows))] for epoch, rows in seen.items()} == {0: 0, 1: 1, 2: 2}
    # Nobody has said who shares the images out.
    assert len(errors) == 2
    assert all(error.startswith("rank, world_size: ") for error in errors)
