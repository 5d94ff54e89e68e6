"""What an executor reports is judged by the caller."""

import re
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from pipeline.core.plan import Shard
from pipeline.engine.job import Written
from pipeline.executors import EXECUTORS
from pipeline.executors.base import Executor, Work
from tests.conftest import WriteConfig, digests, fgsm, generate


class Forgetful(Executor):
    """Writes all shards but the last."""

    def run(self, shards: Sequence[Shard], work: Work) -> Generator[Written | None, None, None]:
        yield from work.here(shards[:-1])


def test_an_executor_that_loses_a_shard_is_named(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config()
    monkeypatch.setitem(EXECUTORS, "forgetful", f"{__name__}:Forgetful")
    result = fgsm("generate", config, "--executor", "forgetful")
    assert result.exit_code == 1
    assert re.search(r"Error: Forgetful .*\b1 of 3 .*\(test-00002-of-00003\)", result.stderr)
    assert "2 of 3 shards" in generate(config)
    generate(config, "--output", str(tmp_path / "whole"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
