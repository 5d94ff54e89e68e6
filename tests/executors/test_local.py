"""Several processes of one machine share a run: they write what one does, and lose nothing when one is lost."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from pipeline.config.schema import RuntimeConfig
from pipeline.core.cores import available_cores
from pipeline.core.errors import RowError
from pipeline.core.plan import Shard
from pipeline.engine.execute import Tell
from pipeline.engine.job import Written
from pipeline.engine.processes import Processes
from pipeline.executors import local
from pipeline.executors.base import Work, Write
from pipeline.executors.local import LocalExecutor
from pipeline.output.folder import Receipt, VariantCounts
from tests.conftest import FACTORY, WriteConfig, digests, fgsm, generate, png_bytes, random_pixels, write_parquet
from tests.support.processes import start as start
from tests.support.processes import wait_for
from tests.support.s3 import S3, there
from tests.support.s3 import bucket as bucket
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server
from tests.support.several import EVERY_KIND, write_several

THREE = ("--set", "runtime.processes=3")

# A victim that does what files beside it say, in each process that writes shards. Those that the run has started can be
# told from the one that has started them by their command.
WATCHED = """

import os, pathlib, signal, sys, time

HERE = pathlib.Path(__file__).parent


class Watched(Net):
    def forward(self, x):
        if len(x) < 2 or not (HERE / "out/manifest.json").exists():  # the run is being opened
            return super().forward(x)
        helper = "pipeline.executors.helper" in pathlib.Path("/proc/self/cmdline").read_text()
        (HERE / f"{'helper' if helper else 'first'} {os.getpid()}").touch()
        while (HERE / "meet").exists() and len(list(HERE.glob("helper *"))) < int((HERE / "meet").read_text()):
            time.sleep(0.01)
        while helper and (HERE / "gate").exists():
            time.sleep(0.01)
        if (HERE / "slow").exists():
            time.sleep(0.1)
        if helper and (HERE / "fail").exists():
            raise RuntimeError("no more memory for a helper")
        if helper and (HERE / "kill once").exists():
            (HERE / "kill once").unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
