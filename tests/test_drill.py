"""The failure drill: real processes, and each way in which a night can go wrong. `pytest -m drill` ends with its table.

A fault happens to a run; then the same command runs again, `verify --recompute` has to find nothing, and every
Parquet file and the manifest's digest of receipts have to equal those of a run that nothing disturbed.

Signals, full disks and changed files come from outside. What luck would miss is found by counting: an audit hook
in the process sees every change that it makes to its output folder, so a run can be killed, or refused by the disk,
before each one in turn.
"""

import contextlib
import ctypes
import errno
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import (
    FACTORY,
    digests,
    fgsm,
    generate,
    manifest,
    png_bytes,
    random_pixels,
    shard_path,
    write_parquet,
)
from tests.support.processes import GATED, driver_of, group_is_gone, holds, receipts, run_fgsm, wait_for
from tests.support.s3 import S3, running_s3

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

# Takes its time while a file `slow` lies beside it, so that there is a run to disturb: the bytes do not depend on it.
VICTIM = f"""{FACTORY}

class Paced(Net):
    def forward(self, x):
        import pathlib, time

        if pathlib.Path(__file__).with_name("slow").exists():
            time.sleep(0.03)
        return super().forward(x)
{GATED}"""
KILLED = -signal.SIGKILL
SEED = random.SystemRandom().randrange(10**6)


# ------------------------------------------------------------------------------------------------ the harness


@dataclass(frozen=True)
class Break:
    """What happens to a process that is about to change a folder for the nth time.

    `error` is an errno that this and every later change gets; None kills the process. With nth 0 changes are only
    written down, in `log`.
    """

    folder: str
    nth: int
    error: int | None
    log: str

    def install(self) -> None:
        """Watch the process that this is called in, for as long as it lives."""
        log, count = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            change = _change(event, arguments, self.folder)
            if change is None:
                return
            count += 1
            if not self.nth:
                os.write(log, f"{change}\n".encode())
            elif self.error and count >= self.nth and event in ("open", "os.mkdir"):  # what takes space
                raise OSError(self.error, os.strerror(self.error))
            elif not self.error and count == self.nth:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def _change(event: str, arguments: tuple[Any, ...], folder: str) -> str | None:
    """What an audited event changes in a folder, None where it does not.

    A run goes down from the handle of its folder: then a name is relative, and nobody else in the process uses such.
    """
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
        relative = not Path(path).is_absolute() and bool(flags & os.O_CREAT)
    elif event == "os.rename":
        path, relative = os.fspath(arguments[1]), arguments[3] not in (-1, None)
    elif event in ("os.remove", "os.rmdir", "os.mkdir"):
        path, relative = os.fspath(arguments[0]), arguments[-1] not in (-1, None)
    else:
        return None
    if relative:
        return None if folder.endswith("cache") else f"{event} {path}"  # that of datasets goes by whole paths
    return f"{event} {os.path.relpath(path, folder)}" if path.startswith(folder) else None


class Run:
    """A process that runs `fgsm` with some arguments; what it says goes to a file."""

    def __init__(self, site: "Site", arguments: tuple[str | Path, ...], prepare: Callable[[], None] | None) -> None:
        self.log = site.folder / f"log-{time.monotonic_ns()}"
        body = (str(site.folder / "cache"), str(self.log), [*map(str, arguments)], prepare)
        self.process = site.context.Process(target=run_fgsm, args=body)
        self.process.start()
        self.pid: int = self.process.pid
        self.signal = partial(os.kill, self.pid)

    @property
    def alive(self) -> bool:
        return bool(self.process.is_alive())

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def end(self, seconds: float = 100) -> int:
        """Wait for it; its exit code. Whatever happened, no user sees a traceback."""
        self.process.join(seconds)
        assert not self.alive, f"no end after {seconds} s:\n{self.said}"
        code: int = self.process.exitcode
        # Workers that a SIGKILL made orphans may complain of a connection that broke.
        assert code == KILLED or "Traceback" not in self.said, self.said
        return code

    def refused(self, sentence: str, code: int = 1) -> None:
        """It ended with an error of one sentence that says so."""
        assert self.end() == code, self.said
        (line,) = [line for line in self.said.splitlines() if line.startswith("Error: ")]
        assert sentence in line

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.end() == KILLED


