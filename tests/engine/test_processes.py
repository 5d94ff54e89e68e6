"""How many processes share a run."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline.config.load import load_config
from pipeline.core.cores import given_cores
from pipeline.core.plan import Shard
from pipeline.engine import processes
from pipeline.engine.processes import Processes, share_machine
from pipeline.engine.run import Run, open_run
from tests.conftest import WriteConfig

MANY = [Shard("test", index, 1000, 0, 4096) for index in range(1000)]


@pytest.fixture
def run(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on a CPU of a machine with 16 cores and any memory."""
    monkeypatch.setattr("pipeline.core.cores.os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(processes, "available_bytes", lambda: 2**50)
    return open_run(load_config(str(write_config())))


def asking(run: Run, count: int) -> Run:
    runtime = run.config.runtime.model_copy(update={"processes": count})
    return replace(run, config=run.config.model_copy(update={"runtime": runtime}))


def shards_of(count: int, rows: int | None) -> list[Shard]:
    return [Shard("test", index, count, 0, rows) for index in range(count)]


@pytest.mark.parametrize(
    ("shards", "count"),
    [
        (shards_of(1000, 4096), 8),  # no more are started unasked
        (shards_of(7, 4096), 1),  # too short a run to repay another start
        (shards_of(8, 4096), 2),
        (shards_of(2, 100_000), 2),  # no more than there are shards
        (shards_of(1, 100_000), 1),
        (shards_of(12, None), 3),  # a shard of unknown length counts as one of the default size
    ],
)
def test_a_long_run_is_worth_several_processes(run: Run, shards: list[Shard], count: int) -> None:
    assert share_machine(run, shards) == Processes(count)


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 2), (3, 3), (16, 8)])
def test_each_has_a_core_of_its_own(run: Run, cores: int, count: int) -> None:
    with given_cores(cores):
        assert share_machine(run, MANY).count == count


def test_beside_processes_that_it_does_not_know_of_it_stays_one(run: Run) -> None:
    assert share_machine(run, MANY, alone=False) == Processes()
    assert share_machine(asking(run, 3), MANY, alone=False) == Processes(3), "unless it is told"


def test_memory_limits_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each needs what this one has by now, and its batches: 6 images of 3x16x16, in 3 pictures, 4 times over. Each of
    16 cores may take a GiB."""
    held, in_flight = 10_000, 6 * 3 * 16 * 16 * (3 * 4 + 17)
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=held))
    monkeypatch.setattr(psutil, "Process", lambda: memory)
    for count, free in [(1, 0), (1, -held), (1, 2 * in_flight + held - 1), (2, 2 * in_flight + held), (8, 2**40)]:
        monkeypatch.setattr(processes, "available_bytes", lambda free=free: free + 16 * 2**30)
        assert share_machine(run, MANY).count == count, free


def test_a_number_is_taken_as_it_is(run: Run) -> None:
    assert share_machine(asking(run, 3), shards_of(100, 1)) == Processes(3)
    assert share_machine(asking(run, 3), shards_of(2, 1)) == Processes(2), "but for shards that are missing"
    assert share_machine(asking(run, 1), MANY) == Processes()
    assert share_machine(asking(run, 3), []) == Processes(), "where others write all that is missing"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_unasked_a_device_of_another_kind_has_one(run: Run, device: str) -> None:
    assert share_machine(replace(run, device=torch.device(device)), MANY) == Processes()


def test_on_gpus_each_has_its_part_of_the_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = ["H100", "H100", "T400", "H100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(name=gpus[number], total_memory=1)
    )
    run = replace(run, device=torch.device("cuda"))
    alike = (0, 1, 3)
    for count, share in [(3, None), (4, 0.5), (9, 1 / 3)]:  # one each needs no limit
        shared = share_machine(asking(run, count), MANY)
        assert shared == Processes(count, alike)
        assert shared.gpu_share == share
