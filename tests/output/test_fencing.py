"""Two runs at one prefix of an object store: whatever is late, stopped or ignored, no run touches a file of another."""

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.engine.job import Job
from pipeline.output.folder import OutputFolder
from pipeline.output.locks import StoreLock
from pipeline.output.objects import ObjectStore
from tests.conftest import WriteConfig, digests, fgsm, generate
from tests.support.processes import wait_for
from tests.support.s3 import S3, alter, failed, lock_of, run_there, shards, there
from tests.support.s3 import bucket as bucket
from tests.support.s3 import out as out
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server

FIRST = "AKIAFIRSTFIRST"


@dataclass
class First:
    """A run in a process of its own, which is overtaken by a second one; the store knows it by its key."""

    s3: S3
    process: Any
    log: Path

    def wait_until_held(self) -> bool:
        """Wait until one of its requests is held back, and stop it; False if it ended before."""
        wait_for(lambda: bool(self.s3.held) or not self.process.is_alive())
        if not self.s3.held:
            return False
        os.kill(self.process.pid, signal.SIGSTOP)
        return True

    def go_on(self) -> int:
        """Serve what was held back, then let it go on; its exit code."""
        self.s3.release()
        wait_for(lambda: not self.s3.held)
        os.kill(self.process.pid, signal.SIGCONT)
        return self.end()

    def end(self) -> int:
        self.process.join(60)
        assert not self.process.is_alive(), self.log.read_text()
        assert "Traceback" not in self.log.read_text()
        code: int = self.process.exitcode
        return code


def impatient(stale: float) -> None:
    """What the first run's process needs: a lock that is confirmed often."""
    import pipeline.output.locks
    import pipeline.output.objects

    pipeline.output.locks.BEAT_SECONDS, pipeline.output.locks.CONFIRM_SECONDS, pipeline.output.locks.STALE_SECONDS = (
        0.2,
        0.5,
        stale,
    )
    pipeline.output.objects.ATTEMPTS = 2


def run_first(environment: dict[str, str], temporary: str, cache: str, log: str, arguments: list[str]) -> None:
    """The body of its process."""
    impatient(1.0)
    run_there(environment, temporary, cache, log, arguments)


@pytest.fixture
def start(s3: S3, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., First]]:
    """Starts a first run, of which one request is held back: the one after the first so many that match."""
    monkeypatch.setattr("pipeline.output.locks.STALE_SECONDS", 1.0)
    numbers, started = itertools.count(), []

    def go(config: Path, out: str, *arguments: str, path: str = "", after: int = 0, kind: int | str = "hold") -> First:
        s3.faults.clear()
        s3.fail("PUT|POST|DELETE", path, kind, times=1 if kind == "hold" else 10**6, after=after, who=FIRST)
        log = tmp_path / f"log-{next(numbers)}"
        environment = {**s3.environment, "AWS_ACCESS_KEY_ID": FIRST}
        temporary = tmp_path / "first"
        temporary.mkdir(exist_ok=True)
        process = processes.Process(
            target=run_first,
            args=(
                environment, str(temporary), str(tmp_path / "cache"), str(log),
                ["generate", str(config), "--output", out, *arguments],
            ),
        )  # fmt: skip
        process.start()
        started.append(process)
        return First(s3, process, log)

    yield go
    s3.release()
    for process in started:
        process.kill()
        process.join()


def overtake(s3: S3, first: First, config: Path, out: str, *arguments: str) -> None:
    """A second run takes the place over, the first goes on, and of the second nothing has changed."""
    generate(config, "--output", out, *arguments)
    before = {name: content for name, content in there(s3, out).items() if name != ".run/lock"}
    assert first.go_on() == 1, first.log.read_text()
    assert re.search(rf"Error: {out}\S* ", first.log.read_text())
    after = there(s3, out)
    run_id = json.loads(before["manifest.json"])["run_id"]
    assert {name: content for name, content in after.items() if name in before} == before
    assert all("-of-" in name and run_id not in name for name in after.keys() - before.keys() - {".run/lock"})
    verified = fgsm("verify", out)
    assert verified.exit_code == 0, verified.output


@pytest.fixture
def two(write_config: WriteConfig, tmp_path: Path) -> tuple[Path, Path]:
    """Configs of two runs that differ."""
    first = write_config(attack={"epsilons": ["4/255"]}, output={"images_per_shard": 20})
    first = first.rename(tmp_path / "first.yaml")
    return first, write_config(attack={"epsilons": ["4/255", "8/255"]}, output={"images_per_shard": 20})


