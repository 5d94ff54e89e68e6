"""The unattended run: real commands, stopped and run again, from any folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.support.hub import running_hub

SCRIPT = REPOSITORY / "scripts/overnight.sh"
# Bash, and the tools that the script calls, but the Python of these tests.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def start(folder: Path, *arguments: str, **more: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PATH": PATH, "HF_HOME": str(folder / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_TOKEN", None)
    environment |= more
    return subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write_config(folder: Path, **runtime: int) -> None:
    config = {
        "source": {"kind": "digits", "split": "test"},
        "preprocess": {"mode": "L"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": ["16/255"]},
        "output": {"path": "out/d", "images_per_shard": 16},
        "runtime": {"batch_size": 4, "workers": 0, **runtime},
    }
    (folder / "configs").mkdir()
    (folder / "configs/small.yaml").write_text(yaml.safe_dump(config))


def test_the_first_step_that_fails_ends_it_with_its_exit_code(tmp_path: Path) -> None:
    write_config(tmp_path, batch_size=0)
    process = start(tmp_path, "configs/small.yaml")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(r"fgsm generate .*\b2\b", said)
    assert "runtime.batch_size" in said
    assert "fgsm verify" not in said
    log = (tmp_path / "overnight-small.log").read_text()
    assert "Error: " in log
    assert said.splitlines()[0] == f"log: {tmp_path / 'overnight-small.log'}"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["digits", "user/name", "more"]])
def test_wrong_arguments_are_told_the_right_ones(tmp_path: Path, arguments: list[str]) -> None:
    process = start(tmp_path, *arguments)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == "usage: overnight.sh CONFIG [REPO_ID]\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.drill
@pytest.mark.timeout(300)
def test_a_run_is_stopped_and_run_again_and_published(tmp_path: Path) -> None:
    write_config(tmp_path)
    process = start(tmp_path, "configs/small.yaml")
    receipts = tmp_path / "out/d/.run/receipts"
    deadline = time.monotonic() + 60
    while not list(receipts.glob("*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # to the script alone, as a service manager does
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143, said
    assert re.search(r"fgsm generate .*\b143\b", said)
    assert len(list(receipts.glob("*.json"))) < 28

    with running_hub() as hub:
        known = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_writer",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        process = start(tmp_path, "configs/small.yaml", "user/name", **known)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        arrived = hub.repositories["user/name"].files
    assert len(list(receipts.glob("*.json"))) == 28
    for step in ("generate", "verify", "report", "publish"):
        assert f"fgsm {step} took " in said
    assert said.endswith("done: out/d\n")
    assert json.loads(arrived["manifest.json"].content or b"")["complete"]
    assert arrived["report.html"].content == (tmp_path / "out/d/report.html").read_bytes()
    log = (tmp_path / "overnight-small.log").read_text()
    assert "Interrupted" in log
    assert "0 problems in 0 shards" in log
    assert f"Published: {hub.endpoint}/datasets/user/name\n" in log
    assert "hf_writer" not in said + log
    assert "Traceback" not in log


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_scripts_are_clean() -> None:
    root = SCRIPT.parent.parent
    others = ["check", "gpu_check.sh", "gpu_wheels.sh", "slurm_ray.sbatch"]
    scripts = [SCRIPT, *(root / "scripts" / name for name in others), root / ".ci/run"]
    # What it merely notes, its versions note differently.
    subprocess.run(["shellcheck", "--severity=warning", *scripts], check=True)
