"""How busy the stages were."""

import logging
import re
import threading
import time
from datetime import datetime, timedelta

import pytest

from pipeline.engine.progress import STAGES, Busy, Progress, bottleneck


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_stage_is_busy_while_its_threads_compute_and_not_while_they_wait() -> None:
    busy = Busy()
    threads = [
        threading.Thread(target=busy.timed("attack", spin), args=(0.15,)),
        threading.Thread(target=busy.timed("write", time.sleep), args=(0.3,)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shares = busy.shares({"attack": 1, "write": 1, "load": 2})
    assert shares["attack"] > shares["write"]
    assert shares["load"] == 0
    # Half of two cores is all of one.
    assert abs(busy.shares({"attack": 2})["attack"] - shares["attack"] / 2) <= 0.01


def test_an_accelerator_is_timed_by_the_wall() -> None:
    busy = Busy()
    busy.timed("attack", time.sleep, time.perf_counter)(0.1)
    assert busy.shares({"attack": 1})["attack"] > 0.1


def test_a_call_that_fails_counts_and_still_fails() -> None:
    busy = Busy()

    def broken() -> None:
        spin(0.05)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        busy.timed("encode", broken)()
    assert busy.shares({"encode": 1})["encode"] > 0


def test_the_rate_leaves_out_the_first_batch_which_waited_for_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.engine.progress.time.monotonic", lambda: now[0])
    with Progress(300, 0, ["clean"]) as progress:
        now[0] = 10.0
        progress.update(100, 0, {})
        assert progress.rate == 10.0, "nothing to tell apart yet"
        now[0] = 11.0
        progress.update(100, 0, {})
        assert progress.rate == 100.0


# 3,000 are counted, in the last 30 s 2,000 of them: 24 minutes and 15 seconds are left of the first run.
@pytest.mark.parametrize(("total", "told"), [(100_000, True), (6_000, False), (None, False)])
def test_a_long_run_says_once_when_it_should_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, total: int | None, told: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.engine.progress.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "pipeline"), Progress(total, 0, [], log_seconds=1e9) as progress:
        for now[0] in (20.0, 40.0, 49.0):
            progress.update(1_000, 0, {})
        assert not caplog.messages, "the rate is not yet known"
        for now[0] in (50.0, 60.0, 70.0):
            progress.update(0, 0, {})
    assert len(caplog.messages) == told
    for said in caplog.messages:
        found = re.fullmatch(r"Expected to end at ([\d-]+ [\d:]+), in about 0:24:00\.", said)
        assert found
        end = datetime.fromisoformat(found[1]) - timedelta(minutes=24)
        assert abs(datetime.now() - end) <= timedelta(minutes=1)


@pytest.mark.parametrize("stage", STAGES)
def test_the_busiest_stage_is_named_with_what_helps(stage: str) -> None:
    said = bottleneck({**dict.fromkeys(STAGES, 0.2), stage: 0.6}, shared_cores=False, layouts=["signs"])
    assert all(part in said for part in STAGES[stage])
    assert ("layout signs" in said) == (stage in ("encode", "write"))


def test_stages_that_share_the_cores_are_taken_together() -> None:
    shares = {"load": 0.1, "attack": 0.45, "encode": 0.3, "write": 0.05}
    short = bottleneck(shares, shared_cores=False)
    assert not any(who in short for who, _ in STAGES.values())
    assert STAGES["attack"][0] in bottleneck(shares, shared_cores=True)
    assert "layout" not in bottleneck({"encode": 1.0}, shared_cores=True)