@dataclass
class Site:
    """A source, a victim and a config that say what to write; runs of them, and how an undisturbed one ends."""

    model: ClassVar[str] = "Paced"

    folder: Path
    context: Any
    count: int
    settings: dict[str, dict[str, Any]]
    prepare: Callable[[], None] | None = None
    started: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.victim, self.config = self.folder / "victim.py", self.folder / "config.yaml"
        self.source, self.reference = self.folder / "source", self.folder / "reference"
        self.victim.write_text(VICTIM)
        self.fill(self.images())
        config: dict[str, dict[str, Any]] = {
            "source": {"kind": "huggingface", "path": str(self.source)},
            "model": {"kind": "factory", "name": f"{self.victim}:{self.model}"},
            "attack": {"epsilons": ["1/255", "4/255", "8/255"]},
            "output": {"path": str(self.folder / "unused"), "images_per_shard": 16},
            "runtime": {"device": "cpu", "workers": 2, "batch_size": 8},
        }
        for name, section in self.settings.items():
            config[name] = {**config.get(name, {}), **section}
        self.config.write_text(yaml.safe_dump(config))
        assert self.generate(self.reference).end() == 0
        self.expected = manifest(self.reference)

    def images(self) -> list[bytes]:
        return [png_bytes(pixels) for pixels in random_pixels(self.count, side=32)]

    def fill(self, images: list[bytes]) -> None:
        """Write the source."""
        write_parquet(self.source, images, [i % 3 for i in range(self.count)])

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """While this lasts, runs take their time."""
        switch = self.folder / "slow"
        switch.touch()
        try:
            yield
        finally:
            switch.unlink()

    def start(self, *arguments: str | Path, prepare: Callable[[], None] | None = None) -> Run:
        run = Run(self, arguments, prepare or self.prepare)
        self.started.append(run)
        return run

    def generate(self, out: str | Path, *arguments: str | Path, prepare: Callable[[], None] | None = None) -> Run:
        return self.start("generate", self.config, "--output", out, *arguments, prepare=prepare)

    def close(self) -> None:
        for run in self.started:
            run.process.kill()
            run.process.join()


@dataclass
class Drill:
    """One fault, and what it cost: the line of the table."""

    fault: str
    tried: int = 0
    lost: int = 0
    differing: int = 0
    began: float = field(default_factory=time.monotonic)

    def settle(
        self, site: Site, out: str | Path, *, here: bool = False, fetch: Callable[[], Path] | None = None
    ) -> None:
        """After the fault: the same command, then `verify --recompute`, then every byte.

        Args:
            site: what was written.
            out: where.
            here: run in this process, and without the report, which takes longer than all else in a small run.
            fetch: a copy of what is there, where that is no folder.
        """
        self.tried += 1
        if here:
            generate(site.config, "--output", str(out))
        else:
            run = site.generate(out)
            assert run.end() == 0, run.said
        result = fgsm("verify", out, "--recompute")
        assert result.exit_code == 0, result.output
        self.compare(site, fetch() if fetch else Path(out))

    def compare(self, site: Site, out: Path) -> None:
        """Count what is lost and what differs, and remove it."""
        found = manifest(out)
        planned, skipped = sum(found["split_rows"].values()), len(found["skipped"])
        subsets = {Path(entry["path"]).parent for entry in found["files"]}
        self.lost += planned - skipped - min(count_rows(out / subset) for subset in subsets)
        self.differing += differing_bytes(out, site.reference)
        assert (self.lost, self.differing) == (0, 0)
        assert found["receipts"] == site.expected["receipts"]
        assert found["skipped"] == site.expected["skipped"]
        assert not list((out / ".run/tmp").glob("*"))
        shutil.rmtree(out)

    @property
    def line(self) -> list[str]:
        seconds = time.monotonic() - self.began
        return [self.fault, str(self.tried), str(self.lost), str(self.differing), f"{seconds:.0f}"]