# What is late: the manifest that makes the place the first run's, a receipt, the lock. The drill stops each request.
LATE = [("manifest.json", 0), ("receipts/", 1), (r"\.run/lock", 3)]


@pytest.mark.parametrize(("path", "after"), LATE)
def test_a_late_request_touches_no_file_of_another_run(
    path: str, after: int, s3: S3, out: str, two: tuple[Path, Path], start: Callable[..., First]
) -> None:
    first = start(two[0], out, path=path, after=after)
    assert first.wait_until_held(), first.log.read_text()
    overtake(s3, first, two[1], out, "--overwrite")


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["a new run", "an overwriting run"])
def test_a_run_stopped_at_each_request_touches_no_file_of_another(
    what: str, s3: S3, out: str, two: tuple[Path, Path], start: Callable[..., First],
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    began, tries = time.monotonic(), 0
    # The first request of all makes the lock: who is late with that has no place yet, and overwrites as it was told.
    first_request = 1 if what == "an overwriting run" else 0
    for after in itertools.count(first_request):
        place = f"{out}/{after}"
        s3.faults.clear()
        if what == "an overwriting run":
            generate(two[1], "--output", place)
        first = start(two[0], place, *(["--overwrite"] if what == "an overwriting run" else []), after=after)
        if not first.wait_until_held():
            assert first.end() == 0
            break
        # After its last manifest and card a run lets go of the lock and makes the report: then it has ended.
        complete = json.loads(there(s3, place).get("manifest.json", b"{}")).get("complete") and after > 10
        if complete and not re.search(r"manifest\.json|README\.md", s3.held[0]):
            first.go_on()
            break
        tries += 1
        overtake(s3, first, two[1], place, "--overwrite")
    assert tries > 12
    fault = f"Object store: {what} stopped at each PUT and DELETE, taken over, then continued"
    record_property("drill", [fault, str(tries), "0", "0", f"{time.monotonic() - began:.0f}"])


def test_a_run_that_takes_over_its_own_kind_goes_on(
    s3: S3, out: str, two: tuple[Path, Path], start: Callable[..., First], tmp_path: Path
) -> None:
    """Two processes of one run write the same bytes."""
    first = start(two[0], out, path="eps-4/", after=1)
    assert first.wait_until_held()
    assert "1 of 2 shards" in generate(two[0], "--output", out)
    assert first.go_on() == 1
    generate(two[0], "--output", str(tmp_path / "out"))
    assert shards(there(s3, out)) == digests(tmp_path / "out")
    assert fgsm("verify", out).exit_code == 0


def test_a_late_shard_replaces_none_that_the_same_run_has_written_elsewhere(
    s3: S3, out: str, two: tuple[Path, Path], start: Callable[..., First]
) -> None:
    """On another machine last digits may differ, and the receipt is of the other file."""
    first = start(two[0], out, path="eps-4/")
    assert first.wait_until_held()
    name = "eps-4/" + s3.held[0].partition("eps-4/")[2].partition("?")[0]
    alter(s3, out, name, b"of another machine")
    s3.release()
    wait_for(lambda: not s3.held)
    assert there(s3, out)[name] == b"of another machine"


def test_a_holder_that_alone_is_refused_gives_up(
    s3: S3, out: str, two: tuple[Path, Path], start: Callable[..., First]
) -> None:
    """The store answers the first run's lock with 503, and nobody else's."""
    s3.faults.clear()
    first = start(two[0], out, path=r"\.run/lock", after=4, kind=503)
    wait_for(lambda: lock_of(there(s3, out)) is not None)
    os.kill(first.process.pid, signal.SIGSTOP)
    time.sleep(0.5)
    overtaken = fgsm("generate", two[1], "--output", out, "--overwrite")
    assert overtaken.exit_code == 0, overtaken.output
    before = there(s3, out)
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.end() == 1
    assert {name: content for name, content in there(s3, out).items() if name in before} == before
    assert fgsm("verify", out).exit_code == 0


@pytest.mark.parametrize("conditions", ["ignored", "refused"])
def test_a_store_without_conditions_is_refused_unless_unlocked(
    conditions: str, s3: S3, out: str, write_config: WriteConfig
) -> None:
    s3.conditions = conditions
    config = write_config(output={"path": out})
    assert "--unlocked" in failed("generate", config, code=2)
    assert not shards(there(s3, out))
    assert f"{out} is" in generate(config, "--unlocked")
    assert fgsm("verify", out).exit_code == 0
    assert fgsm("report", out).exit_code == 0


def test_a_client_without_conditions_is_refused_unless_unlocked(
    s3: S3, out: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.output.objects.CONDITIONAL", ())
    config = write_config(output={"path": out})
    assert "--unlocked" in failed("generate", config, code=2)
    assert there(s3, out) == {}
    assert f"{out} is" in generate(config, "--unlocked")
    assert fgsm("verify", out).exit_code == 0
    altered = next(name for name in there(s3, out) if name.startswith("clean/"))
    s3.write(out.split("/")[2], f"{out.split('/', 3)[3]}/{altered}", b"x")
    assert "--unlocked" in failed("verify", out, "--repair", code=2)
    assert "1 damaged shards" in failed("verify", out, "--repair", "--unlocked")


def test_a_holder_confirms_its_lock_before_it_writes(s3: S3, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.locks.BEAT_SECONDS", 600.0)
    folder = OutputFolder(out)
    with folder.store.held():
        folder.store.write("manifest.json", b"{}")
        beat = (lock_of(there(s3, out)) or {})["beat"]
        monkeypatch.setattr("pipeline.output.locks.CONFIRM_SECONDS", 0.0)
        folder.store.write("manifest.json", b"{ }")
        assert (lock_of(there(s3, out)) or {})["beat"] == beat + 1
        s3.fail("PUT", r"\.run/lock", 500)
        with pytest.raises(PipelineError):
            folder.store.write("manifest.json", b"{  }")
        assert there(s3, out)["manifest.json"] == b"{ }"
        s3.faults.clear()


def test_a_lock_whose_answer_was_lost_is_still_held(s3: S3, out: str) -> None:
    """The client asks again after a first try that arrived, and is told that the version is another."""
    store = ObjectStore(out)
    lock = StoreLock(store)
    lock.confirm()
    version = lock._version
    content = there(s3, out)[".run/lock"]
    assert store.replace(".run/lock", content, '"of the try before"') == version
    lock.confirm()
    lock.release()
    assert lock_of(there(s3, out)) is None


def test_a_report_that_is_late_replaces_no_report_of_another_run(
    s3: S3, out: str, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.reporting.page

    generate(two[0], "--output", out)
    make = pipeline.reporting.page._make

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr("pipeline.reporting.page._make", make)
        made = make(*arguments)
        result = fgsm("generate", two[1], "--output", out, "--overwrite")
        assert result.exit_code == 0, result.output
        return made

    monkeypatch.setattr("pipeline.reporting.page._make", late)
    assert "another run" in failed("report", out)
    assert b"8/255" in there(s3, out)["report.html"]


def test_a_run_whose_manifest_was_removed_goes_on_in_its_generation(
    s3: S3, out: str, write_config: WriteConfig
) -> None:
    config = write_config()
    generate(config, "--output", out)
    generate(config, "--output", out, "--overwrite")
    before = there(s3, out)
    alter(s3, out, "manifest.json", None)
    assert "3 of 3 shards" in generate(config, "--output", out)
    assert shards(there(s3, out)) == shards(before)
    assert there(s3, out)["manifest.json"] == before["manifest.json"]


def test_of_two_runs_that_overwrite_at_once_one_takes_no_names_of_the_other(
    out: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of one of them to remove a file, if it is late, must not find a new file of the other."""
    config, opening = write_config(), Job.open
    generate(config, "--output", out)

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(Job, "open", opening)
        generate(config, "--output", out, "--overwrite")
        return opening(*arguments)

    monkeypatch.setattr(Job, "open", late)
    assert re.match(f"{out} ", failed("generate", config, "--output", out, "--overwrite"))
    assert fgsm("verify", out).exit_code == 0


def test_pictures_that_a_report_in_a_store_no_longer_shows_are_known_as_ours(
    s3: S3, out: str, two: tuple[Path, Path]
) -> None:
    assert fgsm("generate", two[0], "--output", out).exit_code == 0
    for name in there(s3, out):
        if "-of-" in name:
            alter(s3, out, name, None)
    assert fgsm("report", out).exit_code == 0
    result = fgsm("generate", two[1], "--output", out, "--overwrite")
    assert result.exit_code == 0
    assert "its report was not made" not in result.stderr
