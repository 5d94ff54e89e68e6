"""The benchmark of how commands start: one small run of it."""

import json
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import benchmark_start


def test_the_first_word_comes_before_the_end(tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    benchmark_start.main(rounds=2, beside=REPOSITORY, only=["help"], json_path=file)
    rows = json.loads(file.read_text())["commands"]
    assert [(row["command"], row["checkout"]) for row in rows] == [("help", "this"), ("help", "beside")]
    assert all(0 < row["first_s"] <= row["end_s"] and row["cpu_s"] > 0 for row in rows)