def count_rows(subset: Path) -> int:
    return sum(pq.ParquetFile(path).metadata.num_rows for path in subset.glob("*.parquet"))


def differing_bytes(here: Path, there: Path) -> int:
    """In how many bytes the Parquet files of two folders differ; what one has longer or alone counts in full."""
    names = {path.relative_to(root) for root in (here, there) for path in root.rglob("*.parquet")}
    total = 0
    for name in names:
        a, b = (
            np.frombuffer(path.read_bytes() if path.exists() else b"", dtype=np.uint8)
            for path in (here / name, there / name)
        )
        common = min(len(a), len(b))
        total += int((a[:common] != b[:common]).sum()) + max(len(a), len(b)) - common
    return total


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """Sites by name, each made once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pipeline.cli", "pipeline.engine.job", "pipeline.reporting.page", "datasets", __name__]
    )
    folder, made = tmp_path_factory.mktemp("drill"), {}

    def make(
        name: str,
        count: int,
        kind: type[Site] = Site,
        prepare: Callable[[], None] | None = None,
        **settings: dict[str, Any],
    ) -> Site:
        if name not in made:
            made[name] = kind(folder / name, context, count, settings, prepare)
        return made[name]

    yield make
    for site in made.values():
        site.close()


@pytest.fixture
def site(sites: Callable[..., Site]) -> Site:
    """192 images in 12 shards and 48 files; some four seconds when slow."""
    return sites("site", 192)


@pytest.fixture
def small(sites: Callable[..., Site]) -> Site:
    """12 images in 2 shards and 4 files: every step of a run, and few of each."""
    return sites("small", 12, attack={"epsilons": ["8/255"]}, output={"images_per_shard": 8}, runtime={"workers": 0})


@pytest.fixture
def drill(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Drill]:
    """The line of the table that a test fills; its fault is the first line of the test's docstring."""
    drill = Drill((request.function.__doc__ or "").rstrip("."))
    yield drill
    record_property("drill", drill.line)


# ------------------------------------------------------------------------------------------------ at random


@pytest.fixture
def whole(site: Site, tmp_path: Path) -> float:
    """Seconds of a slow run, from start-up to report."""
    began = time.monotonic()
    with site.slow():
        assert site.generate(tmp_path / "whole").end() == 0
    return time.monotonic() - began


def test_sigkill(site: Site, drill: Drill, whole: float, tmp_path: Path) -> None:
    """SIGKILL at a random moment."""
    moments, seen, times = random.Random(SEED), [], 20
    for attempt in range(times):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            run = site.generate(out)
            # One in each twentieth of a run: start-up, shards, summaries and report all get their share.
            time.sleep(whole * (attempt + moments.random()) / times)
            with contextlib.suppress(ProcessLookupError):
                run.signal(signal.SIGKILL)
            assert run.end() in (KILLED, 0)
        seen.append(receipts(out))
        drill.settle(site, out)
    assert len(set(seen)) > 5, f"seed {SEED}: the kills must fall between different commits, not {seen}"


def test_sigkill_of_one_of_several(sites: Callable[..., Site], drill: Drill, tmp_path: Path) -> None:
    """SIGKILL of one of three processes that share a run, at a random moment"""
    site, moments, times = sites("shared", 480, runtime={"processes": 3}), random.Random(SEED), 9
    for attempt in range(times):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            run = site.generate(out)
            others: list[psutil.Process] = []

            def both_are_there(run: Run = run, found: list[psutil.Process] = others) -> bool:
                with contextlib.suppress(psutil.Error):  # one that is just starting or ending
                    children = psutil.Process(run.pid).children()
                    found[:] = [one for one in children if "helper" in " ".join(one.cmdline())]
                return len(found) == 2

            wait_for(both_are_there)
            # From their start to the middle of their work; the first process in every third run.
            time.sleep(8 * (attempt + moments.random()) / times)
            victim = [run.pid, *(one.pid for one in others)][attempt % 3]
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(victim, signal.SIGKILL)
            assert run.end() in ((0,) if attempt % 3 else (0, KILLED)), f"seed {SEED}: {run.said}"
        psutil.wait_procs(others, 10)
        drill.settle(site, out)


