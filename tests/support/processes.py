"""Real processes for tests: started, waited for, held at a gate, lost."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

SLOW = """

class Slow(Net):
    def forward(self, x):
        import time

        time.sleep(0.02)
        return super().forward(x)


class Deaf(Net):
    # One operator that runs for a minute and that no Python signal handler can interrupt.
    def forward(self, x):
        import hashlib, pathlib

        if len(x) > 1:
            pathlib.Path(__file__).with_name("deaf").touch()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        return super().forward(x)
"""


GATED = """

import os, pathlib, time

HERE = pathlib.Path(__file__).parent


class Gated(Net):
    def forward(self, x):
        # While there is a gate, the first that meets the white image takes it, says on which node, and stays for good.
        if len(x) > 1 and (x.flatten(1).amin(1) == 1).any():
            node = os.environ.get("NODE", "none")
            try:
                (HERE / "gate").rename(HERE / f"held by {node}")
                time.sleep(1000)
            except FileNotFoundError:
                (HERE / "passed").write_text(node)
        return super().forward(x)
"""


def driver_of(address: str) -> Callable[[], None]:
    """What makes a process a driver of the Ray cluster at an address that this one has started.

    Ray looks at its environment as it is imported, so it stands here, where nothing imports it.
    """
    return partial(_drive, address, os.environ.get("RAY_AUTH_MODE", "disabled"))


def _drive(address: str, auth: str) -> None:
    os.environ.update(RAY_ADDRESS=address, RAY_AUTH_MODE=auth, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")


def run_fgsm(cache: str, log: str, arguments: list[str], prepare: Callable[[], None] | None = None) -> None:
    """The body of a process: the console command, in a group of its own, its output in a file or terminal.

    What `prepare` does to the process comes right before.
    """
    import datasets

    from pipeline.cli import main

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    # As in a process that a shell starts, not as in a child of a fork server.
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Not closed with the streams, which the command replaces.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["fgsm", *arguments]
    if prepare:
        prepare()
    main()


Start = Callable[..., Any]


@pytest.fixture
def start(processes: Any, tmp_path: Path) -> Any:
    """Start `fgsm` with some arguments in a process of its own."""
    started = []

    def begin(*arguments: str | Path, log: str | None = None) -> Any:
        target = log or str(tmp_path / "log")
        process = processes.Process(target=run_fgsm, args=(str(tmp_path / "cache"), target, [*map(str, arguments)]))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def holds(out: Path, process: Any) -> bool:
    lock = out / ".run/lock"
    return not process.is_alive() or (lock.exists() and lock.read_text() == str(process.pid))


def receipts(out: Path) -> int:
    return len(list((out / ".run/receipts").glob("*.json")))


def group_is_gone(group: int) -> bool:
    """Whether no process of a group runs; the dead that nobody has buried do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            return False
    return True


def lose_a_node(folder: Path, start: Callable[[str], tuple[Any, Path]]) -> None:
    """Remove one of two nodes in the middle of its shard: the run ends well on the other.

    Args:
        folder: where the run's victim lies, which is `Gated`.
        start: begins the run, as a driver of the cluster at an address; its process, and the log of what it says.
    """
    from ray.cluster_utils import Cluster

    (folder / "gate").touch()
    (folder / "passed").unlink(missing_ok=True)
    noticed_soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 10}
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": noticed_soon, "include_dashboard": False}
    )
    try:
        workers = {name: nodes.add_node(num_cpus=1, env_vars={"NODE": name}) for name in ("a", "b")}
        driver, log = start(nodes.address)
        wait_for(lambda: not driver.is_alive() or any(folder.glob("held by *")), 150)
        assert driver.is_alive(), log.read_text()
        (held,) = folder.glob("held by *")
        lost = held.name.removeprefix("held by ")
        assert not (folder / "passed").exists()
        nodes.remove_node(workers[lost], allow_graceful=False)
        driver.join(150)
        assert driver.exitcode == 0, log.read_text()
    finally:
        nodes.shutdown()
    assert {lost, (folder / "passed").read_text()} == {"a", "b"}
