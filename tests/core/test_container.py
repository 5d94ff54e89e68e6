"""What a container, or a job of Slurm or systemd, may use of a machine."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline.core import container
from pipeline.core.cores import available_cores
from pipeline.core.memory import available_bytes

Limit = Callable[..., None]


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Set files of the control groups of this process: its own, /job/step, or one around it. The machine has 16 cores
    and 5,000 free bytes."""
    monkeypatch.setattr(container, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(container, "OWN", tmp_path / "own")
    monkeypatch.setattr("pipeline.core.cores.os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    (tmp_path / "own").write_text("12:cpuset:/old\n0::/job/step\n")

    def write(group: str = "", **files: str) -> None:
        folder = tmp_path / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(f"{content}\n")

    return write


def test_without_a_limit_all_is_there(limit: Limit) -> None:
    assert (available_cores(), available_bytes()) == (16, 5000)
    limit(cpu_max="max 100000", memory_max="max", memory_current="1000")
    assert (available_cores(), available_bytes()) == (16, 5000)


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("150000", 2), ("1000", 1), ("9900000", 16)])
def test_a_quota_of_time_counts_as_cores(limit: Limit, quota: str, cores: int) -> None:
    limit("job/step", cpu_max=f"{quota} 100000")
    assert available_cores() == cores


def test_the_smallest_limit_of_all_groups_counts(limit: Limit) -> None:
    limit("job/step", memory_max="4000", memory_current="1000", cpu_max="max 100000")
    limit("job", memory_max="3000", memory_current="1000", cpu_max="300000 100000")
    limit("", memory_max="9000", memory_current="1000", cpu_max="400000 100000")
    assert (available_cores(), available_bytes()) == (3, 2000)


def test_files_in_memory_do_not_count_as_used(limit: Limit) -> None:
    limit("job", memory_max="3000", memory_current="2900", memory_stat="anon 500\ninactive_file 2000")
    assert available_bytes() == 2100


def test_a_machine_without_groups_has_what_it_has(limit: Limit, tmp_path: Path) -> None:
    del limit
    (tmp_path / "own").unlink()
    assert (available_cores(), available_bytes()) == (16, 5000)