def test_sigterm(site: Site, drill: Drill, whole: float, tmp_path: Path) -> None:
    """SIGTERM at a random moment: the end within five seconds."""
    moments, times = random.Random(SEED), 6
    for attempt in range(times):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            run = site.generate(out)
            time.sleep(whole * (attempt + moments.random()) / times)
            began = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                run.signal(signal.SIGTERM)
            # The first moments belong to Python: there is no handler yet. The last may find that the run has ended.
            other = -signal.SIGTERM if attempt == 0 else 0 if attempt >= times // 2 else 143
            assert run.end() in (143, other), f"seed {SEED}: {run.said}"
            assert time.monotonic() - began < 5
        wait_for(partial(group_is_gone, run.pid), 10)
        drill.settle(site, out)


def test_stopped(site: Site, drill: Drill, tmp_path: Path) -> None:
    """SIGSTOP for a while, then SIGCONT."""
    for attempt in range(2):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            run = site.generate(out)
            wait_for(lambda out=out: receipts(out) >= 3)  # type: ignore[misc]
            os.killpg(run.pid, signal.SIGSTOP)
            before = digests(out)
            site.generate(out).refused(f"in use by another run (process {run.pid})")
            time.sleep(2)
            assert digests(out) == before
            os.killpg(run.pid, signal.SIGCONT)
            assert run.end() == 0, run.said
        drill.settle(site, out)


# ------------------------------------------------------------------------------------- before every change


def changes(site: Site, folder: Path, run: Callable[[Callable[[], None]], Run]) -> list[str]:
    """What a run changes in a folder, in order. `run` starts it with what prepares its process."""
    log = site.folder / f"changes-{time.monotonic_ns()}"
    assert run(Break(str(folder), 0, None, str(log)).install).end() in (0, 1)
    return log.read_text().splitlines()


def break_before(folder: Path, nth: int, error: int | None = None) -> Callable[[], None]:
    return Break(str(folder), nth, error, os.devnull).install


def before_report(found: Sequence[str]) -> int:
    """How many changes come before those of the report, which has a drill of its own."""
    until = next(i for i, change in enumerate(found) if "report.html" in change)
    # It is written aside, and put into its place under its name.
    while found[until - 1].startswith(("os.mkdir ", "open ")):
        until -= 1
    return until


def test_sigkill_before_each_change(small: Site, drill: Drill, tmp_path: Path) -> None:
    """SIGKILL before each change to the output folder."""
    found = changes(small, tmp_path / "all", lambda prepare: small.generate(tmp_path / "all", prepare=prepare))
    until = before_report(found)
    assert sum("os.rename" in change for change in found[:until]) >= 4 + 2 + 4
    for nth in range(1, until + 1):
        out = tmp_path / f"out-{nth}"
        assert small.generate(out, prepare=break_before(out, nth)).end() == KILLED, found[nth - 1]
        drill.settle(small, out, here=True)


def test_sigkill_while_overwriting(small: Site, drill: Drill, tmp_path: Path) -> None:
    """SIGKILL before each removal of --overwrite."""
    former = tmp_path / "former"
    other = ("--set", "attack.epsilons=[2/255]")
    assert small.generate(former, *other).end() == 0

    def overwrite(out: Path, prepare: Callable[[], None]) -> Run:
        shutil.copytree(former, out)
        return small.generate(out, "--overwrite", prepare=prepare)

    found = changes(small, tmp_path / "all", lambda prepare: overwrite(tmp_path / "all", prepare))
    removals = [i for i, change in enumerate(found) if change.startswith("os.remove") and "-of-" in change]
    assert len(removals) >= 4 + 2
    for nth in range(removals[0] + 1, removals[-1] + 3):
        out = tmp_path / f"out-{nth}"
        assert overwrite(out, break_before(out, nth)).end() == KILLED, found[nth - 1]
        # The folder is the new run's by now, which removes what is left of the former one.
        drill.settle(small, out, here=True)


