"""The night: what is tried again and what ends it, what it says in the morning, and real commands from start to end."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import TemporaryError
from pipeline.night import Night, allowed_tries, night_folder
from tests.conftest import REPOSITORY, WriteConfig, fgsm
from tests.support.hub import running_hub
from tests.support.s3 import S3, SECRET, there
from tests.support.s3 import bucket as bucket
from tests.support.s3 import out as out
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server

# A program in the place of `python -m pipeline`. `plan.json` says what each phase does, try by try.
FAKE = """
import json, os, pathlib, signal, sys, time

here = pathlib.Path(__file__).parent
with (here / "asked").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
tries = sum(json.loads(line)[0] == sys.argv[1] for line in (here / "asked").read_text().splitlines())
steps = json.loads((here / "plan.json").read_text()).get(sys.argv[1], [{}])
step = steps[min(tries, len(steps)) - 1]
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
print(step.get("say", ""), flush=True)
for number in range(step.get("shards", 0)):
    receipts = here / "out/.run/receipts"
    receipts.mkdir(parents=True, exist_ok=True)
    (receipts / f"{tries}-{number}.json").touch()
if "stop" in step:
    os.kill(os.getppid(), step["stop"])
    time.sleep(60)
parent, end = os.getppid(), time.monotonic() + step.get("sleep", 0)
while time.monotonic() < end and os.getppid() == parent:
    time.sleep(0.05)
if "kill" in step:
    os.kill(os.getpid(), step["kill"])
sys.exit(step.get("exit", 0))
"""
CONFIG = {"source": {"kind": "digits"}, "model": {"kind": "digits"}, "attack": {"epsilons": ["16/255"]}}


class Site:
    """A folder with a config, and a program that does what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, list[str]()
        (folder / "small.yaml").write_text(yaml.safe_dump({**CONFIG, "output": {"path": str(folder / "out")}}))
        (folder / "fake.py").write_text(FAKE)

    def night(
        self,
        plan: dict[str, list[dict[str, Any]]] | None = None,
        *,
        silent: float = 60.0,
        on_end: str | None = None,
        tell: Callable[[str], None] | None = None,
        program: Sequence[str] = (),
    ) -> int:
        (self.folder / "plan.json").write_text(json.dumps(plan or {}))
        return Night(
            str(self.folder / "small.yaml"), None, ["runtime.seed=1"], None, "local", on_end, tell or self.said.append,
            program=program or [sys.executable, "-I", "-S", str(self.folder / "fake.py")], pause=0.0, silent=silent,
        ).run()  # fmt: skip

    @property
    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "asked").read_text().splitlines()]

    @property
    def phases(self) -> list[str]:
        return [arguments[0] for arguments in self.asked]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out.night/summary.json").read_text())
        return found

    @property
    def log(self) -> str:
        return Path(self.summary["log"]).read_text()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_phases_follow_each_other_and_the_summary_says_what_there_is(site: Site, finished: Path) -> None:
    shutil.copytree(finished, site.folder / "out")
    assert site.night() == 0
    config, output = str(site.folder / "small.yaml"), str(site.folder / "out")
    assert site.asked == [
        ["generate", config, "--set", "runtime.seed=1"],
        ["verify", output, "--recompute"],
        ["report", output],
    ]
    summary = site.summary
    assert (summary["status"], summary["exit_code"], summary["reason"]) == ("done", 0, None)
    assert [(phase["name"], phase["tries"]) for phase in summary["phases"]] == [
        ("generate", 1), ("verify", 1), ("report", 1)
    ]  # fmt: skip
    dataset, inspected = summary["dataset"], json.loads(fgsm("inspect", finished, "--json").stdout)
    assert (dataset["run_id"], dataset["source_images"]) == (inspected["run_id"], 11)
    assert (dataset["rows"], dataset["skipped_rows"]) == (22, 1)
    assert dataset["bytes"] == sum(path.stat().st_size for path in finished.rglob("*.parquet"))
    clean, eps8 = inspected["subsets"]
    assert dataset["accuracy"] == {"clean": clean["correct"] / 11, "eps-8": eps8["correct"] / 11}
    done, rows, accuracy, empty, first, *_ = site.log.splitlines()
    assert done.startswith(f"{output}: done in 0:00:0")
    assert done.endswith("tries: generate 1, verify 1, report 1")
    assert rows.startswith("22 rows of 11 source images, 1 skipped, ")
    assert accuracy == f"accuracy: clean {clean['correct'] / 11:.2%}, eps-8 {eps8['correct'] / 11:.2%}"
    assert empty == ""
    assert first.endswith(f"fgsm generate {config} --set runtime.seed=1")
    # Nothing of it lies in the dataset.
    assert {path.name for path in (site.folder / "out").iterdir()} == {path.name for path in finished.iterdir()}


