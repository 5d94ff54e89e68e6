"""How many processes share a run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from pipeline.config.load import load_config
from pipeline.core import memory
from pipeline.core.lanes import given_cores
from pipeline.core.plan import Shard
from pipeline.engine import processes
from pipeline.engine.processes import Processes, share_machine
from pipeline.engine.run import Run, open_run
from tests.conftest import WriteConfig

GIB = 2**30


@pytest.fixture
def run(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on a CPU of a machine with 16 cores and any memory."""
    monkeypatch.setattr("pipeline.core.lanes.os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(processes, "available_bytes", lambda: 1000 * GIB)
    return open_run(load_config(str(write_config())))


def asking(run: Run, count: int | str) -> Run:
    runtime = run.config.runtime.model_copy(update={"processes": count})
    return replace(run, config=run.config.model_copy(update={"runtime": runtime}))


def shards_of(count: int, rows: int | None) -> list[Shard]:
    return [Shard("test", index, count, 0, rows) for index in range(count)]


def on_gpus(run: Run, monkeypatch: pytest.MonkeyPatch, gpus: int, free: int, peak: int, held: int = 0) -> Run:
    """The run on so many GPUs of 80 GiB, of the first of which so many bytes are free."""
    monkeypatch.setattr(processes, "rehearse", lambda *_: None)
    for name, value in {
        "device_count": gpus,
        "mem_get_info": (free, 80 * GIB),
        "max_memory_reserved": peak,
        "memory_reserved": held,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return replace(run, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("shards", "count"),
    [
        (shards_of(1000, 4096), 8),  # no more on any CPU
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
        assert share_machine(run, shards_of(1000, 4096)).count == count


def test_memory_limits_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB)))
    for free, count in [(1, 1), (2, 2), (5, 3)]:
        monkeypatch.setattr(processes, "available_bytes", lambda free=free: free * GIB)
        assert share_machine(run, shards_of(1000, 4096)).count == count


def test_a_number_is_taken_as_it_is(run: Run) -> None:
    assert share_machine(asking(run, 3), shards_of(100, 1)) == Processes(3)
    assert share_machine(asking(run, 3), shards_of(2, 1)) == Processes(2), "but for shards that are missing"
    assert share_machine(asking(run, 1), shards_of(100, 10_000)) == Processes()


def test_on_a_gpu_memory_and_cores_limit_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    many = shards_of(1000, 4096)
    # 1.25 times 4 GiB and one for CUDA; this process holds its 4 GiB already, and its own share of CUDA's.
    run = on_gpus(run, monkeypatch, 1, free=75 * GIB, peak=4 * GIB, held=4 * GIB)
    assert share_machine(run, many) == Processes(4, 1, 6 / 80)
    with given_cores(4):
        assert share_machine(run, many).count == 2
    run = on_gpus(run, monkeypatch, 1, free=13 * GIB, peak=4 * GIB, held=4 * GIB)
    assert share_machine(run, many) == Processes(3, 1, 6 / 80)
    run = on_gpus(run, monkeypatch, 1, free=39 * GIB, peak=40 * GIB, held=40 * GIB)
    assert share_machine(run, many).count == 1


def test_several_gpus_have_processes_each(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = on_gpus(run, monkeypatch, 4, free=39 * GIB, peak=40 * GIB, held=40 * GIB)
    assert share_machine(run, shards_of(1000, 4096)) == Processes(4, 4, 51 / 80)
    assert share_machine(asking(run, 8), shards_of(1000, 4096)) == Processes(8, 4)


@pytest.mark.parametrize(("gpus", "count"), [(1, 1), (4, 4)])
def test_where_a_batch_no_longer_fits_a_gpu_it_has_no_second_process(
    gpus: int, count: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError

    run = on_gpus(run, monkeypatch, gpus, free=0, peak=0)
    monkeypatch.setattr(processes, "rehearse", refuse)
    assert share_machine(run, shards_of(1000, 4096)) == Processes(count, gpus)


def test_a_device_of_another_kind_has_one(run: Run) -> None:
    assert share_machine(replace(run, device=torch.device("mps")), shards_of(1000, 4096)) == Processes()


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("3000", "1000", 2000), ("max", "1000", 5000), ("9000", "1000", 5000), (None, None, 5000)],
)
def test_the_memory_of_a_container_counts(
    limit: str | None, used: str | None, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    contents: dict[str, Any] = {"memory.max": limit, "memory.current": used}
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_text(f"{content}\n")
    assert memory.available_bytes() == left