def test_sigkill_while_repairing(small: Site, drill: Drill, tmp_path: Path) -> None:
    """SIGKILL before each change of verify --repair."""

    def repair(out: Path, prepare: Callable[[], None]) -> Run:
        shutil.copytree(small.reference, out)
        for path in (out / "eps-8").glob("*.parquet"):
            alter(path)
        return small.start("verify", out, "--repair", prepare=prepare)

    found = changes(small, tmp_path / "all", lambda prepare: repair(tmp_path / "all", prepare))
    assert sum(change.startswith("os.remove") for change in found) >= 2 + 4
    for nth in range(1, len(found) + 1):
        out = tmp_path / f"out-{nth}"
        assert repair(out, break_before(out, nth)).end() == KILLED, found[nth - 1]
        fgsm("verify", out, "--repair")
        drill.settle(small, out, here=True)


def test_sigkill_while_reporting(small: Site, drill: Drill, tmp_path: Path) -> None:
    """SIGKILL before each change of report."""

    def report(out: Path, prepare: Callable[[], None] | None = None) -> Run:
        return small.start("report", out, prepare=prepare)

    def pages(out: Path) -> dict[str, bytes]:
        paths = [out / "report.html", *(out / "assets").iterdir()]
        return {path.name: path.read_bytes() for path in paths}

    whole = tmp_path / "whole"
    shutil.copytree(small.reference, whole)
    found = changes(small, whole, lambda prepare: report(whole, prepare))
    for nth in range(1, len(found) + 1):
        out = tmp_path / f"out-{nth}"
        shutil.copytree(small.reference, out)
        (out / "report.html").unlink()
        shutil.rmtree(out / "assets")
        assert report(out, break_before(out, nth)).end() == KILLED
        # Its page comes last: until it is there the next generate makes it.
        run = small.generate(out)
        assert run.end() == 0, run.said
        assert pages(out) == pages(whole), found[nth - 1]
        drill.settle(small, out, here=True)


def test_sigkill_while_reading_the_source(small: Site, drill: Drill, tmp_path: Path) -> None:
    """SIGKILL before each change to the cache of datasets."""

    def fresh(out: Path, prepare: Callable[[], None]) -> Run:
        shutil.rmtree(small.folder / "cache")
        return small.generate(out, prepare=prepare)

    cache = small.folder / "cache"
    found = changes(small, cache, lambda prepare: fresh(tmp_path / "all", prepare))
    assert found
    for nth in range(1, len(found) + 1):
        out = tmp_path / f"out-{nth}"
        assert fresh(out, break_before(cache, nth)).end() == KILLED, found[nth - 1]
        drill.settle(small, out)


def test_disk_full_before_each_change(small: Site, drill: Drill, tmp_path: Path) -> None:
    """Disk full from each change on."""
    found = changes(small, tmp_path / "all", lambda prepare: small.generate(tmp_path / "all", prepare=prepare))
    until = before_report(found)
    for nth in range(1, until + 1):
        if not found[nth - 1].startswith(("open", "os.mkdir")):
            continue
        out = tmp_path / f"out-{nth}"
        run = small.generate(out, prepare=break_before(out, nth, errno.ENOSPC))
        run.refused("No space left on device. Finished shards are kept")
        drill.settle(small, out, here=True)