@pytest.mark.parametrize(
    ("phase", "step", "tries", "code"),
    [
        ("generate", {"exit": 2}, 1, 2),
        ("generate", {"exit": 1}, 3, 1),
        ("generate", {"exit": 3}, 3, 3),
        ("generate", {"kill": 9}, 3, 137),
        ("generate", {"exit": 143}, 3, 143),
        ("verify", {"exit": 1}, 1, 1),
        ("verify", {"kill": 11}, 3, 139),
        ("report", {"exit": 75}, 12, 75),
    ],
)
def test_what_may_pass_is_tried_again(site: Site, phase: str, step: dict[str, Any], tries: int, code: int) -> None:
    assert site.night({phase: [{**step, "say": "why"}]}) == code
    assert site.phases.count(phase) == tries
    assert site.phases[-1] == phase
    summary = site.summary
    assert (summary["status"], summary["phase"], summary["exit_code"]) == ("failed", phase, code)
    assert summary["phases"][-1]["tries"] == tries
    assert re.match(rf"\S+/out: FAILED in {phase} with exit code {code} after .*; .+", site.log)


def test_publishing_that_failed_for_good_is_not_tried_again() -> None:
    assert allowed_tries("publish", 1) == 1
    assert allowed_tries("publish", TemporaryError.exit_code) > 3


def test_it_goes_on_after_failures_that_pass_and_counts_from_the_last_progress(site: Site) -> None:
    failures = [{"kill": 9}, {"kill": 9}, {"kill": 9, "shards": 1}, {"kill": 9}, {"kill": 9}]
    assert site.night({"generate": [*failures, {}], "verify": [{"exit": 75}, {}]}) == 0
    assert site.phases == [*["generate"] * 6, *["verify"] * 2, "report"]
    assert "SIGKILL" in site.log


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (2, "failed")])
def test_what_is_run_at_the_end_knows_the_outcome_and_does_not_hide_it(site: Site, code: int, status: str) -> None:
    shown = "; ".join(f"echo ${name}" for name in ("FGSM_NIGHT_STATUS", "FGSM_NIGHT_EXIT_CODE", "FGSM_NIGHT_PHASE"))
    command = f'({shown}; head -n 1 "$FGSM_NIGHT_LOG"; cat "$FGSM_NIGHT_SUMMARY") > {site.folder}/told; exit 7'
    assert site.night({"generate": [{"exit": code}]}, on_end=command) == code
    told = (site.folder / "told").read_text().splitlines()
    assert told[:3] == [status, str(code), "report" if code == 0 else "generate"]
    assert told[3] == site.log.splitlines()[0]
    assert json.loads("".join(told[4:])) == site.summary
    assert "--on-end ended with exit code 7." in site.log


@pytest.mark.parametrize(("key", "arguments"), [("output.path", {}), ("config", {"missing": True})])
def test_a_config_that_is_wrong_starts_nothing_and_the_end_is_told(
    site: Site, key: str, arguments: dict[str, bool]
) -> None:
    config = site.folder / "small.yaml"
    config.unlink() if arguments else config.write_text(yaml.safe_dump(CONFIG | {"output": {"path": 1}}))
    assert site.night(on_end=f"echo $FGSM_NIGHT_EXIT_CODE > {site.folder}/told") == 2
    assert key in "".join(site.said)
    assert (site.folder / "told").read_text() == "2\n"
    assert not (site.folder / "asked").exists()


