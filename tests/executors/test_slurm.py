"""The Slurm job, beside programs that only note what they are asked: its end, its signals, what it leaves behind."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.processes import wait_for

SCRIPT = REPOSITORY / "scripts/slurm_ray.sbatch"
SHIMS = {
    "scontrol": 'printf "%s\\n" $SLURM_JOB_NODELIST',
    # A step is a process here: what it runs follows the options.
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": 'if [ "$1" = -I ]; then echo "$ADDRESSES"; else echo 127.0.1.1; fi',
    "sleep": "exec /bin/sleep 0.1",
    "ray": """
trap 'echo ended >>"$NOTES/ray"; exit' TERM
mkdir -p "$RAY_TMPDIR/session" && touch "$RAY_TMPDIR/session/log"
echo "$*" >>"$NOTES/ray"
while :; do /bin/sleep 0.05; done
""",
    "fgsm": """
echo "$RAY_ADDRESS $*" >"$NOTES/fgsm"
ls "$RAY_TMPDIR/session" >>"$NOTES/fgsm"
trap 'echo ended >>"$NOTES/fgsm"; exit 143' TERM
touch "$NOTES/driving"
while [ -n "$ENDLESS" ]; do /bin/sleep 0.05; done
exit "$CODE"
""",
}
RAY = """
import os, pathlib, time

NOTES = pathlib.Path(os.environ["NOTES"], "ray")

def init(**_):
    while not NOTES.exists():
        time.sleep(0.02)

def nodes():
    while len(NOTES.read_text().splitlines()) < len(os.environ["SLURM_JOB_NODELIST"].split()):
        time.sleep(0.02)
    return [{"Alive": True}] * 2
"""


class Job:
    """A job that is begun with `start`; what its programs note lies in `notes`."""

    def __init__(self, folder: Path) -> None:
        self.notes, shims = folder / "notes", folder / "shims"
        for path in (self.notes, shims):
            path.mkdir()
        (shims / "ray.py").write_text(RAY)
        for name, script in SHIMS.items():
            (shims / name).write_text(f"#!/bin/bash\n{script}\n")
            (shims / name).chmod(0o755)
        self.number = 10**9 + random.SystemRandom().randrange(10**9)
        self.temporary = Path(f"/tmp/ray-{self.number}")
        self.beside = Path(f"{self.temporary}0")
        self.environment = {
            **os.environ,
            "PATH": f"{shims}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(shims),
            "NOTES": str(self.notes),
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOB_NODELIST": "one two",
            "SLURM_CPUS_ON_NODE": "4",
            "ADDRESSES": "127.0.1.1 fd00::2 10.1.2.3 172.17.0.1",
            "CODE": "0",
            "ENDLESS": "",
        }

    def start(self, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", SCRIPT, "cifar10.yaml", "--output", "/shared/some where"],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def noted(self, program: str) -> list[str]:
        return (self.notes / program).read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    for folder in (job.temporary, job.beside):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("code", [0, 3])
def test_the_driver_s_exit_code_is_the_job_s_and_nothing_is_left(job: Job, code: int) -> None:
    job.beside.mkdir()
    process = job.start(CODE=str(code))
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    address = f"10.1.2.3:{20_000 + job.number % 20_000}"
    assert job.noted("fgsm") == [f"{address} generate cifar10.yaml --output /shared/some where --executor ray", "log"]
    head, other = job.noted("ray")[:2]
    assert "--num-cpus=4 --head --node-ip-address=10.1.2.3 --port=" in head
    assert f"--num-cpus=4 --address={address}" in other
    assert job.noted("ray")[2:] == ["ended", "ended"]
    assert not job.temporary.exists()
    assert job.beside.exists(), "that is another job's"


def test_a_job_that_is_out_of_time_ends_its_driver(job: Job) -> None:
    process = job.start(ENDLESS="1")
    wait_for((job.notes / "driving").exists, 30)
    process.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: does
    _, said = process.communicate(timeout=10)
    assert process.returncode == 143, said
    assert job.noted("fgsm")[-1] == "ended"
    assert job.noted("ray")[2:] == ["ended", "ended"]
    assert not job.temporary.exists()


def test_a_head_that_no_other_node_could_reach_is_told(job: Job) -> None:
    process = job.start(ADDRESSES="127.0.0.1")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = said.splitlines()
    assert re.match("Error: one .*IPv4", line)
    assert not (job.notes / "ray").exists()


def test_one_node_alone_needs_no_address(job: Job) -> None:
    process = job.start(ADDRESSES="", SLURM_JOB_NODELIST="one")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert job.noted("fgsm")[0].startswith("127.0.0.1:")