# ---------------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[None]:
    """A file system of so many bytes, for as long as this lasts."""
    folder.mkdir()
    if not done("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        pytest.skip("only root can mount a file system")
    try:
        yield
    finally:
        wait_for(lambda: done("umount", folder))


def done(*command: str | Path) -> bool:
    """Whether a command succeeds; a disk is busy until the last thread of a killed process has gone."""
    return not subprocess.run(command, check=False, capture_output=True).returncode


def test_disk_full(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Disk full in the middle of a write (tmpfs)."""
    for attempt, left in enumerate((0, 4096, 20_000, 60_000, 150_000)):
        disk = tmp_path / f"disk-{attempt}"
        with tmpfs(disk, "16m"):
            out = disk / "out"
            with site.slow():
                run = site.generate(out)
                wait_for(lambda out=out, attempt=attempt: receipts(out) >= 2 + attempt)  # type: ignore[misc]
                with (disk / "ballast").open("wb") as ballast:
                    os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(disk).free - left)
                run.refused("No space left on device. Finished shards are kept")
            kept = digests(out)
            site.generate(out).refused("choose another disk")
            (disk / "ballast").unlink()
            assert kept.items() <= digests(out).items()
            drill.settle(site, out)


def test_read_only(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Read-only file system."""
    disk = tmp_path / "disk"
    with tmpfs(disk, "64m"):
        out = disk / "out"
        with site.slow():
            run = site.generate(out)
            wait_for(lambda: receipts(out) >= 3)
            run.kill()
        wait_for(partial(group_is_gone, run.pid), 10)
        wait_for(lambda: done("mount", "-o", "remount,ro", disk))
        site.generate(out).refused("Read-only file system")
        assert site.start("inspect", out).end() == 0
        site.start("verify", out).refused("run the generate command that made it")
        site.start("report", out).refused("Read-only file system")
        assert done("mount", "-o", "remount,rw", disk)
        drill.settle(site, out)


# --------------------------------------------------------------------------------------------------- memory


def test_without_memory(sites: Callable[..., Site], drill: Drill, tmp_path: Path) -> None:
    """Refused memory (RLIMIT_AS)."""
    site = sites(
        "large",
        40,
        Growing,
        source={"shuffle": False},
        preprocess={"resize": 32, "crop": 32},
        output={"images_per_shard": 2},
        runtime={"batch_size": 2},
    )
    for attempt in range(2):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            run = site.generate(out)
            wait_for(lambda out=out: receipts(out) >= 1)  # type: ignore[misc]
            now = 1024 * int(Path(f"/proc/{run.pid}/status").read_text().split("VmSize:")[1].split()[0])
            # Memory that was given back would do for a while.
            resource.prlimit(run.pid, resource.RLIMIT_AS, (now // 2, now // 2))
            run.refused("memory")
        assert manifest(out)["skipped"] == []
        drill.settle(site, out)


def test_shared_memory_full(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Shared memory full, as in a container: nothing needs any."""
    if tmp_path.is_relative_to("/dev/shm"):
        pytest.skip(
            "the run's own files lie in shared memory, as scripts/check has them; pytest alone keeps them elsewhere"
        )
    for attempt, size in enumerate(("64k", "128k")):
        out = tmp_path / f"out-{attempt}"
        assert site.generate(out, prepare=partial(small_shared_memory, size)).end() == 0
        drill.settle(site, out)


def small_shared_memory(size: str) -> None:
    """Give this process a /dev/shm of its own."""
    libc, new_mounts = ctypes.CDLL(None, use_errno=True), 0x20000
    assert not libc.unshare(new_mounts), os.strerror(ctypes.get_errno())
    assert done("mount", "--make-rprivate", "/")
    assert done("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm")


class Growing(Site):
    """Each image takes more memory to decode than the one before it, up to 92 MB: a thread of glibc's has 64 MB at hand
    that it need not ask the system for."""

    def images(self) -> list[bytes]:
        sides = [120 * (i + 1) for i in range(self.count)]
        return [png_bytes(np.full((side, side, 3), side % 251, np.uint8)) for side in sides]


# ------------------------------------------------------------------------------------- behind the receipt


def alter(path: Path) -> None:
    """Change one byte in the middle of a file; its size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_file_altered(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Output file altered behind its receipt."""
    out = tmp_path / "out"
    for subset in ("clean", "eps-4"):
        shutil.copytree(site.reference, out)
        alter(shard_path(out / subset, "test-00003-of-00012.parquet"))
        site.start("verify", out).refused("1 problem; run the generate command that made it after fgsm verify --repair")
        site.start("verify", out, "--repair").refused("1 damaged shards dropped")
        drill.settle(site, out)


def test_file_deleted(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Output file deleted behind its receipt."""
    out = tmp_path / "out"
    for subset in ("clean", "eps-8"):
        shutil.copytree(site.reference, out)
        shard_path(out / subset, "test-00007-of-00012.parquet").unlink()
        assert site.start("verify", out).end() == 1
        drill.settle(site, out)


def test_receipt_half_written(small: Site, drill: Drill, tmp_path: Path) -> None:
    """Receipt cut short, or full of zeros."""
    out = tmp_path / "out"
    path = shard_path(small.reference, ".run/receipts/test-00000-of-00002.json")
    receipt, whole = path.relative_to(small.reference), path.read_bytes()
    lengths = (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1)
    for content in (*(whole[:length] for length in lengths), bytes(len(whole))):
        shutil.copytree(small.reference, out)
        (out / receipt).write_bytes(content)
        small.start("verify", out).refused("after fgsm verify --repair")
        drill.settle(small, out)


# --------------------------------------------------------------------------------------------------- others


def test_two_at_once(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Two runs started on one folder at once."""
    for attempt in range(3):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            runs = [site.generate(out), site.generate(out)]
            codes = [run.end() for run in runs]
        assert sorted(codes) == [0, 1]
        winner, loser = (runs[codes.index(code)] for code in (0, 1))
        loser.refused(f"in use by another run (process {winner.pid}); wait for it")
        drill.settle(site, out)


def test_stale_lock(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Lock of a run that was killed."""
    for attempt in range(2):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            run = site.generate(out)
            wait_for(partial(holds, out, run.process))
            run.kill()
            # At once: the workers of the dead run still live.
            assert (out / ".run/lock").read_text() == str(run.pid)
            drill.settle(site, out)


def test_source_changes(site: Site, drill: Drill, tmp_path: Path) -> None:
    """Source changed between two runs, and restored."""
    original = site.images()
    brighter = [png_bytes(255 - pixels) for pixels in random_pixels(site.count, side=32)]
    for attempt, images in enumerate((original[:-1] + brighter[-1:], original[::-1], brighter)):
        out = tmp_path / f"out-{attempt}"
        with site.slow():
            run = site.generate(out)
            wait_for(lambda out=out: receipts(out) >= 2)  # type: ignore[misc]
            run.kill()
        site.fill(images)
        site.generate(out).refused("which differs in source.content", code=2)
        site.fill(original)
        drill.settle(site, out)


class Damaged(Site):
    """One image in a thousand is no image, each in another way."""

    def images(self) -> list[bytes]:
        images = super().images()
        whole = images[0]
        images[500], images[1500] = whole[: len(whole) // 2], b"<html>404</html>"
        return images


def test_corrupt_images(sites: Callable[..., Site], drill: Drill, tmp_path: Path) -> None:
    """One image in 1,000 corrupt, and SIGKILL in between."""
    site = sites(
        "damaged",
        2000,
        Damaged,
        attack={"epsilons": ["8/255"]},
        output={"images_per_shard": 125},
        runtime={"batch_size": 64},
    )
    skipped = site.expected["skipped"]
    assert sorted(row["source_index"] for row in skipped) == [500, 1500]
    assert all(row["reason"] for row in skipped)
    for attempt in range(2):
        out = tmp_path / f"out-{attempt}"
        run = site.generate(out)
        wait_for(lambda out=out, attempt=attempt: receipts(out) >= 3 + 5 * attempt)  # type: ignore[misc]
        run.kill()
        drill.settle(site, out)
    out = tmp_path / "fewer"
    site.generate(out, "--set", "runtime.max_skipped=0.0005").refused("more than runtime.max_skipped = 0.0005 allows")
    drill.settle(site, out)


# -------------------------------------------------------------------------------------------- object stores


class Bucket:
    """An S3 server, and a place in it for each attempt."""

    def __init__(self, s3: S3, folder: Path) -> None:
        self.s3, self.folder, self.places = s3, folder, itertools.count()
        s3.make("drill")

    def place(self) -> str:
        """A new place, in a store that works."""
        self.s3.faults.clear()
        return f"s3://drill/{next(self.places)}"

    def objects(self, out: str) -> dict[str, bytes]:
        return self.s3.objects("drill", f"{out.rpartition('/')[2]}/")

    def receipts(self, out: str) -> int:
        return sum(name.startswith(".run/receipts/") for name in self.objects(out))

    def fetch(self, out: str) -> Path:
        """What lies at a place, as a folder."""
        folder = self.folder / out.rpartition("/")[2]
        for name, content in self.objects(out).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


def impatient(environment: dict[str, str]) -> None:
    """What a process needs to use the store, and less patience than in life."""
    import pipeline.output.locks
    import pipeline.output.objects

    os.environ.update(environment)
    pipeline.output.locks.BEAT_SECONDS, pipeline.output.locks.STALE_SECONDS = 0.2, 1.5
    pipeline.output.objects.SILENT_SECONDS, pipeline.output.objects.ATTEMPTS = 1.0, 2
    pipeline.output.objects.PATIENCE_SECONDS = 4.0


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with running_s3() as s3:
        yield Bucket(s3, tmp_path_factory.mktemp("fetched"))


@pytest.fixture
def stored(sites: Callable[..., Site], bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Site:
    """As `site`, written to an object store."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in bucket.s3.environment.items():
        monkeypatch.setenv(name, value)
    return sites("stored", 96, prepare=partial(impatient, bucket.s3.environment))


def test_store_sigkill(stored: Site, bucket: Bucket, drill: Drill) -> None:
    """Object store: SIGKILL at a random moment."""
    moments = random.Random(SEED)
    for attempt in range(6):
        out = bucket.place()
        with stored.slow():
            run = stored.generate(out)
            wait_for(partial(lambda out, least: bucket.receipts(out) >= least, out, attempt))
            time.sleep(moments.uniform(0, 0.3))
            with contextlib.suppress(ProcessLookupError):
                run.signal(signal.SIGKILL)
            assert run.end() in (KILLED, 0)
        drill.settle(stored, out, fetch=partial(bucket.fetch, out))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(500, "Object store: answers 500 from some upload on"), ("hang", "Object store: hangs from some upload on")],
)
def test_store_fails(stored: Site, bucket: Bucket, drill: Drill, kind: int | str, fault: str) -> None:
    drill.fault = fault
    # Each is asked again for as long as the client has patience.
    for path, after in ((r"parquet", 3), (r"receipts/", 1), (r"manifest", 1)):
        out = bucket.place()
        bucket.s3.fail("PUT", path, kind, after=after)
        began = time.monotonic()
        stored.generate(out).refused("the store failed", code=75)
        assert time.monotonic() - began < 90
        bucket.s3.released.set()
        bucket.s3.faults.clear()
        bucket.s3.released.clear()
        drill.settle(stored, out, fetch=partial(bucket.fetch, out))


def test_store_two_at_once(stored: Site, bucket: Bucket, drill: Drill) -> None:
    """Object store: two runs started at once."""
    for _ in range(2):
        out = bucket.place()
        with stored.slow():
            runs = [stored.generate(out), stored.generate(out)]
            codes = [run.end() for run in runs]
        assert sorted(codes) == [0, 1]
        winner, loser = (runs[codes.index(code)] for code in (0, 1))
        loser.refused(f"process {winner.pid}")
        drill.settle(stored, out, fetch=partial(bucket.fetch, out))


# ------------------------------------------------------------------------------------------------------ Ray


class White(Site):
    """One image is white: there the victim waits, where it is told to."""

    model = "Gated"

    def images(self) -> list[bytes]:
        images = super().images()
        images[self.count // 2] = png_bytes(np.full((32, 32, 3), 255, np.uint8))
        return images


def test_ray_node_removed(
    sites: Callable[..., Site], drill: Drill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray: a node removed in the middle of its shard."""
    pytest.importorskip("ray")
    from tests.support.processes import lose_a_node

    site, out = sites("white", 96, White), tmp_path / "out"
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(site.folder / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start(address: str) -> tuple[Any, Path]:
        run = site.generate(out, "--executor", "ray", prepare=driver_of(address))
        return run.process, run.log

    lose_a_node(site.folder, start)
    # It needed no second run; that finds nothing to do.
    assert manifest(out)["complete"]
    drill.settle(site, out)