def test_without_a_token_nothing_is_begun(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.hub.account.get_token", lambda: None)
    config = write_config()
    for name, named in (("user/name", "HF_TOKEN"), ("user name", "user/name")):
        result = fgsm("night", config, name)
        assert result.exit_code == 2
        assert named in result.stderr
    assert not list(config.parent.glob("out*"))


@pytest.fixture
def heard(signum: signal.Signals) -> Iterator[None]:
    """A signal that is not ignored, as a shell ignores Ctrl-C for what it starts in the background."""
    former = signal.signal(signum, signal.SIG_DFL)
    yield
    signal.signal(signum, former)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_and_the_night_in_order(site: Site, signum: signal.Signals, code: int) -> None:
    assert (
        site.night({"generate": [{"stop": signum}]}, on_end=f"sleep 0.2; echo $FGSM_NIGHT_STATUS > {site.folder}/told")
        == code
    )
    assert site.phases == ["generate"]
    # The child's own answer: it was asked to end, and not killed.
    assert site.summary["phases"][0]["exit_code"] == (130 if signum == signal.SIGINT else 143)
    assert (site.summary["status"], site.summary["exit_code"]) == ("interrupted", code)
    assert (site.folder / "told").read_text() == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_command_that_cannot_be_started_is_tried_again(site: Site) -> None:
    assert site.night(program=[str(site.folder / "missing")]) == 75
    assert site.summary["phases"][0]["tries"] == 12
    assert os.strerror(errno.ENOENT) in site.summary["reason"]


def test_a_bug_is_told_to_the_log_and_at_the_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pipeline.night.select.select", broken)
    began = time.monotonic()
    assert site.night({"generate": [{"sleep": 60}]}) == 1
    assert time.monotonic() - began < 30, "its command was stopped"
    assert "Traceback" in site.log
    assert site.summary["reason"] == "a bug"


def test_a_command_that_does_not_end_is_killed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.night.ON_END_SECONDS", 0.3)
    assert site.night(on_end="echo $$; exec sleep 60") == 0
    assert "--on-end ended with signal SIGKILL" in site.log


def test_a_phase_that_says_nothing_is_still_at_work(site: Site) -> None:
    assert site.night({"verify": [{"sleep": 1.5}]}, silent=0.3) == 0
    lines = re.findall(r"fgsm (\w+) is still at work after .* with [\d.]+ MB in memory", site.log)
    assert len([name for name in lines if name == "verify"]) >= 2


def test_each_line_of_the_log_has_one_time(site: Site) -> None:
    assert site.night({"generate": [{"say": "no time\n2026-01-02 03:04:05 a time\r 50%\r100%\n\033[31mred"}]}) == 0
    _, lines = site.log.split("\n\n", 1)
    time_ = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert all(re.match(f"{time_} (?!{time_})", line) for line in lines.splitlines())
    for said in ("no time", "a time", " 50%", "100%", r"\x1b[31mred"):
        assert re.search(f"^{time_} {re.escape(said)}$", lines, re.MULTILINE)


@pytest.mark.parametrize("room", [0, 4000])
def test_a_disk_that_is_full_for_the_log_does_not_end_the_night(site: Site, room: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def tell(line: str) -> None:
        site.said.append(line)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # from the first line on, once the log is open

    # The commands can write what they like.
    program = ["/bin/sh", "-c", 'ulimit -S -f unlimited; exec "$0" "$@"', sys.executable, "-I", "-S"]
    try:
        code = site.night(
            {"generate": [{"say": "a" * 5000}]}, tell=tell, program=[*program, str(site.folder / "fake.py")]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 0
    assert site.phases == ["generate", "verify", "report"]
    assert ": done in " in site.said[-1]
    (log,) = (site.folder / "out.night").glob("*.log")
    assert log.stat().st_size == room
    assert not list((site.folder / "out.night").glob("*.new")), "what is cut short takes up no room"
    assert room == 0 or site.summary["status"] == "done"


def test_two_nights_on_one_output_do_not_meet(site: Site) -> None:
    codes = list[int]()

    def second(line: str) -> None:
        if "fgsm verify" in line and not codes:
            codes.append(site.night())

    assert site.night(tell=second) == 0
    assert codes == [1]
    assert "Another fgsm night" in site.said[0]
    assert site.phases == ["generate", "verify", "report"]
    assert site.summary["status"] == "done"


def test_a_night_that_was_killed_is_told_to_the_next(site: Site) -> None:
    (site.folder / "plan.json").write_text(json.dumps({"verify": [{"sleep": 60}]}))
    start = (
        "from pipeline.night import Night; import sys; "
        "Night('small.yaml', None, [], None, 'local', None, print, program=[sys.executable, '-S', 'fake.py']).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", start], cwd=site.folder, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (site.folder / "asked").exists() or "verify" not in site.phases:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert site.summary["status"] == "running"
    os.utime(site.summary["log"], (1_000_000_000, 1_000_000_000))
    killed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1_000_000_000))
    assert site.night() == 0
    assert f"The previous run was killed at {killed}" in site.log
    assert "in verify" in site.log
    site.said.clear()
    assert site.night() == 0
    assert not [line for line in site.said if "previous run" in line]


def test_the_log_of_an_object_store_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert night_folder("s3://bucket/some/where/") == tmp_path / "where.night"
    assert night_folder("s3://bucket") == tmp_path / "bucket.night"
    assert night_folder("out/d") == tmp_path / "out/d.night"
    # As /data of a container, of which only what is in it can be written.
    assert night_folder("/proc/data") == tmp_path / "data.night"
    assert (tmp_path / "where.night").is_dir()


# ------------------------------------------------------------------------------------------------ real commands


def start(folder: Path, *arguments: str, **more: str) -> "subprocess.Popen[str]":
    # A package of the same name in the working folder is not ours.
    (folder / "pipeline").mkdir(exist_ok=True)
    (folder / "pipeline/__init__.py").write_text("raise SystemExit(9)")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(folder / "hub"), **more}
    command = "from pipeline.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", command, "night", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write_small(folder: Path) -> None:
    config = {
        "source": {"kind": "digits", "split": "test"},
        "preprocess": {"mode": "L"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": ["16/255"]},
        "output": {"path": "out/d", "images_per_shard": 16},
        "runtime": {"batch_size": 4, "workers": 0, "device": "cpu"},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_night_is_stopped_and_run_again_and_published(tmp_path: Path) -> None:
    write_small(tmp_path)
    receipts = tmp_path / "out/d/.run/receipts"
    with running_hub() as hub:
        known = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}
        known["NO_PROXY"] = "127.0.0.1"
        process = start(tmp_path, "small.yaml", "user/name", **known)
        deadline = time.monotonic() + 90
        while not list(receipts.glob("*.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # to the night alone, as a service manager does
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 143, said
        assert "INTERRUPTED in generate" in said
        assert len(list(receipts.glob("*.json"))) < 28
        process = start(tmp_path, "small.yaml", "user/name", **known)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        arrived = hub.repositories["user/name"].files
    assert len(list(receipts.glob("*.json"))) == 28
    assert json.loads(arrived["manifest.json"].content or b"")["complete"]
    assert arrived["report.html"].content == (tmp_path / "out/d/report.html").read_bytes()
    assert not [name for name in arrived if "night" in name]
    summary = json.loads((tmp_path / "out/d.night/summary.json").read_text())
    assert [phase["name"] for phase in summary["phases"]] == ["generate", "verify", "report", "publish"]
    assert (summary["status"], summary["dataset"]["source_images"]) == ("done", 445)
    log = Path(summary["log"]).read_text()
    assert log.splitlines()[1].endswith(", published as user/name")
    assert "0 problems in 0 shards" in log
    assert f"Published: {hub.endpoint}/datasets/user/name\n" in log
    assert "hf_writer" not in said + log
    assert "Traceback" not in log


@pytest.mark.timeout(300)
def test_a_night_writes_to_an_object_store(s3: S3, out: str, tmp_path: Path) -> None:
    write_small(tmp_path)
    process = start(tmp_path, "small.yaml", "--output", out, "--set", "source.limit=32", **s3.environment)
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said
    assert SECRET not in said
    summary = json.loads((tmp_path / "where.night/summary.json").read_text())
    assert (summary["status"], summary["dataset"]["rows"]) == ("done", 64)
    assert "report.html" in there(s3, out)
    assert not [name for name in there(s3, out) if "night" in name]