"""


@pytest.fixture(autouse=True)
def _own_datasets_cache_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes know only the environment."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> Path:
    """48 images in 12 shards of two batches."""
    factory_file.write_text(FACTORY + WATCHED)
    write_parquet(tmp_path / "many", [png_bytes(image) for image in random_pixels(48)], [i % 3 for i in range(48)])
    return write_config(
        source={"path": str(tmp_path / "many")},
        model={"name": f"{factory_file}:Watched"},
        output={"images_per_shard": 4},
        runtime={"batch_size": 2},
    )


@pytest.fixture
def alone(config: Path, tmp_path: Path) -> dict[str, str]:
    """What one process writes."""
    generate(config, "--output", str(tmp_path / "alone"), "--set", "runtime.processes=1")
    assert len(list(tmp_path.glob("helper *"))) == 0
    return digests(tmp_path / "alone")


def helpers_of(folder: Path) -> list[int]:
    """The processes that have attacked beside the one that was started."""
    return [int(file.name.split()[1]) for file in folder.glob("helper *")]


def both_are_there(folder: Path, run: Any) -> None:
    """Wait until two others attack."""

    def said() -> str:
        return (folder / "log").read_text() if (folder / "log").exists() else ""

    wait_for(lambda: len(helpers_of(folder)) == 2 or not run.is_alive() or "has ended" in said())
    assert len(helpers_of(folder)) == 2, said()


def all_gone(processes: Sequence[int]) -> bool:
    return not any(_lives(pid) for pid in processes)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_free(out: Path) -> bool:
    """Whether nobody holds an output: the last thread of a process lets go, which may outlive it by milliseconds."""
    with (out / ".run/lock").open() as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


# -------------------------------------------------------------------------------------------- side by side


def test_three_processes_write_what_one_writes(config: Path, alone: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "meet").write_text("2")
    generate(config, *THREE)
    assert len(helpers_of(tmp_path)) == 2, "all were at work at once"
    assert digests(tmp_path / "out") == alone
    (session,) = map(json.loads, (tmp_path / "out/.run/sessions.jsonl").read_text().splitlines())
    assert session["images"] == 48, "progress counts the batches of all"
    assert all(0 <= share <= 1.5 for share in session["busy"].values())
    assert all_gone(helpers_of(tmp_path))
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


@pytest.mark.slow
def test_every_kind_of_attack_on_several_models(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_several(write_config, tmp_path, EVERY_KIND)
    generate(config, "--output", str(tmp_path / "alone"))
    generate(config, *THREE)
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


@pytest.mark.slow
def test_in_an_object_store(config: Path, alone: dict[str, str], tmp_path: Path, s3: S3, bucket: str) -> None:
    del alone
    out = f"s3://{bucket}/some/where"
    generate(config, "--output", out, "--part", "0/12")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").touch()
    (tmp_path / "meet").write_text("2")
    generate(config, "--output", out, *THREE)
    generate(config, "--output", f"s3://{bucket}/alone", "--set", "runtime.processes=1")
    written, expected = there(s3, out), there(s3, f"s3://{bucket}/alone")
    assert {name: data for name, data in written.items() if name.endswith(".parquet")} == {
        name: data for name, data in expected.items() if name.endswith(".parquet")
    }
    assert len(helpers_of(tmp_path)) == 2


def test_the_number_of_processes_may_change_between_sessions(
    config: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "meet").write_text("2")
    generate(config, "--part", "0/2", *THREE)
    assert len(helpers_of(tmp_path)) == 2, "a part shares its machine if it is told to"
    assert "6 of 12 shards" in generate(config, "--set", "runtime.processes=2")
    assert digests(tmp_path / "out") == alone


# ------------------------------------------------------------------------------------------ one that is lost


def test_a_process_that_is_killed_loses_no_row(config: Path, alone: dict[str, str], tmp_path: Path) -> None:
    for name in ("meet", "kill once"):
        (tmp_path / name).write_text("2")
    said = generate(config, *THREE)
    assert "A process that shared the work has ended" in said
    assert digests(tmp_path / "out") == alone


def test_a_process_that_cannot_go_on_leaves_the_work_to_the_others(
    config: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    for name in ("meet", "fail"):
        (tmp_path / name).write_text("2")
    said = generate(config, *THREE)
    assert len(re.findall(r"no more memory for a helper", said)) == 2
    assert digests(tmp_path / "out") == alone


def test_a_process_that_cannot_be_started_is_done_without(
    config: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    said = generate(config, *THREE)
    assert said.count(os.strerror(errno.EAGAIN)) == 1
    assert digests(tmp_path / "out") == alone


def test_what_stops_every_process_is_said_as_one_process_says_it(write_config: WriteConfig, tmp_path: Path) -> None:
    images = [png_bytes(image) for image in random_pixels(40)]
    images[37] = b"no image"
    source = {"path": str(write_parquet(tmp_path / "broken", images, [0] * 40)), "shuffle": False}
    config = write_config(source=source, output={"images_per_shard": 4}, runtime={"batch_size": 2, "on_error": "fail"})
    several, one = (
        fgsm("generate", config, "--output", tmp_path / f"out-{count}", "--set", f"runtime.processes={count}")
        for count in (3, 1)
    )
    assert several.exit_code == one.exit_code == 1
    errors = [re.findall("Error: .*", result.stderr) for result in (several, one)]
    assert errors[0] == errors[1]
    assert "row 37" in errors[0][0]


# ------------------------------------------------------------------------------------------------ the end


def test_no_process_outlives_one_that_is_killed(
    config: Path, alone: dict[str, str], tmp_path: Path, start: Any
) -> None:
    (tmp_path / "meet").write_text("3")  # nobody gets so far
    run = start("generate", config, *THREE)
    both_are_there(tmp_path, run)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    wait_for(lambda: all_gone(helpers_of(tmp_path)) and is_free(tmp_path / "out"), 10)
    (tmp_path / "meet").unlink()
    generate(config, *THREE)
    assert digests(tmp_path / "out") == alone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_ends_all_processes(group: bool, number: int, config: Path, tmp_path: Path, start: Any) -> None:
    """Of the first process alone, or of all of them, as Ctrl-C in a terminal and the end of a job of Slurm are."""
    for name in ("gate", "slow", "meet"):
        (tmp_path / name).write_text("2")
    run = start("generate", config, *THREE)
    both_are_there(tmp_path, run)
    assert {os.getpgid(pid) for pid in helpers_of(tmp_path)} == {os.getpgid(run.pid)}
    (os.killpg if group else os.kill)(run.pid, number)
    run.join(10)
    said = (tmp_path / "log").read_text()
    assert run.exitcode == 128 + number, said
    assert all_gone(helpers_of(tmp_path)), "it has waited for them"
    assert "shared the work" not in said, "those that it has ended itself are no news"
    assert "Traceback" not in said


# ----------------------------------------------------------------------------------------- who does what


def shards_of(count: int) -> list[Shard]:
    return [Shard("test", index, count, 10 * index, 10 * index + 10) for index in range(count)]


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Helpers that this test plays: each has a connection over which it asks."""
    made: list[Any] = []
    real: Any = local._Helper

    class Played:
        def __init__(self, index: int, work: Work, cores: int) -> None:
            del index, work
            self.cores, self.works, self.killed, self.thread = cores, True, False, None
            self.begun = dict[str, Shard]()
            self.images, self.labelled, self.correct = 0, 0, dict[str, int]()
            self.connection, self.other = Pipe()
            made.append(self)

        told = real.told

        def kill(self, patience: float = 0) -> str:
            del patience
            self.killed = True
            return "SIGKILL"

        def close(self) -> None:
            self.other.close()
            real.close(self)

        def ask(self) -> list[Shard]:
            self.other.send(("ask", None))
            answer = self.other.recv()
            return answer if isinstance(answer, list) else self.other.recv()  # after what it is to do

    monkeypatch.setattr(local, "_Helper", Played)
    return made


