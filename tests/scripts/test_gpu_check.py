"""The check for a machine with a GPU, rehearsed at tiny size on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY

SIZES = {"LIMIT": "32", "PEER_IMAGES": "16", "BATCH_SIZE": "8"}
TINY = {"WORKLOAD": "digits", "VARIANTS": "eager", "CONTENDERS": "ours bound", "PROCESSES": "2", **SIZES}
# Bash's tools, but the Python of these tests.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def check(folder: Path, **more: str) -> tuple[int, dict[str, Any]]:
    """Run the script; its exit code and its file."""
    command = [REPOSITORY / "scripts/gpu_check.sh", folder / "out"]
    code = subprocess.run(
        command, env={**os.environ, "PATH": PATH, **TINY, **more}, timeout=280, check=False
    ).returncode
    (file,) = (folder / "out").iterdir()
    return code, json.loads(file.read_text())


@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for where there is no GPU")
def test_without_a_gpu_all_else_runs(tmp_path: Path) -> None:
    code, result = check(tmp_path)
    assert (code, result["not_passed"]) == (0, []), result["steps"]
    assert result["complete"]
    assert result["machine"]["gpu"] is None
    assert " skipped, " in result["tests"]
    assert "passed" not in result["tests"], "a test marked gpu ran on the CPU"
    assert result["bytes_equal"] == {"attacks": True, "workload": True, "workload-shared": True}
    assert all(".parquet" in result["steps"][f"{name}-equal"]["log"][0] for name in ("attacks", "workload"))
    assert any("2 processes" in line for line in result["steps"]["workload-shared"]["log"])
    (workload,) = result["benchmark"]["workloads"]
    ours, several, bound = workload["contenders"]
    assert (ours["processes"], several["processes"]) == (1, 2)
    assert ours["share_of_bound"] > 0
    assert {"load", "attack", "encode", "write"} <= ours["busy"].keys()
    assert bound["images"] == 32


@pytest.mark.parametrize(("seconds", "status"), [("0", "not reached"), ("2", "timed out")])
def test_the_time_for_all_is_kept(tmp_path: Path, seconds: str, status: str) -> None:
    code, result = check(tmp_path, TOTAL_SECONDS=seconds)
    assert code == 1
    assert not result["complete"]
    assert result["not_passed"] == ["prepare"], "without it no step can follow"
    assert result["steps"]["prepare"]["status"] == status
