"""Object stores that break, refuse and forget to answer, and who holds a place there."""

import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from fsspec.registry import _registry

import pipeline
from pipeline.core.errors import ConfigError, PipelineError, TemporaryError
from pipeline.core.redaction import redact_answer
from pipeline.output.folder import OutputFolder
from pipeline.output.objects import ObjectStore
from pipeline.output.store import Store, open_store
from tests.conftest import WriteConfig, digests, fgsm, generate, without_run
from tests.support.processes import wait_for
from tests.support.s3 import S3, alter, failed, lock_of, shard_name, shards, there
from tests.support.s3 import bucket as bucket
from tests.support.s3 import out as out
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server

# ------------------------------------------------------------------------------------------------ the lock


def test_a_second_run_says_who_holds_the_place(s3: S3, out: str, write_config: WriteConfig) -> None:
    config = write_config(output={"path": out})
    with OutputFolder(out).store.held():
        sentence = failed("generate", config)
        assert re.match(rf"{out} .*process {os.getpid()} ", sentence)
    assert lock_of(there(s3, out)) is None
    generate(config)


@pytest.mark.drill
def test_the_lock_of_a_run_that_died_is_taken_over(s3: S3, out: str, caplog: pytest.LogCaptureFixture) -> None:
    alter(s3, out, ".run/lock", b'{"host": "elsewhere", "process": 7, "token": "x", "beat": 3}')
    began = time.monotonic()
    with caplog.at_level(logging.INFO), OutputFolder(out).store.held():
        assert time.monotonic() - began >= 3
        assert lock_of(there(s3, out)) != {"host": "elsewhere", "process": 7, "token": "x", "beat": 3}
    assert re.search(rf"{out}\S* .*process 7 .*elsewhere", caplog.text)
    alter(s3, out, ".run/lock", b"no JSON")
    with OutputFolder(out).store.held():
        pass
    assert (list(there(s3, out)), lock_of(there(s3, out))) == ([".run/lock"], None), "released, not removed"