class Here:
    """Writes shards in this process, and keeps which and with how many cores."""

    def __init__(self, after: Callable[[Shard], None]) -> None:
        self.after, self.written, self.cores = after, list[str](), list[int]()

    def __call__(self, shards: Sequence[Shard], *, tell: Any = None) -> Generator[Written, None, None]:
        del tell
        for shard in shards:
            self.written.append(shard.name)
            self.cores.append(available_cores())
            self.after(shard)
            yield receipt_of(shard)


def receipt_of(shard: Shard) -> Written:
    """Of 10 images, 8 of which are labelled, and 5 right."""
    counts = [VariantCounts.model_construct(**{"subset": "clean", "labelled": 8, "correct": 5})]  # type: ignore[arg-type]
    receipt = Receipt.model_construct(**{"shard": shard.name, "planned": 10, "counts": counts})  # type: ignore[arg-type]
    return Written(receipt, {})


def run_team(here: Here, shards: Sequence[Shard], count: int, told: Tell = lambda *_: None) -> list[str]:
    """What a run yields, by name."""
    work = Work(here=here, elsewhere=cast(Write, print), tell=told, processes=Processes(count))
    return [written.receipt.shard for written in LocalExecutor(RuntimeConfig()).run(shards, work) if written]


def test_shards_are_handed_out_in_ever_smaller_portions(helpers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.cores.os.sched_getaffinity", lambda _: set(range(5)))
    shards, portions = shards_of(64), list[int]()

    def work_beside(shard: Shard) -> None:
        if shard.index:
            return
        (helper,) = helpers
        while portion := helper.ask():
            portions.append(len(portion))
            for one in portion:
                helper.other.send(("written", receipt_of(one)))

    here = Here(work_beside)
    names = run_team(here, shards, 2)
    assert sorted(names) == [shard.name for shard in shards]
    assert len(here.written) + sum(portions) == 64
    assert portions[:4] == [8, 8, 8, 8], "no more at once, so that a process that is slow holds up little"
    assert portions[4:] == sorted(portions[4:], reverse=True)
    assert portions[-1] == 1
    assert (here.cores[0], helpers[0].cores) == (3, 2)
    assert helpers[0].killed


def test_a_process_takes_the_cores_of_each_that_is_lost(helpers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.cores.os.sched_getaffinity", lambda _: set(range(6)))
    shards = shards_of(40)

    def lose(shard: Shard) -> None:
        if shard.index in (1, 2):
            helper = helpers[shard.index - 1]
            helper.ask()
            helper.other.close()
            wait_for(lambda: not helper.works)

    here = Here(lose)
    names = run_team(here, shards, 3)
    assert sorted(names) == [shard.name for shard in shards], "each once, those that were handed out too"
    assert here.cores == [*[2] * 7, *[6] * 33], "from its next portion on"


def test_images_of_a_shard_that_is_lost_are_counted_once(helpers: list[Any]) -> None:
    """A helper that is lost has told of batches of a shard that it has committed and of one that it has not."""
    told, lost = list[tuple[int, int, int]](), list[Shard]()

    def tell(images: int, labelled: int, correct: Mapping[str, int]) -> None:
        told.append((images, labelled, correct.get("clean", 0)))

    def lose(shard: Shard) -> None:
        del shard
        if lost:
            return
        (helper,) = helpers
        lost.extend(helper.ask())
        for message in [
            ("batch", (10, 8, {"clean": 5})),
            ("batch", (6, 4, {"clean": 3})),
            ("written", receipt_of(lost[0])),
        ]:
            helper.other.send(message)
        helper.other.close()
        wait_for(lambda: not helper.works)

    names = run_team(Here(lose), shards_of(12), 2, tell)
    assert len(names) == len(set(names)) == 12
    assert [sum(column) for column in zip(*told, strict=True)] == [10, 8, 5], "what is committed"


def test_what_ends_a_run_ends_it_wherever_it_is_met(helpers: list[Any]) -> None:
    def meet(shard: Shard) -> None:
        if not shard.index:
            (helper,) = helpers
            helper.ask()
            helper.other.send(("error", RowError("source: row 37 is broken")))
            wait_for(lambda: not helper.works)

    here = Here(meet)
    with pytest.raises(RowError, match="row 37"):
        run_team(here, shards_of(12), 2)
    assert len(here.written) == 1


def test_a_process_that_is_lost_while_the_first_one_waits_is_replaced_by_it(helpers: list[Any]) -> None:
    shards = shards_of(2)

    def later(helper: Any) -> None:
        time.sleep(0.3)
        helper.other.close()

    def hand_over(shard: Shard) -> None:
        if not shard.index:
            (helper,) = helpers
            assert [one.index for one in helper.ask()] == [1]
            threading.Thread(target=later, args=(helper,)).start()

    here = Here(hand_over)
    assert sorted(run_team(here, shards, 2)) == [shard.name for shard in shards]
    assert here.written == [shard.name for shard in shards]


def test_nobody_waits_for_a_helper_that_has_no_shard(helpers: list[Any]) -> None:
    """One that is slow to start, or has stopped before it asked."""
    assert len(run_team(Here(lambda _: None), shards_of(6), 3)) == 6
    assert [helper.killed for helper in helpers] == [True, True]


def test_progress_that_cannot_be_shown_loses_no_shard(helpers: list[Any]) -> None:
    """As where the terminal has gone."""

    def fail(*_: object) -> None:
        raise BrokenPipeError

    def tell(shard: Shard) -> None:
        (helper,) = helpers
        if not shard.index:
            portion = helper.ask()
            helper.other.send(("batch", (10, 8, {"clean": 5})))
            for one in portion:
                helper.other.send(("written", receipt_of(one)))
            assert helper.ask(), "it goes on"
            helper.other.close()

    here = Here(tell)
    names = run_team(here, shards_of(8), 2, fail)
    assert sorted(names) == [shard.name for shard in shards_of(8)]


def test_how_a_helper_has_ended_is_said_of_any_signal() -> None:
    for number in (signal.SIGKILL, signal.SIGRTMIN + 6):
        helper = cast(Any, local._Helper).__new__(local._Helper)
        helper._process = subprocess.Popen(["sleep", "100"])
        helper._process.send_signal(number)
        assert helper.kill(5) == f"signal {int(number)}"


def test_helpers_are_ended_where_a_run_is_stopped(helpers: list[Any]) -> None:
    def fail(shard: Shard) -> None:
        raise ArithmeticError(shard.name)

    with pytest.raises(ArithmeticError):
        run_team(Here(fail), shards_of(4), 3)
    assert [helper.killed for helper in helpers] == [True, True]


def test_a_short_run_starts_no_other_process(helpers: list[Any]) -> None:
    here = Here(lambda _: None)
    assert len(run_team(here, shards_of(4), 1)) == 4
    assert not helpers


# --------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("seen", "gpus", "given"),
    [
        (None, (0, 1), ["1", "0", "1"]),
        (None, (0, 2), ["2", "0", "2"]),
        ("2, 5", (0, 1), ["5", "2", "5"]),
        ("GPU-a,GPU-b,GPU-c", (0, 2), ["GPU-c", "GPU-a", "GPU-c"]),
        ("3", (0,), ["3", "3", "3"]),
        ("3", (), ["3", "3", "3"]),
    ],
)
def test_of_several_gpus_each_process_sees_one(
    seen: str | None, gpus: tuple[int, ...], given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert [local._environment(index, gpus)["CUDA_VISIBLE_DEVICES"] for index in (1, 2, 3)] == given


def test_a_process_imports_what_the_first_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").touch()
    # "" is the working folder; what is no text, as some notebooks have it, Python passes over.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path, Path("/no/text")])
    command = [sys.executable, "-P", "-c", "import beside, pipeline; print(beside.__file__, pipeline.__file__)"]
    found = subprocess.run(command, env=local._environment(1, ()), capture_output=True, text=True, check=True)
    assert found.stdout.split()[0] == str(tmp_path / "beside.py")