def test_of_two_runs_that_take_a_dead_lock_over_at_once_one_goes_on(
    s3: S3, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have read the dead lock, and the store lets one of them replace it."""
    monkeypatch.setattr("pipeline.output.locks.STALE_SECONDS", 0.5)
    alter(s3, out, ".run/lock", b'{"host": "elsewhere", "process": 7, "token": "dead"}')
    both = threading.Barrier(2)
    over = threading.Event()
    holding: list[Store] = []
    refused: list[str] = []

    def hold(store: ObjectStore) -> None:
        replace = store.replace

        def together(name: str, content: bytes, version: str | None) -> str:
            if b'"beat": 0' in content:
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait(60)
            return replace(name, content, version)

        monkeypatch.setattr(store, "replace", together)
        try:
            with store.held():
                holding.append(store)
                over.wait(60)
        except PipelineError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=hold, args=(ObjectStore(out),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(holding) + len(refused) == 2)
    over.set()
    for thread in threads:
        thread.join()
    assert len(holding) == 1
    (sentence,) = refused
    assert re.match(rf"{out} .*process {os.getpid()} .*{socket.gethostname()}", sentence)


def test_a_lock_that_goes_away_meanwhile_is_made_at_once(s3: S3, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.locks.STALE_SECONDS", 600.0)
    alter(s3, out, ".run/lock", b"{}")
    threading.Timer(0.3, alter, (s3, out, ".run/lock", None)).start()
    began = time.monotonic()
    with OutputFolder(out).store.held():
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("other", [b'{"host": "elsewhere", "process": 7, "token": "x"}', None])
def test_a_holder_whose_lock_is_another_s_writes_no_more(s3: S3, out: str, other: bytes | None) -> None:
    folder = OutputFolder(out)
    by = "removed" if other is None else r"\(process 7 .*elsewhere\)"
    refused = pytest.raises(PipelineError, match=rf"^{out}: .*\block\b.*{by};")
    with refused, folder.store.held():
        alter(s3, out, ".run/lock", other)
        time.sleep(1)
        folder.store.write("manifest.json", b"{}")
    assert there(s3, out) == ({} if other is None else {".run/lock": other}), "and leaves what is not its own"
    with pytest.raises(PipelineError, match=rf"^{out}/2: .*\block\b"), OutputFolder(f"{out}/2").store.held():
        alter(s3, f"{out}/2", ".run/lock", None)
        time.sleep(1)


def test_a_lock_is_rewritten_through_a_store_that_fails_for_a_while(s3: S3, out: str) -> None:
    with OutputFolder(out).store.held():
        s3.fail("GET", r"\.run/lock", 500, times=2)
        wait_for(lambda: (lock_of(there(s3, out)) or {})["beat"] >= 2)


# ---------------------------------------------------------------------------------------- what goes wrong


def test_a_store_that_fails_for_a_while_is_asked_again(
    s3: S3, out: str, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.output.objects.ATTEMPTS", 4)
    s3.fail("PUT", "eps-8/test-00001", 500, times=2)
    s3.fail("PUT", "receipts/test-00000", 500, times=1)
    s3.fail("GET", "list-type=2", 500, times=1, after=1)
    generate(write_config(output={"path": out}))
    assert not any(fault.times for fault in s3.faults)
    generate(write_config())
    assert shards(there(s3, out)) == digests(tmp_path / "out")


@pytest.mark.parametrize(("kind", "said"), [(500, "an injected fault for ***"), ("hang", "answer")])
def test_a_store_that_fails_for_good_is_one_sentence_and_loses_nothing(
    kind: int | str, said: str, s3: S3, out: str, write_config: WriteConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.output.objects.PATIENCE_SECONDS", 1.0 if kind == "hang" else 30.0)
    config = write_config(output={"path": out})
    s3.fail("PUT", "eps-8/test-00001", kind)
    began = time.monotonic()
    sentence = failed("generate", config, code=TemporaryError.exit_code)
    assert time.monotonic() - began < 30
    assert re.match(rf"{out}: .*\(.*{re.escape(said)}\)", sentence)
    objects = there(s3, out)
    assert [without_run(name) for name in objects if "receipts" in name] == [".run/receipts/test-00000-of-00003.json"]
    assert json.loads(objects["manifest.json"])["rows"] == 16
    assert lock_of(objects) is None
    s3.faults.clear()
    assert "1 of 3 shards" in generate(config)
    generate(write_config(output={"path": str(tmp_path / "out")}))
    assert shards(there(s3, out)) == digests(tmp_path / "out")


def test_a_request_that_neither_ends_nor_fails_is_given_up(s3: S3, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.objects.PATIENCE_SECONDS", 0.5)
    s3.fail("GET", "manifest.json", "hang")
    assert re.match(rf"{out}: .*\(.*answer\)", failed("inspect", out, code=TemporaryError.exit_code))


def test_what_a_store_does_not_give_now_may_be_verified_later(s3: S3, out: str, write_config: WriteConfig) -> None:
    generate(write_config(output={"path": out}))
    s3.fail("GET", "eps-8/test-00001", 500)
    failed("verify", out, code=TemporaryError.exit_code)
    alter(s3, out, shard_name(s3, out, "clean/test-00000-of-00003.parquet"), b"damaged")
    failed("verify", out, code=1)


@pytest.mark.parametrize("kind", ["credentials", "bucket", "forbidden", "unreachable"])
def test_a_store_that_cannot_be_used_is_one_sentence(
    kind: str, s3: S3, out: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = 1
    if kind == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        expected, code = rf"{out}: there are no credentials for it \(.+\); set those of the store's own client, ", 2
    elif kind == "bucket":
        out = "s3://no-such-bucket/x"
        expected, code = r"output\.path: s3://no-such-bucket does not exist, or these credentials may not see it; ", 2
    elif kind == "forbidden":
        s3.fail(".*", "", 403)
        expected = rf"{out}: access denied \(.+\)\. Finished shards are kept; use other credentials, "
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush@127.0.0.1:9")
        expected = rf"{out}: the store failed \(it cannot be reached: .+\)\. Finished shards"
    sentence = failed("generate", write_config(output={"path": out}), "--debug", code=code)
    assert re.match(expected, sentence), sentence


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_goes_away_is_one_sentence() -> None:
    with pytest.raises(PipelineError, match=r"^s3://no-such-bucket/x: .*\(.*bucket"):
        ObjectStore("s3://no-such-bucket/x").write("manifest.json", b"{}")


def test_a_place_without_a_dataset_is_one_sentence(out: str) -> None:
    named = rf"^{out} .*manifest\.json"
    for command in ("verify", "inspect", "report"):
        assert re.match(named, failed(command, out, code=2))
    with pytest.raises(ConfigError, match=named):
        pipeline.load(out)


def test_an_address_with_credentials_is_refused_without_quoting_them(write_config: WriteConfig) -> None:
    for place in ("s3://id:hush/hush@bucket/x", "s3://hush@bucket/x", "s3://bucket/x?secret=hush"):
        said = failed("generate", write_config(), "--output", place, code=2)
        assert re.match(r"output\.path(: .*s3://bucket/prefix| .*credential)", said)
        assert re.match(r"output\.path: .*s3://bucket/prefix", failed("verify", place, code=2))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for place, named in (("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("s4://b/x", "Protocol")):
        with pytest.raises(ConfigError, match=rf"^output\.path: {place[:5]} .*{named}"):
            open_store(place)


def test_only_the_shards_in_flight_need_room_on_the_disk(
    out: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = write_config(output={"images_per_shard": 10})
    # 40 images of 16 px are about 100 KB at three epsilons, 10 of them a fourth of it.
    for module in ("output.disk", "engine.estimate"):
        monkeypatch.setattr(f"pipeline.{module}.free_bytes", lambda _: 60_000)
    assert failed("generate", config).startswith("output.path: ")
    plan = fgsm("plan", config, "--output", out)
    assert "\nWarning" not in plan.output
    assert re.search(rf"\b60\.0 KB .*{tmp_path}/temporary, .* KB\b", plan.stdout)
    generate(config, "--output", out)
    monkeypatch.setattr("pipeline.output.disk.free_bytes", lambda _: 6_000)
    sentence = failed("generate", config, "--output", f"{out}/2")
    assert re.match(rf"output\.path: .*{tmp_path}/temporary .*\b6\.0 KB .*TMPDIR.*output\.images_per_shard", sentence)


def test_training_from_a_store_is_refused(out: str) -> None:
    with pytest.raises(ConfigError, match=f"^{out}: .*disk"):
        pipeline.training_dataset(out)


def test_messages_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-hush")
    assert (
        redact_answer('to "https://me:pw@host/b?X-Amz-Signature=s" with token-hush')
        == 'to "https://***@host/b?..." with ***'
    )
